"""From a config to the parts of a run: model, adapter, data, sampler, rewards, optimizer. Everything that can be refused is, here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from fastlora.allocator import bound_gemm_caches, keep_freed_memory
from fastlora.config import LoraConfig, RunConfig
from fastlora.data import load_examples
from fastlora.flat import FlatParameters, flatten_model
from fastlora.fused_layers import fuse_layers
from fastlora.lora.groups import AttachError, projections, shapes
from fastlora.lora.packed import PackedAdapter, attach
from fastlora.lora.patterns import describe, resolve, with_ranks
from fastlora.lora.peft_format import load_adapter, load_b_mask
from fastlora.model import BaseModel, load_base_model, select_device
from fastlora.objectives import Objective, PolicyObjective, SupervisedObjective
from fastlora.ops.registry import ImplementationError, kernels_refuse
from fastlora.optim import AdamW, learning_rates
from fastlora.reallocation import check_reallocation
from fastlora.rewards.models import Policy
from fastlora.rewards.registry import Rewards, load_rewards
from fastlora.rollout.replay import RecordingSampler, ReplaySampler
from fastlora.rollout.sampler import Sampler
from fastlora.rollout.torch import TorchSampler
from fastlora.types import Example


@dataclass(frozen=True, slots=True)
class Parts:
    """A run, assembled."""

    model: BaseModel
    adapter: PackedAdapter | None
    """None in full fine-tuning."""
    flat: FlatParameters
    optimizer: AdamW
    learning_rates: tuple[float, ...]
    """One per optimizer step."""
    objective: Objective
    sampler: Sampler
    """The one that evaluates (and samples, unless rollouts are replayed)."""
    engine: AbstractContextManager[object]
    """Inside it the sampler works: vLLM's engine is started and ended by it."""
    rewards: Rewards
    train_examples: tuple[Example, ...]
    eval_examples: tuple[Example, ...]


def build(config: RunConfig, console: Console, ranks: Mapping[str, int] | None = None) -> Parts:
    """Assembles a run; prints what the patterns did. ranks: by target module, after a reallocation; None = those of the config.

    Raises ConfigError, ImplementationError, ModelError, AttachError, DataError or RewardError, each naming the setting or the row at
    fault.
    """
    rates = learning_rates(config.optim, config.optimizer_steps)
    model = prepared_model(config)
    train_examples = training_examples(config, model)
    eval_examples = held_out_examples(config, model)
    adapter, flat = trainable(config, model, console, ranks)
    rewards = load_rewards(config.reward, Policy(config, model, adapter))
    rewards.check([*train_examples, *eval_examples])
    sampler, engine = _sampler(config, model, adapter, flat, train_examples, console)
    objective: Objective
    if config.objective == "sft":
        objective = SupervisedObjective(config, model, train_examples)
    else:
        # Full fine-tuning overwrites the base weights: loss.beta needs them a second time.
        reference = prepared_model(config) if config.method == "full" and config.loss.beta > 0 else None
        live = _training_sampler(config, sampler, model.device)
        objective = PolicyObjective(config, model, adapter, live, rewards, train_examples, reference)
    if config.trainer.gradient_checkpointing:
        recompute_activations(model)
    optimizer = AdamW(flat, config.optim)
    return Parts(model, adapter, flat, optimizer, rates, objective, sampler, engine, rewards, train_examples, eval_examples)


def prepared_model(config: RunConfig) -> BaseModel:
    """The frozen base model on the run's kernels, without an adapter. Raises ImplementationError or ModelError."""
    if reason := kernels_refuse(config.trainer.implementation, select_device(config.model)):
        raise ImplementationError(f"trainer.implementation = '{config.trainer.implementation}' cannot run: {reason}; 'auto' takes what can")
    bound_gemm_caches()
    keep_freed_memory()
    model = load_base_model(config.model)
    if config.trainer.implementation != "reference":
        fuse_layers(model.module)
    return model


def training_examples(config: RunConfig, model: BaseModel) -> tuple[Example, ...]:
    """The problems that a run trains on. Raises DataError."""
    free = None if config.objective == "sft" else config.rollout.max_completion_length
    return _examples(config, model, "train", config.data.train_size, free)


