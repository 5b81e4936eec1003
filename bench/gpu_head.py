"""Races of the output head, forward and backward: log-probabilities, cross-entropy, GRPO. The head is frozen: only dh is wanted.

| race | entrants besides ours, torch eager, torch.compile and TRL's chunked log-prob (Triton on a GPU) |
|---|---|
| `head_logprob_step` | – |
| `head_cross_entropy_step` | Liger's fused linear cross-entropy, cut-cross-entropy |
| `head_grpo_step` | our one pass over the head, Liger's fused linear GRPO loss |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu_race import Canonical, Entrant, Race, Run, needs, on_a_gpu, on_meta, ours
from bench.op_cases import Case, Update
from fastlora.config import LossConfig
from fastlora.losses.one_pass import one_pass_loss
from fastlora.losses.policy import policy_loss
from fastlora.ops import linear_logprob
from fastlora.ops.registry import dispatchers
from fastlora.packing import PackedTokens
from fastlora.types import TrainBatch

TRL_CHUNK = 32768
"""Vocabulary entries of TRL's tile (trl/trainer/utils.py, _CHUNKED_LOGPROB_CHUNK_SIZE)."""
TEMPERATURE = 0.9
MAX_ERROR = 0.02
"""Relative L2 error of an output in bfloat16; a loss is what its mean over some thousand tokens leaves of their errors."""


@dataclass(frozen=True, slots=True)
class Head:
    """Predicting rows of n completions of t tokens, and a frozen head."""

    hidden_td: Tensor
    weight_vd: Tensor
    targets_t: Tensor
    batch: TrainBatch
    """Advantages, and the log-probabilities of a behaviour policy near the present one."""

    def leaf(self, dtype: torch.dtype | None = None) -> Tensor:
        """The hidden states, to differentiate in."""
        return self.hidden_td.detach().to(dtype or self.hidden_td.dtype).clone().requires_grad_()


def head_problem(case: Case, update: Update, dtype: torch.dtype) -> Head:
    """Of the op's own case."""
    hidden_td, weight_vd, _, targets_t, *_ = case.arguments(dtype)
    n, t = update.samples, update.rows // update.samples
    with torch.no_grad():
        logp_t, *_ = dispatchers["linear_logprob"](
            hidden_td, weight_vd, None, targets_t, TEMPERATURE, False, update.tile_rows, len(weight_vd)
        )
    ones_nt = torch.ones(n, t, dtype=torch.bool)
    ids = torch.zeros(n, 1, dtype=torch.long)
    old_nt = logp_t.float().view(n, t) + 0.05 * logp_t.float().view(n, t).sin()
    advantages = torch.linspace(-0.5, 1, n)[:, None]  # not symmetric: their mean is the loss, and its relative error is judged
    policies = (advantages, old_nt, None, None, n * t)
    return Head(hidden_td, weight_vd, targets_t, TrainBatch(ids, ids.bool(), targets_t.view(n, t), ones_nt, ones_nt, *policies))


