"""The fastest plain loop on PEFT's layers that one would write by hand: no logits but the completion's, no padding, fused AdamW.

loss = −Σ_tokens min(ρ A, clip(ρ, 1 − ε, 1 + ε) A) / active tokens of the batch,   ρ = exp(logp − old)      (dapo)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from bench.contender import Clock, Commands, Contender, Report
from bench.peft_model import load_peft_model, peft_gradients
from bench.reward import hashed
from bench.workload import read_workload
from fastlora.types import Rollout

EPSILON = 0.2
LEARNING_RATE = 1e-6
MAX_GRAD_NORM = 1.0
"""TRL's defaults."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded samples, and what the loss needs of them."""

    ids_nl: Tensor
    """int64, prompt (left-padded) and completion (right-padded)."""
    mask_nl: Tensor
    """bool, real tokens."""
    completion_width: int
    """The last columns, which are the completion's."""
    advantages_n: Tensor
    old_logp_nt: Tensor | None = None
    """Behaviour policy; None = the current one."""

    @property
    def scored_nt(self) -> Tensor:
        """bool, completion tokens."""
        return self.mask_nl[:, -self.completion_width :]

    def micro_batches(self, size: int, *, trim: bool) -> Iterator[Batch]:
        """Consecutive samples; trim: without the columns that are padding for all of them."""
        for first in range(0, len(self.ids_nl), size):
            rows = slice(first, first + size)
            start = int(self.mask_nl[rows].any(0).int().argmax()) if trim else 0
            old = None if self.old_logp_nt is None else self.old_logp_nt[rows]
            yield Batch(self.ids_nl[rows, start:], self.mask_nl[rows, start:], self.completion_width, self.advantages_n[rows], old)


def make_batch(rollout: Rollout, rewards: list[float]) -> Batch:
    """A = (r − mean of the group) / (std of the group + 1e-4)."""
    rewards_pg = torch.tensor(rewards).view(-1, rollout.num_generations)
    centred = rewards_pg - rewards_pg.mean(1, keepdim=True)
    ids = torch.cat([rollout.prompt_ids_np, rollout.completion_ids_nt], dim=1)
    mask = torch.cat([rollout.prompt_mask_np, rollout.completion_mask_nt], dim=1)
    advantages_n = (centred / (rewards_pg.std(1, keepdim=True) + 1e-4)).view(-1)
    return Batch(ids, mask, rollout.completion_ids_nt.shape[1], advantages_n)


def token_logp(model: nn.Module, batch: Batch) -> Tensor:
    """logp_nt, at least float32; meaningless at padding. Without padding no mask is passed, so that SDPA runs its causal kernel."""
    width = batch.completion_width
    attention_mask = None if bool(batch.mask_nl.all()) else batch.mask_nl.long()
    logits = model(input_ids=batch.ids_nl, attention_mask=attention_mask, logits_to_keep=width + 1, use_cache=False).logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = batch.ids_nl[:, -width:]
    return -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def dapo_loss(logp_nt: Tensor, batch: Batch, num_items: int, epsilon: float = EPSILON) -> Tensor:
    """Scalar; num_items: active tokens of the generation batch, all micro-batches together."""
    old = logp_nt.detach() if batch.old_logp_nt is None else batch.old_logp_nt
    ratio = (logp_nt - old).exp()
    advantages = batch.advantages_n[:, None]
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)
    return -(surrogate * batch.scored_nt).sum() / num_items


def serve(contender: Contender, folder: Path, commands: Commands, report: Report) -> None:
    """See contender.Serve."""
    rollout = read_workload(folder)
    batch = make_batch(rollout, hashed(rollout.texts, rollout.examples))
    model = load_peft_model(folder / "adapter", contender.dtype)
    model.train()
    if contender.compiled:
        # Layer by layer: one graph serves all 30. Whole shapes, since each new one would be compiled anew.
        for layer in cast(PreTrainedModel, model.get_base_model()).base_model.layers:
            layer.compile(dynamic=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    num_items = int(batch.scored_nt.sum())
    for command in commands:
        start = Clock.now()
        for part in batch.micro_batches(contender.micro_batch, trim=not contender.compiled):
            dapo_loss(token_logp(model, part), part, num_items).backward()
        if command.do == "gradient":
            save_file(peft_gradients(model), command.path)
        nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        start.report_to(report)
