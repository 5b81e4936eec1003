"""Language models that rewards run: one of their own, or the base weights of the policy, with or without a saved adapter.

    model named                           weights                      with an adapter
    the one that trains, method = "lora"  the policy's W, once         its LoRA layers in place of the policy's (lora.saved)
    another one, or method = "full"       a frozen copy of its own     attached to that copy

The policy is what it was before and after every use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastlora.batches import policy_batch
from fastlora.config import ModelConfig, RunConfig
from fastlora.fused_layers import fuse_layers
from fastlora.lora.packed import PackedAdapter
from fastlora.lora.saved import attach_saved, beside, only
from fastlora.model import BaseModel, load_base_model, wrap_model
from fastlora.policy import score_in_parts
from fastlora.reward_config import RewardModelConfig
from fastlora.rewards.deposits import RewardError
from fastlora.types import Rollout


@dataclass(frozen=True, slots=True)
class Policy:
    """The model that trains, as rewards may use it: to score with, and to share its frozen weights. None of it is ever changed."""

    config: RunConfig
    model: BaseModel
    adapter: PackedAdapter | None
    """None in full fine-tuning."""

    def score(self, rollout: Rollout) -> Tensor:
        """log π_θ(o_t) float32 [n, t] of the sampled tokens under the policy as it is now, see `score_rollout`."""
        return score_rollout(self.config, self.model, rollout)


@dataclass(frozen=True, slots=True)
class RewardModel:
    """A frozen model; its forward pass is its own only inside `running()`."""

    model: BaseModel
    _context: Callable[[], AbstractContextManager[None]]

    @contextmanager
    def running(self) -> Iterator[BaseModel]:
        """The model, ready to be run without gradient; where it borrows the policy's weights, the policy's adapter is away inside."""
        with torch.no_grad(), self._context():
            yield self.model


def score_rollout(config: RunConfig, model: BaseModel, rollout: Rollout) -> Tensor:
    """log π(o_t) float32 [n, t] on the CPU, zeros where there is no token: the trainer's own scoring, in the micro-batches that train.

    At rollout.temperature, over the full softmax whatever the nucleus: two models' nuclei would be two different sets of tokens.
    """
    names = ("prompt_ids_np", "prompt_mask_np", "completion_ids_nt", "completion_mask_nt")
    there = replace(rollout, **{name: getattr(rollout, name).to(model.device) for name in names})
    batch = policy_batch(there, torch.zeros(len(rollout.texts), device=model.device), mask_truncated=False)
    return score_in_parts(model.module, batch, config.steps_per_generation, config.rollout.temperature, config.trainer.implementation).cpu()


def load_reward_model(config: RewardModelConfig, policy: Policy, where: str) -> RewardModel:
    """The model that a reward's section `where` names (table above).

    Raises RewardError for a device that is not there; ModelError, AdapterFileError, AttachError as for the policy's own.
    """
    own, cast = policy.config.model, policy.config.trainer.implementation != "reference"
    wanted, device = wanted_model(config, own), _device(config, policy, where)
    if policy.adapter is not None and wanted == own and device == policy.model.device:
        if config.adapter is None:
            return RewardModel(policy.model, policy.adapter.disabled)
        layers = beside(policy.model, config.adapter, cast_to_input=cast)
        return RewardModel(policy.model, lambda: only(policy.model.module, layers))
    loaded = load_base_model(wanted.model_copy(update={"device": "cpu"}))
    model = wrap_model(loaded.module.to(device), loaded.tokenizer, loaded.source)
    if cast:
        fuse_layers(model.module)
    if config.adapter is not None:
        attach_saved(model, config.adapter, cast_to_input=cast)
    return RewardModel(model, nullcontext)


def wanted_model(config: RewardModelConfig, own: ModelConfig) -> ModelConfig:
    """The settings to load it with: those of the policy's model where it is the same, else the defaults in its precision."""
    same = config.model in (None, own.name)
    start = own if same else ModelConfig(name=config.model or own.name, dtype=own.dtype, device=own.device)
    changes = {name: value for name, value in (("revision", config.revision), ("dtype", config.dtype)) if value is not None}
    return start.model_copy(update=changes)


def _device(config: RewardModelConfig, policy: Policy, where: str) -> torch.device:
    if config.device is None:
        return policy.model.device
    device = torch.device(config.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RewardError(f"{where}.device = {config.device!r}, but torch sees {torch.cuda.device_count()} GPUs here")
    # "cuda" is the current one, by whatever name the policy's device goes.
    return torch.device("cuda", torch.cuda.current_device()) if config.device == "cuda" else device
