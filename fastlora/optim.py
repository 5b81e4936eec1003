"""AdamW over the flat parameters, and the learning-rate schedule as a plain tuple of numbers.

The trainer asks `learning_rates` for the whole schedule once and passes one number to each `AdamW.step`, so a resumed run needs
an integer, not a scheduler's state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from fastlora.config import ConfigError, OptimConfig
from fastlora.errors import FastloraError
from fastlora.flat import FlatParameters
from fastlora.ops.adamw_step import adamw_step, clip_coefficient, gradient_norms, segment_table, total_norm


class NonFiniteError(FastloraError):
    """Too many consecutive steps had a NaN or infinite loss or gradient; the parameters are those of the last good step."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step did."""

    grad_norm: float
    """L2 norm of the whole accumulated gradient, before clipping; NaN or infinite when the gradient was."""
    norms_m: Tensor
    """float32, L2 norm of each segment's gradient, before clipping."""
    clipped: bool
    """The gradient was scaled down."""
    skipped: bool
    """Loss or gradient was not finite: parameters, moments and step count are as before."""


class AdamW:
    """AdamW with clipping by global norm; steps that are not finite change nothing and are counted.

    The reference is bitwise `accelerator.clip_grad_norm_` and `torch.optim.AdamW(fused=True)` on PEFT's tensors, as TRL runs them. The
    mask of `flat` is read once, here: moments exist for the entries that train only.
    """

    def __init__(self, flat: FlatParameters, config: OptimConfig) -> None:
        self.flat = flat
        self.config = config
        self.index_k = flat.trainable_index()
        """int32 [k], where in the buffer the entries are that train; None = every entry of every segment."""
        self.exp_avg = flat.data.new_zeros(len(flat.data) if self.index_k is None else len(self.index_k))
        """[k], or [N] without an index; `exp_avg_sq` alike."""
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)
        self._table_m6 = segment_table(flat.segments, self.index_k)
        self.steps_done = 0
        """Steps that moved the parameters: the k of AdamW's bias corrections."""
        self.steps_skipped = 0
        """Steps skipped in the whole run."""
        self.consecutive_skips = 0
        """Steps skipped since the last good one."""

    @torch.no_grad()
    def step(self, lr: float, *, loss_finite: bool = True) -> StepResult:
        """Clip `flat.grad` and move `flat.data`; the caller zeroes the gradient afterwards.

        A skipped step does not advance AdamW's own count, but the caller's position in the schedule moves on all the same: the
        schedule follows attempted steps, so that it ends where the run ends. Raises NonFiniteError at the
        `max_nonfinite_steps`-th skip in a row.
        """
        norms_m = gradient_norms(self.flat.grad, self._table_m6, self.index_k)
        norm = total_norm(norms_m)
        grad_norm = float(norm)
        if not (loss_finite and math.isfinite(grad_norm)):
            self._skip(norms_m, loss_finite)
            return StepResult(grad_norm, norms_m, clipped=False, skipped=True)
        clip_coef = clip_coefficient(norm, self.config.max_grad_norm)
        self.steps_done += 1
        self.consecutive_skips = 0
        adamw_step(
            self.flat.data,
            self.flat.grad,
            self.exp_avg,
            self.exp_avg_sq,
            self._table_m6,
            self.index_k,
            clip_coef=clip_coef,
            step=self.steps_done,
            lr=lr,
            betas=self.config.betas,
            eps=self.config.eps,
            weight_decay=self.config.weight_decay,
        )
        return StepResult(grad_norm, norms_m, clipped=float(clip_coef) < 1.0, skipped=False)

    def _skip(self, norms_m: Tensor, loss_finite: bool) -> None:
        self.steps_skipped += 1
        self.consecutive_skips += 1
        if self.consecutive_skips < self.config.max_nonfinite_steps:
            return
        finite_m = torch.isfinite(norms_m).tolist()
        names = [s.name for s, finite in zip(self.flat.segments, finite_m, strict=True) if not finite]
        raise NonFiniteError(
            f"{self.consecutive_skips} optimizer steps in a row were not finite (optim.max_nonfinite_steps = "
            f"{self.config.max_nonfinite_steps}); last one: loss {'finite' if loss_finite else 'NaN or infinite'}, "
            f"{_describe(names, len(finite_m))}. The parameters are those of the last good step, {self.steps_done}. "
            "Lower optim.lr, train in float32, or look at the data of these steps"
        )

    def state_dict(self) -> dict[str, Tensor | int]:
        """Both moments, under a mask the index that they go by (the tensors themselves, not copies), and the three counts."""
        index = {} if self.index_k is None else {"index_k": self.index_k}
        return {
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
            **index,
            "steps_done": self.steps_done,
            "steps_skipped": self.steps_skipped,
            "consecutive_skips": self.consecutive_skips,
        }

    def load_state_dict(self, state: Mapping[str, Tensor | int]) -> None:
        """Take over a state that `state_dict` gave; raises ValueError, before anything is copied, when it is not one of this layout."""
        own_tensors = {name: value for name, value in self.state_dict().items() if isinstance(value, Tensor)}
        if different := sorted(self.state_dict().keys() ^ state.keys()):
            raise ValueError(f"optimizer state: these entries are missing or unknown: {', '.join(different)}")
        for name, own in own_tensors.items():
            saved = torch.as_tensor(state[name])
            if (saved.shape, saved.dtype) != (own.shape, own.dtype):
                raise ValueError(
                    f"optimizer state: {name} is {saved.dtype} {tuple(saved.shape)}, the adapter's layout needs {own.dtype} "
                    f"{tuple(own.shape)}: the state belongs to another adapter"
                )
        if self.index_k is not None and not torch.equal(torch.as_tensor(state["index_k"]).to(self.index_k.device), self.index_k):
            raise ValueError("optimizer state: index_k holds other positions: the state was made under another mask on B")
        for name in ("exp_avg", "exp_avg_sq"):
            own_tensors[name].copy_(torch.as_tensor(state[name]))
        self.steps_done = int(state["steps_done"])
        self.steps_skipped = int(state["steps_skipped"])
        self.consecutive_skips = int(state["consecutive_skips"])


