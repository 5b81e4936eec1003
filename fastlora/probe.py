"""Scores of layers from the gradients of the base weights (Aletheia, arXiv 2604.15351): where an adapter would have most to do.

    score_l = Σ over batches, Σ over parameters θ of layer l, ‖∂L/∂θ‖₂

L is the cross-entropy of completions ("sft": token mean, target = the data's completion, its gold answer where there is none), or the
loss of the run's GRPO on completions that the base model samples here ("grpo"). Embeddings, head and final norm belong to no layer and are
not counted. The score of a module is the same sum over its own parameters: the modules of a layer add up to the layer.

Memory. `layers_at_once` neighbouring layers are unfrozen together, and a batch is passed through once for each such chunk: gradients of
`layers_at_once` layers exist at a time, and the backward pass ends below them. The peak is that of the lowest chunk, whose gradients go
through the activations of all layers above it (memory_plan.plan_probe): printed before, measured after. Of SmolLM2-135M a layer is 7 MB
of gradients in bfloat16, of a 70-billion model 1.7 GB.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastlora.atomic import atomic_write_text
from fastlora.build import peak_memory_bytes, prepared_model, recompute_activations, training_examples
from fastlora.config import RunConfig
from fastlora.errors import FastloraError, refuse_unknown_options
from fastlora.memory_plan import MemoryPlan, largest_batch, plan_probe, resident_bytes
from fastlora.metrics import layer_of
from fastlora.model import BaseModel, meta_model
from fastlora.objectives import Objective, PolicyObjective, SupervisedObjective
from fastlora.ops.registry import use_implementation
from fastlora.progress import StepTimer
from fastlora.prompt import encode
from fastlora.rewards.registry import load_rewards
from fastlora.rollout.torch import TorchSampler
from fastlora.types import Example, TrainBatch

PROBE_FILE = "probe.json"
OPTIONS = ("batches", "batch_size", "seed", "layers_at_once", "objective")
"""Of the task: the arguments of `probe`."""

Say = Callable[[str], None]
ProbeObjective = Literal["sft", "grpo"]


class ProbeError(FastloraError):
    """A probe that cannot be made, or its file cannot be read; the message names the setting, the row or the file."""


@dataclass(frozen=True, slots=True)
class LayerScores:
    """probe.json: scores and how they were made."""

    layers: Mapping[int, float]
    """Layer -> score."""
    modules: Mapping[str, float]
    """Module that owns parameters of a layer (`model.layers.0.self_attn.q_proj`, a norm) -> score."""
    layers_by_batch: Mapping[int, Sequence[float]]
    """Layer -> its part of the score from each batch."""
    model: str
    """`model.name` of the config."""
    objective: ProbeObjective
    batches: int
    batches_without_signal: int
    """Of these, the ones whose gradient was zero everywhere: groups with equal rewards."""
    batch_size: int
    """Examples (sft) or prompts (grpo) of a batch."""
    seed: int
    layers_at_once: int
    seconds: float
    """Of the passes, sampling included, loading not."""
    peak_bytes: int
    """Largest resident set of the process so far (CPU), or largest allocation of the device (GPU)."""
    expected_peak_bytes: int
    """What memory_plan.plan_probe said."""
    gradient_bytes: int
    """Most bytes of gradients that existed at a time."""

    def write(self, folder: Path) -> Path:
        """Writes `folder`/probe.json atomically."""
        atomic_write_text(folder / PROBE_FILE, json.dumps(asdict(self), indent=2, allow_nan=False) + "\n")
        return folder / PROBE_FILE


def read_probe(path: Path) -> LayerScores:
    """Reads a probe.json. Raises ProbeError when it is missing or damaged."""
    try:
        found = json.loads(path.read_text())
        for name in ("layers", "layers_by_batch"):
            found[name] = {int(layer): value for layer, value in found[name].items()}
        return LayerScores(**found)
    except FileNotFoundError:
        raise ProbeError(f"{path}: no such file; a study's probe task writes one") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ProbeError(f"{path} is damaged: {error}") from None


def run_probe(config: RunConfig, folder: Path, options: Mapping[str, Any], say: Say) -> None:
    """The task of a study: `probe` with these options, its result in `folder`/probe.json. Raises ProbeError for an unknown option."""
    refuse_unknown_options(options, OPTIONS, "a probe", ProbeError)
    probe(config, **options, say=say).write(folder)


def probe(
    config: RunConfig,
    batches: int = 5,
    batch_size: int = 1,
    seed: int = 42,
    layers_at_once: int = 4,
    objective: ProbeObjective = "sft",
    say: Say = lambda message: None,
) -> LayerScores:
    """Loads the config's model and scores its layers; adapter, optimizer, sampler and steps of the config are not used.

    seed: of the choice of batches (and of sampling). Raises ProbeError (numbers below 1, 4-bit weights, a row without a target, no gradient
    at all, or one that is not finite), and what loading a run's model, data and rewards raises.
    """
    own = probe_config(config, batches, batch_size, seed, layers_at_once, objective)
    model = prepared_model(own)
    if own.trainer.gradient_checkpointing:
        recompute_activations(model)
    examples = training_examples(own, model)
    if objective == "sft":
        examples = tuple(map(with_target, examples))
    source, rewards = _objective(own, model, examples)
    plan = _plan(own, model, examples, layers_at_once)
    say(
        f"probe: expected peak memory {plan.peak / 2**30:.2f} GiB: "
        + ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in plan.update)
    )
    start, norms = time.perf_counter(), []
    with rewards, use_implementation(own.trainer.implementation):
        for step in range(1, batches + 1):
            batch = source.collect(step, 0, StepTimer()).batch
            norms.append(gradient_norms(model.module, partial(_loss, source, batch), layers_at_once))
            say(f"probe: batch {step} of {batches}")
    return _scores(own, norms, model.module, layers_at_once, time.perf_counter() - start, plan)


def probe_config(config: RunConfig, batches: int, batch_size: int, seed: int, layers_at_once: int, objective: ProbeObjective) -> RunConfig:
    """The run whose generation batches are probed: each `batch_size` prompts and one backward pass, sampled in this process."""
    for name, number in (("batches", batches), ("batch_size", batch_size), ("layers_at_once", layers_at_once)):
        if number < 1:
            raise ProbeError(f"a probe's {name} = {number}: it must be at least 1")
    if objective not in ("sft", "grpo"):
        raise ProbeError(f"a probe's objective = {objective!r}: 'sft' or 'grpo'")
    if config.model.quantization != "none":
        raise ProbeError(f"model.quantization = '{config.model.quantization}': packed weights have no gradient to probe; set it to 'none'")
    settings = config.model_dump(exclude={"lora", "vllm"})
    settings |= {"seed": seed, "objective": objective, "method": "lora"}
    settings["rollout"] |= {"num_prompts": batch_size, "sampler": "torch", "replay_path": None, "record_path": None}
    settings["loss"] |= {"sampler_correction": "none"}  # sampler and trainer are one model here
    settings["trainer"] |= {"steps": batches, "gradient_accumulation_steps": 1, "steps_per_generation": None, "num_iterations": 1}
    return RunConfig.model_validate(settings)


def with_target(example: Example) -> Example:
    """The example with something to predict. Raises ProbeError for one that has neither completion nor answer."""
    if not (example.completion or example.answer):
        raise ProbeError(
            f"row {example.index} of the training data has neither a completion nor an answer: there is nothing to predict. "
            "Give it one, or probe with objective = 'grpo'"
        )
    return replace(example, completion=example.completion or example.answer)


def _objective(config: RunConfig, model: BaseModel, examples: Sequence[Example]) -> tuple[Objective, AbstractContextManager[object]]:
    """What collects batches and gives their loss; and what must be entered for it to work."""
    if config.objective == "sft":
        return SupervisedObjective(config, model, examples), nullcontext()
    rewards = load_rewards(config.reward)
    rewards.check(examples)
    sampler = TorchSampler(model, config.rollout.batch_size)
    return PolicyObjective(config, model, None, sampler, rewards, examples), rewards


def _loss(source: Objective, batch: TrainBatch) -> Tensor:
    return source.loss(batch)[0]


def _plan(config: RunConfig, model: BaseModel, examples: Sequence[Example], layers_at_once: int) -> MemoryPlan:
    prompts = [len(ids) for ids in encode(model.tokenizer, [example.prompt for example in examples])]
    completions = None
    if config.objective == "sft":
        completions = [len(ids) + 1 for ids in model.tokenizer([e.completion for e in examples], add_special_tokens=False).input_ids]
    batch = largest_batch(config, prompts, completions, ())
    memory = resident_bytes(model.device), peak_memory_bytes(model.device)
    return plan_probe(config, meta_model(config.model), batch, layers_at_once, *memory)


def layer_parameters(module: nn.Module) -> dict[int, dict[str, nn.Parameter]]:
    """Layer -> its parameters by name. Raises ProbeError for a model without numbered layers."""
    found: dict[int, dict[str, nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if (layer := layer_of(name)) >= 0:
            found.setdefault(layer, {})[name] = parameter
    if not found:
        raise ProbeError(f"{type(module).__name__} has no numbered layers to score")
    return found


def gradient_norms(module: nn.Module, loss: Callable[[], Tensor], layers_at_once: int) -> dict[str, float]:
    """Parameter of a layer -> ‖∂L/∂θ‖₂; `loss()` is called once for every `layers_at_once` layers.

    Afterwards every parameter requires a gradient or not as it did before, and none has one. Raises ProbeError for a norm that is not
    finite.
    """
    layers = list(layer_parameters(module).values())
    norms: dict[str, float] = {}
    for first in range(0, len(layers), layers_at_once):
        chunk = {name: parameter for layer in layers[first : first + layers_at_once] for name, parameter in layer.items()}
        with _unfrozen_alone(module, chunk):
            value = loss()
            if value.requires_grad:  # a batch without completion tokens has nothing to differentiate
                value.backward()
            norms |= {name: _norm(parameter.grad) for name, parameter in chunk.items()}
    for name, norm in norms.items():
        if not math.isfinite(norm):
            raise ProbeError(f"the gradient of {name} is not finite; probe with model.dtype = 'float32', or look at the data")
    return norms


@contextmanager
def _unfrozen_alone(module: nn.Module, names: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Inside, these parameters and no others require a gradient."""
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    module.requires_grad_(False)
    for parameter in names.values():
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
        for parameter in names.values():
            parameter.grad = None


