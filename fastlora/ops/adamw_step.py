"""AdamW on the flat buffers, with the clip folded in and every matrix's gradient norm.

All trainable matrices live in one buffer [N]; gradient and both moments have the same layout, and a `Segment` says where each
matrix lies. With g the accumulated gradient, c the clip coefficient and k = 1, 2, ... the number of the step:

    g ← c g                         c = min(1, max_grad_norm / (‖(‖g_1‖, ..., ‖g_M‖)‖ + 1e-6))
    θ ← θ (1 − lr λ)                decoupled weight decay λ
    m ← m + (1 − β1)(g − m)
    v ← β2 v + (1 − β2) g²
    θ ← θ − lr / (1 − β1^k) · m / (√v / √(1 − β2^k) + ε)

Loshchilov & Hutter 2019 (arXiv 1711.05101), algorithm 2, in the form and rounding of `torch.optim.AdamW(fused=True)`. Where a
mask is False nothing happens: θ does not move, is not decayed, and m = v = 0.

The reference is bitwise what torch computes on separate tensors in PEFT's layout (B is [n,r] there, [r,n] here). It has to go
back to that layout for two reasons. A norm sums in memory order. And torch's vector loop (16 floats with AVX512, 8 with AVX2)
rounds unlike its scalar tail: the last numel mod 16 entries of each tensor differ by 1 ulp in θ and 2 in v after 10 steps if a
vector covers them (measured, torch 2.13, Zen 4), and which entries are the last depends on the layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from fastlora.ops.registry import NAMESPACE, Cost, Dispatch, OpSpec

ALIGNMENT = 16
"""Elements; layouts start their blocks (a group's A, a group's B, a weight of the model) at multiples of this: 64 bytes in fp32, a
cache line and an AVX512 vector. Matrices inside a block follow each other without gaps and may start anywhere."""

FLOPS_PER_ENTRY = 15
"""clip 1, decay 1, m 3, v 4, denominator 3 (root, divide, add), update 3."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Where one trainable matrix lies in the flat buffers. A module of rank 0 has none.

    Segments are listed in the order of PEFT's parameters (module by module, A then B): the total norm sums in that order.
    """

    name: str
    """Name of the parameter, for messages and for the table of norms."""
    offset: int
    """First element in the flat buffer."""
    shape: tuple[int, int]
    """As stored: A [r,d], B [r,n]."""
    transposed: bool
    """True when PEFT's tensor is the transpose of what is stored (B: [n,r] in PEFT)."""

    def __post_init__(self) -> None:
        if min(self.shape) < 1:
            raise ValueError(f"{self.name}: a segment of shape {self.shape} is empty; a module of rank 0 has no segments")
        if self.offset < 0:
            raise ValueError(f"{self.name}: offset {self.offset} is before the start of the buffer")

    @property
    def numel(self) -> int:
        """Entries of the matrix."""
        return self.shape[0] * self.shape[1]


def gradient_norms(grad: Tensor, segments: Sequence[Segment]) -> Tensor:
    """L2 norm of each matrix of a flat gradient [N]: norms_m, in the order of `segments`, in the gradient's dtype.

    Bitwise `torch.linalg.vector_norm` of PEFT's contiguous tensors. Entries that a mask freezes must hold 0 already (the
    backward leaves them so).
    """
    return gradient_norms_op(grad, *_columns(segments))


def total_norm(norms_m: Tensor) -> Tensor:
    """Norm [] of the whole gradient: the norm of the per-matrix norms, as `torch.nn.utils.get_total_norm`."""
    return torch.linalg.vector_norm(norms_m)


def clip_coefficient(norm: Tensor, max_grad_norm: float) -> Tensor:
    """Factor [] ≤ 1 that brings `norm` [] down to `max_grad_norm`, as `torch.nn.utils.clip_grad_norm_`."""
    return torch.clamp(max_grad_norm / (norm + 1e-6), max=1.0)


