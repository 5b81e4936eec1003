"""A training step of a tiny model on fixed tensors, without a number read back: what a CUDA graph can hold.

The step is the trainer's (`policy.loss_on`, `losses.policy`, `ops.adamw_step`), less what has to look at numbers: packing comes before
it, and a gradient that is not finite would not be noticed.
"""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastlora.config import LossConfig, OptimConfig
from fastlora.fused_layers import fuse_layers
from fastlora.lora.packed import PackedAdapter
from fastlora.losses.one_pass import one_pass_loss
from fastlora.losses.policy import policy_loss
from fastlora.ops.adamw_step import adamw_step, clip_coefficient, gradient_norms, segment_table, total_norm
from fastlora.ops.linear_logprob import linear_logprob
from fastlora.packing import pack
from fastlora.policy import _predictors
from fastlora.types import TrainBatch
from tests.batches import make_group_batch
from tests.lora.adapters import attach_uneven
from tests.tiny import make_tiny_model

LEARNING_RATE = 1e-3


def on(device: torch.device, batch: TrainBatch) -> TrainBatch:
    """The same batch there."""
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return replace(batch, **{name: x.to(device) for name, x in tensors.items() if isinstance(x, Tensor)})


def policy_batch(device: torch.device) -> TrainBatch:
    """Ragged groups with a behaviour policy near the model's own, so that ratios are not all 1."""
    batch = make_group_batch()
    old = -4.5 + 0.1 * torch.randn(batch.completion_ids_nt.shape, generator=torch.Generator().manual_seed(3))
    return on(device, replace(batch, old_logp_nt=old))


def policy_model(device: torch.device, dtype: torch.dtype) -> tuple[PreTrainedModel, PackedAdapter]:
    """A tiny Llama with fused layers and uneven ranks, as `fastlora.build` assembles them."""
    model = make_tiny_model("llama", dtype=dtype).to(device)
    fuse_layers(model)
    return model, attach_uneven(model)


def loss_of(logp_nt: Tensor, entropy_nt: Tensor, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """dapo with its defaults."""
    width = batch.completion_ids_nt.shape[1]
    steps = {"accumulation_steps": 1, "steps_per_generation": 1, "max_completion_length": width}
    return policy_loss(logp_nt, entropy_nt, batch, LossConfig(), entropy_coef=0.0, **steps)


class TrainingStep:
    """`step()` is one step from the present parameters and moments."""

    def __init__(self, device: torch.device, dtype: torch.dtype, *, one_pass: bool = False) -> None:
        """one_pass: over the head, as for every token-level loss (`losses.one_pass`); else two."""
        self.model, self.adapter = policy_model(device, dtype)
        self.one_pass, self.batch = one_pass, policy_batch(device)
        self.packed = pack(self.batch)
        flat = self.adapter.flat
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(flat.data), torch.zeros_like(flat.data)
        self._table_m6 = segment_table(flat.segments, None)

    @property
    def state(self) -> list[Tensor]:
        """Parameters, moments and gradient: what a step writes."""
        return [self.adapter.flat.data, self.exp_avg, self.exp_avg_sq, self.adapter.flat.grad]

    def __call__(self) -> Tensor:
        """The loss [] before the step."""
        flat, head = self.adapter.flat, self.model.get_output_embeddings()
        flat.grad.zero_()
        hidden_cd = _predictors(self.model, self.packed)
        if self.one_pass:
            loss, _ = one_pass_loss(hidden_cd, head.weight, None, self.packed, 1.0, lambda *scores: loss_of(*scores, self.batch))
        else:
            scores = linear_logprob(hidden_cd, head.weight, self.packed.targets_c)
            loss, _ = loss_of(*map(self.packed.unpack, scores), self.batch)
        loss.backward()
        config = OptimConfig()
        clip_coef = clip_coefficient(total_norm(gradient_norms(flat.grad, self._table_m6, None)), config.max_grad_norm)
        settings = {"step": 1, "lr": LEARNING_RATE, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
        adamw_step(flat.data, flat.grad, self.exp_avg, self.exp_avg_sq, self._table_m6, None, clip_coef=clip_coef, **settings)
        return loss.detach()