def _norm(grad: Tensor | None) -> float:
    if grad is None:
        return 0.0
    return float(torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32)))


def _scores(
    config: RunConfig, norms: Sequence[Mapping[str, float]], module: nn.Module, layers_at_once: int, seconds: float, plan: MemoryPlan
) -> LayerScores:
    """norms: per batch, parameter -> norm. Raises ProbeError when none of them is above 0."""
    silent = sum(not any(batch.values()) for batch in norms)
    if silent == len(norms):
        raise ProbeError(
            f"the gradient was zero in all {len(norms)} batches"
            + (": every group's rewards were equal. More batches, or objective = 'sft'" if config.objective == "grpo" else "")
        )
    layers = layer_parameters(module)
    by_batch = {layer: [math.fsum(batch[name] for name in names) for batch in norms] for layer, names in layers.items()}
    modules: dict[str, float] = {}
    for names in layers.values():
        for name in names:
            owner = name.rpartition(".")[0]
            modules[owner] = modules.get(owner, 0.0) + math.fsum(batch[name] for batch in norms)
    sizes = [sum(parameter.numel() * parameter.element_size() for parameter in names.values()) for names in layers.values()]
    return LayerScores(
        layers={layer: math.fsum(values) for layer, values in by_batch.items()},
        modules=modules,
        layers_by_batch=by_batch,
        model=config.model.name,
        objective=config.objective,
        batches=len(norms),
        batches_without_signal=silent,
        batch_size=config.rollout.num_prompts,
        seed=config.seed,
        layers_at_once=layers_at_once,
        seconds=seconds,
        peak_bytes=peak_memory_bytes(next(module.parameters()).device),
        expected_peak_bytes=plan.peak,
        gradient_bytes=max(sum(sizes[first : first + layers_at_once]) for first in range(0, len(sizes), layers_at_once)),
    )