def adamw_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    mask: Tensor | None,
    segments: Sequence[Segment],
    *,
    clip_coef: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW step, in place on `param`, `exp_avg` and `exp_avg_sq`; `grad` is only read.

    All four buffers are [N] of one floating dtype; `mask` is bool [N] (True = trains) or None; `clip_coef` is [] in the same
    dtype; `step` counts from 1. What lies between segments is never touched. Not differentiable.
    """
    adamw_step_op(param, grad, exp_avg, exp_avg_sq, mask, clip_coef, *_columns(segments), step, lr, *betas, eps, weight_decay)


def _columns(segments: Sequence[Segment]) -> tuple[list[int], list[int], list[int], list[bool]]:
    """Segments as the op's arguments: offsets, rows, cols (as stored), transposed."""
    return (
        [s.offset for s in segments],
        [s.shape[0] for s in segments],
        [s.shape[1] for s in segments],
        [s.transposed for s in segments],
    )


def _in_peft_layout(buffer: Tensor, offset: int, rows: int, cols: int, transposed: bool) -> Tensor:
    """View of one matrix of a flat buffer in the shape PEFT gives it: not contiguous where it is stored transposed."""
    stored = buffer.narrow(0, offset, rows * cols).view(rows, cols)
    return stored.t() if transposed else stored


def _reference_norms(grad: Tensor, offsets: Sequence[int], rows: Sequence[int], cols: Sequence[int], transposed: Sequence[bool]) -> Tensor:
    """Matrix by matrix, contiguous in PEFT's layout."""
    norms = [
        torch.linalg.vector_norm(_in_peft_layout(grad, *place).contiguous()) for place in zip(offsets, rows, cols, transposed, strict=True)
    ]
    return torch.stack(norms) if norms else grad.new_empty(0)


_norms = Dispatch("gradient_norms", _reference_norms)


@torch.library.custom_op(f"{NAMESPACE}::gradient_norms", mutates_args=())
def gradient_norms_op(grad: Tensor, offsets: Sequence[int], rows: Sequence[int], cols: Sequence[int], transposed: Sequence[bool]) -> Tensor:
    """norms [segments]."""
    return _norms(grad, offsets, rows, cols, transposed)


@gradient_norms_op.register_fake
def _(grad: Tensor, offsets: Sequence[int], rows: Sequence[int], cols: Sequence[int], transposed: Sequence[bool]) -> Tensor:
    return grad.new_empty(len(offsets))


def _reference_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    mask: Tensor | None,
    clip_coef: Tensor,
    offsets: Sequence[int],
    rows: Sequence[int],
    cols: Sequence[int],
    transposed: Sequence[bool],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """torch's own fused AdamW on a contiguous copy of each matrix in PEFT's layout."""
    state = (param, exp_avg, exp_avg_sq)
    for place in zip(offsets, rows, cols, transposed, strict=True):
        views = [_in_peft_layout(buffer, *place) for buffer in state]
        new = [view.clone(memory_format=torch.contiguous_format) for view in views]
        new_param, new_avg, new_avg_sq = new
        clipped = _in_peft_layout(grad, *place).contiguous() * clip_coef
        trains = None if mask is None else _in_peft_layout(mask, *place)
        if trains is not None:
            clipped = torch.where(trains, clipped, 0.0).contiguous()
        adamw(
            [new_param],
            [clipped],
            [new_avg],
            [new_avg_sq],
            max_exp_avg_sqs=[],
            state_steps=[torch.tensor(step - 1, dtype=torch.float32, device=param.device)],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=weight_decay,
            eps=eps,
            maximize=False,
        )
        if trains is not None:  # a zero gradient keeps the moments at 0, but weight decay has moved the parameters
            new_param.copy_(torch.where(trains, new_param, views[0]))
        for view, tensor in zip(views, new, strict=True):
            view.copy_(tensor)


_step = Dispatch("adamw_step", _reference_step)