Score = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(hidden_td, weight_vd, targets_t) -> (logp_t, entropy_t), at TEMPERATURE."""


def _score_by_op(hidden_td: Tensor, weight_vd: Tensor, targets_t: Tensor) -> tuple[Tensor, Tensor]:
    return linear_logprob.linear_logprob(hidden_td, weight_vd, targets_t, temperature=TEMPERATURE)


def _score_by_formula(hidden_td: Tensor, weight_vd: Tensor, targets_t: Tensor) -> tuple[Tensor, Tensor]:
    z_tv = F.linear(hidden_td, weight_vd)
    log_p_tv = (z_tv.to(torch.promote_types(z_tv.dtype, torch.float32)) / TEMPERATURE).log_softmax(-1)
    return log_p_tv.gather(1, targets_t[:, None]).squeeze(1), -(log_p_tv.exp() * log_p_tv).sum(-1)


def _score_by_trl(hidden_td: Tensor, weight_vd: Tensor, targets_t: Tensor) -> tuple[Tensor, Tensor]:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    logp_t, entropy_t, *_ = ChunkedLogProbFunction.apply(
        hidden_td, weight_vd, None, targets_t, TEMPERATURE, min(TRL_CHUNK, len(weight_vd)), None, 1.0, ("entropy",)
    )
    return logp_t, entropy_t


Step = Callable[[Head, Tensor, Tensor], list[Tensor]]
"""(head, hidden leaf, weight_vd) -> outputs, then what is differentiated with respect to the leaf."""
StepOf = Callable[[Score], Step]


@dataclass(frozen=True, slots=True)
class HeadRaces:
    """The races at the sizes of an update."""

    case: Case
    """Of `linear_logprob`."""
    update: Update
    dtype: torch.dtype

    def all(self) -> Iterator[Race]:
        """Log-probabilities, cross-entropy, GRPO."""
        yield self.race("head_logprob_step", _logprob_step, [])
        losses = [
            Entrant("Liger fused CE", lambda: self.entrant(_liger_cross_entropy), needs("liger-kernel", "liger_kernel")),
            Entrant("cut-cross-entropy", lambda: self.entrant(_cut_cross_entropy), needs("cut-cross-entropy", "cut_cross_entropy")),
        ]
        yield self.race("head_cross_entropy_step", _cross_entropy_step, losses)
        one_pass = ours("logprob_rows", lambda: self.entrant(_one_pass_step), "fastlora one pass")
        liger = Entrant("Liger fused GRPO", lambda: self.entrant(_liger_grpo), needs("liger-kernel", "liger_kernel", gpu=False))
        yield self.race("head_grpo_step", _grpo_step, [*one_pass, liger])

    def race(self, op: str, step_of: StepOf, others: Sequence[Entrant]) -> Race:
        """A computation that starts from scores: with every way to get them, and the others that do it in their own way."""
        t, (v, d) = self.update.rows, on_meta(self.case, self.dtype)[1].shape
        flops, nbytes = 6 * t * d * v, (3 * t * d + 2 * v * d) * self.dtype.itemsize  # logits, logits again, dh; W is read twice
        compiled = torch.compile(_score_by_formula, dynamic=False)
        scored = [
            *ours("linear_logprob", lambda: self.entrant(step_of(_score_by_op))),
            Entrant("torch eager", lambda: self.entrant(step_of(_score_by_formula))),
            Entrant("torch.compile", lambda: self.entrant(step_of(compiled)), on_a_gpu),
            Entrant("TRL chunked", lambda: self.entrant(step_of(_score_by_trl)), needs("trl", "trl", gpu=False)),
        ]

        def truth() -> list[Tensor]:
            run, canonical = self.entrant(step_of(_score_by_formula), torch.float32 if self.dtype != torch.float32 else torch.float64)
            return canonical(run())

        products = Counter([(t, d, v), (t, d, v), (t, v, d)])
        entrants = [*scored, *others]
        return Race(op, self.case.shape, self.dtype, flops, nbytes, products, truth, entrants, "torch eager", MAX_ERROR)

    def entrant(self, step: Step, wider: torch.dtype | None = None) -> tuple[Run, Canonical]:
        """Outputs of the step and dh; wider: the same numbers, computed in another dtype."""
        head = head_problem(self.case, self.update, self.dtype)
        leaf, weight_vd = head.leaf(wider), head.weight_vd.to(wider or self.dtype)

        def run() -> list[Tensor]:
            *outputs, last = step(head, leaf, weight_vd)
            (dh,) = torch.autograd.grad(last, leaf)
            return [*(x.detach() for x in outputs), dh]

        return run, list


def _logprob_step(score: Score) -> Callable[..., list[Tensor]]:
    def step(head: Head, leaf: Tensor, weight_vd: Tensor) -> list[Tensor]:
        logp_t, entropy_t = score(leaf, weight_vd, head.targets_t)
        return [logp_t, entropy_t, (logp_t * head.batch.old_logp_nt.view(-1).cos()).sum()]

    return step


def _cross_entropy_step(score: Score) -> Callable[..., list[Tensor]]:
    def step(head: Head, leaf: Tensor, weight_vd: Tensor) -> list[Tensor]:
        loss = -score(leaf, weight_vd, head.targets_t)[0].mean()
        return [loss, loss]

    return step


def _grpo_loss(head: Head, logp_nt: Tensor, entropy_nt: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    steps = {"accumulation_steps": 1, "steps_per_generation": 1, "max_completion_length": logp_nt.shape[1]}
    return policy_loss(logp_nt, entropy_nt, head.batch, LossConfig(), entropy_coef=0.0, **steps)


def _grpo_step(score: Score) -> Callable[..., list[Tensor]]:
    def step(head: Head, leaf: Tensor, weight_vd: Tensor) -> list[Tensor]:
        shape_nt = head.batch.loss_mask_nt.shape
        loss, _ = _grpo_loss(head, *(x.view(shape_nt) for x in score(leaf, weight_vd, head.targets_t)))
        return [loss, loss]

    return step


def _one_pass_step(head: Head, leaf: Tensor, weight_vd: Tensor) -> list[Tensor]:
    """Ours where the loss is token-level: logits once instead of twice."""
    cells, nowhere = torch.arange(len(leaf), device=leaf.device), head.targets_t[:0]
    packed = PackedTokens(nowhere, nowhere, (0,), (), nowhere, head.targets_t, cells, tuple(head.batch.loss_mask_nt.shape))
    loss, _ = one_pass_loss(leaf, weight_vd, None, packed, TEMPERATURE, lambda logp, entropy: _grpo_loss(head, logp, entropy))
    return [loss, loss]


def _liger_cross_entropy(head: Head, leaf: Tensor, weight_vd: Tensor) -> list[Tensor]:
    """Liger has no temperature: the hidden states are divided by it."""
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    loss, *_ = LigerFusedLinearCrossEntropyFunction.apply(leaf / TEMPERATURE, weight_vd, head.targets_t)
    return [loss, loss]


def _cut_cross_entropy(head: Head, leaf: Tensor, weight_vd: Tensor) -> list[Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    loss = linear_cross_entropy(leaf / TEMPERATURE, weight_vd, head.targets_t)
    return [loss, loss]


def _liger_grpo(head: Head, leaf: Tensor, weight_vd: Tensor) -> list[Tensor]:
    """dapo with fastlora's defaults (and TRL's), a row of samples a chunk; its torch.compile on a GPU only."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    config, batch = LossConfig(), head.batch
    loss_of = LigerFusedLinearGRPOLoss(
        beta=0.0,
        use_ref_model=False,
        compiled=leaf.device.type == "cuda",
        epsilon_low=config.epsilon,
        epsilon_high=config.epsilon,
        loss_type="dapo",
        temperature=TEMPERATURE,
    )
    n, t = batch.loss_mask_nt.shape
    loss, _ = loss_of(
        leaf.view(n, t, -1),
        weight_vd,
        batch.completion_ids_nt,
        batch.loss_mask_nt,
        batch.advantages_nt.squeeze(1),
        old_per_token_logps=batch.old_logp_nt,
        num_items_in_batch=batch.num_items_in_batch,
    )
    return [loss, loss]