def held_out_examples(config: RunConfig, model: BaseModel) -> tuple[Example, ...]:
    """The fixed problems of the evaluation: the first `eval.num_problems` of the held-out split, whatever the seed."""
    return _examples(config, model, "eval", config.eval.num_problems, config.rollout.max_completion_length)


def _examples(
    config: RunConfig, model: BaseModel, split: Literal["train", "eval"], size: int, max_completion_length: int | None
) -> tuple[Example, ...]:
    return load_examples(
        config.data,
        split,
        size=size,
        seed=config.seed,
        tokenizer=model.tokenizer,
        context_length=model.context_length,
        max_completion_length=max_completion_length,
    )


def recompute_activations(model: BaseModel) -> None:
    """Gradient checkpointing: a layer's activations are made again in the backward pass."""
    model.module.gradient_checkpointing_enable({"use_reentrant": False})
    model.module.train()  # transformers recomputes in train mode only; the models served have no dropout of their own


def trainable(
    config: RunConfig, model: BaseModel, console: Console, ranks: Mapping[str, int] | None
) -> tuple[PackedAdapter | None, FlatParameters]:
    """What trains: a fresh (or loaded) adapter attached to the model, or all weights of the model. ranks: see `build`."""
    if config.method == "full":
        return None, flatten_model(model.module)
    layers = projections(model.module)
    specs = resolve(shapes(layers), config.lora)
    if config.reallocation.every:
        check_reallocation(specs, shapes(layers), config)
    if ranks is not None:
        specs = with_ranks(specs, ranks, config.lora.scaling)
    console.print(describe(specs, shapes(layers)))
    adapter = attach(
        model.module,
        specs,
        seed=config.seed if config.lora.init_seed is None else config.lora.init_seed,
        freeze_a=config.lora.freeze_a,
        b_mask_nr=load_b_mask(config.lora.b_mask) if config.lora.b_mask else None,
        cast_to_input=config.trainer.implementation != "reference",
    )
    if config.lora.init_from and ranks is None:  # after a reallocation the values come from its checkpoint
        load_into(adapter, config.lora.init_from, config.lora)
    return adapter, adapter.flat


def load_into(adapter: PackedAdapter, folder: Path, lora: LoraConfig) -> None:
    """Copies a saved adapter into this run's. Raises AttachError when its modules, ranks or scales are not this run's."""
    saved = load_adapter(folder)
    for spec in saved.specs:
        slot = adapter.slots.get(spec.name)
        # The file holds alpha, not s: alpha / r may miss s by its last bit.
        if slot is not None and (slot.rank != spec.rank or not math.isclose(slot.scale, spec.scale, rel_tol=1e-12)):
            raise AttachError(
                f"{spec.name}: {folder} has rank {spec.rank} and s = {spec.scale:.6g}, this run rank {slot.rank} and s = {slot.scale:.6g}; "
                f"set lora.rank_pattern, lora.alpha_pattern and lora.scaling ({lora.scaling}) alike"
            )
    adapter.load(saved.a_rd, saved.b_nr)


def _sampler(
    config: RunConfig,
    model: BaseModel,
    adapter: PackedAdapter | None,
    flat: FlatParameters,
    examples: Sequence[Example],
    console: Console,
) -> tuple[Sampler, AbstractContextManager[object]]:
    """The live sampler, and what must be entered for it to work."""
    if config.rollout.sampler != "vllm":
        return TorchSampler(model, config.rollout.batch_size), nullcontext()
    from fastlora.rollout.vllm.build import build_vllm_sampler  # httpx2 and this package only where they are used

    vllm = build_vllm_sampler(config, model, adapter, flat.data, examples, console)
    return vllm, vllm


def _training_sampler(config: RunConfig, sampler: Sampler, device: torch.device) -> Sampler:
    """The sampler of the training rollouts: live, replayed, or live and recorded."""
    if config.rollout.replay_path:
        return ReplaySampler(config.rollout.replay_path, device)
    if config.rollout.record_path:
        return RecordingSampler(sampler, config.rollout.record_path)
    return sampler


def peak_memory_bytes(device: torch.device) -> int:
    """Largest resident set of this process so far (CPU), or largest allocation on the device (GPU)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # Unix only, like the CPU path's memory figure

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