@torch.library.custom_op(f"{NAMESPACE}::adamw_step", mutates_args=("param", "exp_avg", "exp_avg_sq"))
def adamw_step_op(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    mask: Tensor | None,
    clip_coef: Tensor,
    offsets: Sequence[int],
    rows: Sequence[int],
    cols: Sequence[int],
    transposed: Sequence[bool],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One step, in place."""
    places = (offsets, rows, cols, transposed)
    _step(param, grad, exp_avg, exp_avg_sq, mask, clip_coef, *places, step, lr, beta1, beta2, eps, weight_decay)


@adamw_step_op.register_fake
def _(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *rest: Any) -> None:
    for name, buffer in (("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        torch._check(buffer.shape == param.shape, lambda name=name: f"adamw_step: {name} has not the shape of param")


def _sample_segments() -> tuple[Segment, ...]:
    """Uneven ranks in PEFT's order, while all A come first in the buffer; gaps between matrices; tails of every kind."""
    modules = [(3, 5, 7), (1, 16, 1), (17, 33, 19)]  # r, d, n
    names_shapes = [(f"{i}.A", (r, d)) for i, (r, d, _) in enumerate(modules)]
    names_shapes += [(f"{i}.B", (r, n)) for i, (r, _, n) in enumerate(modules)]
    offset, stored = 0, {}
    for name, shape in names_shapes:
        stored[name] = Segment(name, offset, shape, transposed=name.endswith("B"))
        offset = -(-(offset + stored[name].numel) // ALIGNMENT) * ALIGNMENT
    return tuple(stored[f"{i}.{part}"] for i in range(len(modules)) for part in "AB")


def _sample_buffers(dtype: torch.dtype, device: torch.device, count_: int) -> tuple[tuple[Segment, ...], list[Tensor]]:
    segments, generator = _sample_segments(), torch.Generator().manual_seed(0)
    length = max(s.offset + s.numel for s in segments)
    buffers = [torch.zeros(length, dtype=dtype, device=device) for _ in range(count_)]
    for buffer in buffers:
        for s in segments:
            buffer[s.offset : s.offset + s.numel] = torch.randn(s.numel, generator=generator, dtype=torch.float64).to(buffer)
    return segments, buffers


def sample_norm_inputs(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Arguments of `gradient_norms_op`: no matrix at all, then uneven ranks."""
    segments, (grad,) = _sample_buffers(dtype, device, 1)
    yield grad, *_columns(())
    yield grad, *_columns(segments)


def sample_step_inputs(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Arguments of `adamw_step_op`: no matrix at all, then uneven ranks without and with a mask."""
    segments, (param, grad, exp_avg, root) = _sample_buffers(dtype, device, 4)
    clip_coef = torch.tensor(0.5, dtype=dtype, device=device)
    mask = torch.arange(len(param), device=device) % 3 > 0
    for places, trains in (((), None), (segments, None), (segments, mask)):
        buffers = (param.clone(), grad, exp_avg.clone(), root.square())
        yield *buffers, trains, clip_coef, *_columns(places), 3, 1e-3, 0.9, 0.999, 1e-8, 0.1


def norm_cost(grad: Tensor, offsets: Sequence[int], rows: Sequence[int], cols: Sequence[int], transposed: Sequence[bool]) -> Cost:
    """Reads each gradient entry once; a multiply and an add each."""
    entries = _entries(rows, cols)
    return Cost(flops=2 * entries, bytes=(entries + len(offsets)) * grad.element_size())


def step_cost(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    mask: Tensor | None,
    clip_coef: Tensor,
    offsets: Sequence[int],
    rows: Sequence[int],
    cols: Sequence[int],
    *rest: Any,
) -> Cost:
    """Four reads and three writes an entry, and the mask; frozen entries count as bytes but not as work."""
    entries = _entries(rows, cols)
    trained = entries if mask is None else int(mask.sum())
    bytes_ = 7 * entries * param.element_size() + (0 if mask is None else entries)
    return Cost(flops=FLOPS_PER_ENTRY * trained, bytes=bytes_)


def _entries(rows: Sequence[int], cols: Sequence[int]) -> int:
    return sum(r * c for r, c in zip(rows, cols, strict=True))


SPECS = (
    OpSpec("gradient_norms", gradient_norms_op, sample_norm_inputs, norm_cost),
    OpSpec("adamw_step", adamw_step_op, sample_step_inputs, step_cost),
)
