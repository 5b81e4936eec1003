"""The race of one AdamW step on all A and B, float32: ours on the flat buffers, torch's and bitsandbytes' on PEFT's separate tensors.

Canonical: the change of the parameters, in the order of the segments. From zero moments the first step is −lr g / (|g| + ε).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu_race import Canonical, Entrant, Race, Run, needs, ours
from bench.op_cases import Update, adapter_segments
from fastlora.config import OptimConfig
from fastlora.ops import adamw_step
from fastlora.ops.adamw_step import Segment

LEARNING_RATE = 1e-2
"""Large: the change of a parameter is what the gate sees."""
MAX_ERROR = 0.02
"""Of the change; 8-bit moments have a per cent."""
OPTIONS = {"lr": LEARNING_RATE, "betas": OptimConfig().betas, "eps": OptimConfig().eps, "weight_decay": 0.0}


def optimizer_race(update: Update) -> Race:
    """At the sizes of an update's adapter."""
    segments = adapter_segments(update.model, update.rank)
    size = segments[-1].offset + segments[-1].numel
    bits = needs("bitsandbytes", "bitsandbytes")
    entrants = [
        *ours("adamw_step", lambda: _flat(segments, size)),
        Entrant("torch foreach", lambda: _tensors(segments, size, lambda tensors: torch.optim.AdamW(tensors, foreach=True, **OPTIONS))),
        Entrant("torch fused", lambda: _tensors(segments, size, lambda tensors: torch.optim.AdamW(tensors, fused=True, **OPTIONS))),
        Entrant("bitsandbytes 32 bit", lambda: _tensors(segments, size, _of_bitsandbytes("AdamW")), bits),
        Entrant("bitsandbytes 8 bit", lambda: _tensors(segments, size, _of_bitsandbytes("AdamW8bit")), bits),
    ]

    def truth() -> list[Tensor]:
        grad = _buffers(size)[1].double()
        return [-LEARNING_RATE * grad / (grad.abs() + OptimConfig().eps)]

    words = f"{size:,} entries in {len(segments)} matrices"
    work = (adamw_step.FLOPS_PER_ENTRY * size, 7 * size * 4)
    return Race("adamw_tensors", words, torch.float32, *work, Counter(), truth, entrants, "torch fused", MAX_ERROR)


def _buffers(size: int) -> tuple[Tensor, Tensor]:
    """(param, grad) [N]."""
    wave = torch.arange(size, dtype=torch.float32)
    return wave.sin(), (1.7 * wave).cos()


def _flat(segments: Sequence[Segment], size: int) -> tuple[Run, Canonical]:
    """Ours: one launch over the buffers."""
    param, grad = _buffers(size)
    with torch.device("cpu"):
        table = adamw_step.segment_table(segments, None)
    before, moments, clip = param.clone(), [torch.zeros_like(param) for _ in range(2)], torch.tensor(1.0)

    def run() -> Tensor:
        adamw_step.adamw_step(param, grad, *moments, table, None, clip_coef=clip, step=1, **OPTIONS)
        return param

    return run, lambda moved: [moved - before]


def _tensors(segments: Sequence[Segment], size: int, make: Callable[[list[nn.Parameter]], Any]) -> tuple[Run, Canonical]:
    """An optimizer on a tensor for each matrix."""
    param, grad = _buffers(size)
    tensors = [nn.Parameter(param[s.offset :][: s.numel].view(s.shape).clone()) for s in segments]
    for s, tensor in zip(segments, tensors, strict=True):
        tensor.grad = grad[s.offset :][: s.numel].view(s.shape).clone()
    optimizer = make(tensors)

    def run() -> list[nn.Parameter]:
        optimizer.step()
        return tensors

    return run, lambda moved: [torch.cat([tensor.detach().reshape(-1) for tensor in moved]) - param]


def _of_bitsandbytes(name: str) -> Callable[[list[nn.Parameter]], Any]:
    def make(tensors: list[nn.Parameter]) -> Any:
        import bitsandbytes

        return getattr(bitsandbytes.optim, name)(tensors, **OPTIONS)

    return make