def _describe(names: list[str], total: int) -> str:
    """The segments whose gradient is not finite, in words; the first eight by name."""
    if not names:
        return "gradient of each segment finite"
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"gradient NaN or infinite in {len(names)} of {total} segments: {', '.join(names[:8])}{more}"


def learning_rates(config: OptimConfig, total_steps: int) -> tuple[float, ...]:
    """Learning rate of each of a run's `total_steps` optimizer steps: transformers' own schedule, as TRL's trainer uses it.

    Needs no model, so that a schedule that cannot work is refused (ConfigError) before one is loaded.
    """
    if config.warmup_steps >= total_steps:
        raise ConfigError(
            f"optim.warmup_steps = {config.warmup_steps} leaves nothing of the run's {total_steps} optimizer steps: "
            "the peak learning rate would never be reached. Use fewer warm-up steps or more trainer.steps"
        )
    if config.schedule == "constant" and config.warmup_steps:
        raise ConfigError(
            f"optim.schedule = 'constant' has no warm-up, but optim.warmup_steps = {config.warmup_steps}: "
            "use 'constant_with_warmup', or warmup_steps = 0"
        )
    # The library's factories only hand out schedulers, so they get an optimizer of one number, and we keep their function of
    # the step: LambdaLR's learning rate is base_lr * function(step), with no state in between.
    dummy = torch.optim.SGD([torch.zeros(1)], lr=config.lr)
    scheduler = get_scheduler(config.schedule, dummy, num_warmup_steps=config.warmup_steps, num_training_steps=total_steps)
    assert isinstance(scheduler, LambdaLR)
    (factor,) = scheduler.lr_lambdas
    return tuple(config.lr * factor(step) for step in range(total_steps))
