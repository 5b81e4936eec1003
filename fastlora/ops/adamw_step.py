"""AdamW on the flat buffers, with the clip folded in and every matrix's gradient norm.

All trainable matrices live in one buffer [N], gradient alike, and a `Segment` says where each matrix lies. Where everything trains the
two moments have that layout too. Where a mask freezes entries the moments hold the k others only, in the order of the buffer, and
`index_k` says where in the buffer each of them is: memory and time follow k. With g the accumulated gradient, c the clip coefficient
and t = 1, 2, ... the number of the step, for every entry that trains:

    g ← c g                         c = min(1, max_grad_norm / (‖(‖g_1‖, ..., ‖g_M‖)‖ + 1e-6))
    θ ← θ (1 − lr λ)                decoupled weight decay λ
    m ← m + (1 − β1)(g − m)
    v ← β2 v + (1 − β2) g²
    θ ← θ − lr / (1 − β1^t) · m / (√v / √(1 − β2^t) + ε)

Loshchilov & Hutter 2019 (arXiv 1711.05101), algorithm 2, in the form of `torch.optim.AdamW(fused=True)`. What is frozen does not move,
nor is it decayed or read.

The reference is bitwise what torch computes on separate tensors in PEFT's layout (B is [n,r] there, [r,n] here). It has to go
back to that layout for two reasons. A norm sums in memory order. And torch's vector loop (16 floats with AVX512, 8 with AVX2)
rounds unlike its scalar tail: the last numel mod 16 entries of each tensor differ by 1 ulp in θ and 2 in v after 10 steps if a
vector covers them (measured, torch 2.13, Zen 4), and which entries are the last depends on the layout.

The C++ kernels make one pass over the entries where they are. They sum squares in double, and round θ once, so that they are
nearer to the formula than torch is; in bits they differ from it. The CUDA kernels (csrc/cuda/adamw_step.cuh) are for an index only;
Triton's also take whole buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from fastlora.ops.registry import Cost, Dispatch, OpSpec, call, cpp_refuses, cuda_refuses, triton_refuses

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


def segment_table(segments: Sequence[Segment], index_k: Tensor | None) -> Tensor:
    """table_m6, int64 [M, 6] on the CPU, the segments as the ops take them: offset, rows, cols (as stored), transposed (0, 1), begin, end.

    [begin, end) counts entries of the moments: a segment's own place in the buffer, or its range in index_k (see `adamw_step`).
    """
    offsets = torch.tensor([s.offset for s in segments], dtype=torch.int64)
    numels = torch.tensor([s.numel for s in segments], dtype=torch.int64)
    ranges = torch.stack([offsets, offsets + numels], 1)
    if index_k is not None:
        ranges = torch.searchsorted(index_k.cpu().long(), ranges)
    places = [[s.offset, *s.shape, int(s.transposed)] for s in segments]
    return torch.cat([torch.tensor(places, dtype=torch.int64).view(-1, 4), ranges], 1)


def gradient_norms(grad: Tensor, table_m6: Tensor, index_k: Tensor | None) -> Tensor:
    """L2 norm of each matrix of a flat gradient [N]: norms_m [M], in the order of the table, in the gradient's dtype.

    table_m6, index_k: see `adamw_step`; entries that index_k leaves out count as 0, whatever they hold. The reference is bitwise
    `torch.linalg.vector_norm` of PEFT's contiguous tensors. Raises RuntimeError when the table leads outside of the buffer.
    """
    return call(gradient_norms_op, _norms, grad, table_m6, index_k)


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
    table_m6: Tensor,
    index_k: Tensor | None,
    *,
    clip_coef: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW step, in place on `param`, `exp_avg` and `exp_avg_sq`; `grad` is only read.

    param and grad are [N] of one floating dtype. index_k is int32 [k], ascending: where in the buffer the entries are that train, all
    of them in segments; None = all of all segments. exp_avg and exp_avg_sq are [k], or [N] without an index. table_m6 is
    `segment_table` of the same index. clip_coef is [] in the same dtype; `step` counts from 1. Nothing else is touched, nor are
    the gaps between segments. Not differentiable. Raises RuntimeError when a buffer has another size, or the table leads outside.
    """
    _check_sizes(param, grad, exp_avg, exp_avg_sq, index_k)
    call(adamw_step_op, _step, param, grad, exp_avg, exp_avg_sq, clip_coef, table_m6, index_k, step, lr, *betas, eps, weight_decay)


def _check_sizes(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, index_k: Tensor | None) -> None:
    entries = param.shape if index_k is None else index_k.shape
    for name, buffer, shape in (("grad", grad, param.shape), ("exp_avg", exp_avg, entries), ("exp_avg_sq", exp_avg_sq, entries)):
        torch._check(buffer.shape == shape, lambda n=name, b=buffer, s=shape: f"adamw_step: {n} is {list(b.shape)}, it needs {list(s)}")


@dataclass(frozen=True, slots=True)
class _Place:
    """One row of the table, resolved: which elements of param and grad, and which entries of the moments, belong to a matrix."""

    rows: int
    cols: int
    transposed: bool
    elements: slice | Tensor
    """Of the buffer: all of the matrix, or the positions that train."""
    entries: slice
    """Of the moments."""
    within: Tensor | None
    """Positions inside the matrix that train; None = all."""

    def spread(self, values: Tensor) -> Tensor:
        """The matrix, contiguous in PEFT's layout, from the values of its trained entries; 0 at the frozen ones. It may be a view."""
        if self.within is not None:
            values = values.new_zeros(self.rows * self.cols).index_copy(0, self.within, values)
        stored = values.view(self.rows, self.cols)
        return (stored.t() if self.transposed else stored).contiguous()

    def collect(self, matrix: Tensor) -> Tensor:
        """The inverse: values of the trained entries of a matrix in PEFT's layout, in the order of the buffer."""
        values = (matrix.t() if self.transposed else matrix).reshape(-1)
        return values if self.within is None else values[self.within]


def _places(buffer: Tensor, table_m6: Tensor, index_k: Tensor | None) -> Iterator[_Place]:
    """The rows of the table, in order. Raises RuntimeError when one leads outside of the buffer."""
    for offset, rows, cols, transposed, begin, end in table_m6.tolist():
        buffer.narrow(0, offset, rows * cols)  # a slice would be cut short without a word
        if index_k is None:
            yield _Place(rows, cols, bool(transposed), slice(offset, offset + rows * cols), slice(begin, end), None)
        else:
            positions = index_k[begin:end].long()
            yield _Place(rows, cols, bool(transposed), positions, slice(begin, end), positions - offset)


def _reference_norms(grad: Tensor, table_m6: Tensor, index_k: Tensor | None) -> Tensor:
    """Matrix by matrix, contiguous in PEFT's layout."""
    norms = [torch.linalg.vector_norm(place.spread(grad[place.elements])) for place in _places(grad, table_m6, index_k)]
    return torch.stack(norms) if norms else grad.new_empty(0)


def _float32_only(refuses: Callable[..., str | None]) -> Callable[..., str | None]:
    """`refuses`, and float32 only: master weights and moments are never bfloat16."""

    def stricter(device: torch.device, *args: Any) -> str | None:
        if reason := refuses(device, *args):
            return reason
        return "it takes float32 only" if args and args[0].dtype != torch.float32 else None

    return stricter


_cpp_refuses, _triton_refuses = _float32_only(cpp_refuses), _float32_only(triton_refuses)


def _cuda_refuses(table_at: int) -> Callable[..., str | None]:
    """float32 and an index only; table_m6 and index_k are arguments number table_at and the next."""

    def refuses(device: torch.device, *args: Any) -> str | None:
        if (reason := _float32_only(cuda_refuses)(device, *args)) or not args:
            return reason
        table_m6, index_k = args[table_at : table_at + 2]
        if index_k is None:
            return "it takes the k entries of an index, not whole buffers"
        entries = int((table_m6[:, 5] - table_m6[:, 4]).sum())
        return None if entries == len(index_k) else f"{len(index_k) - entries} entries of the index lie in no segment"

    return refuses


_norms = Dispatch("gradient_norms", _reference_norms)


@_norms.add("cpp", _cpp_refuses)
def _cpp_norms(grad: Tensor, table_m6: Tensor, index_k: Tensor | None) -> Tensor:
    return torch.ops.fastlora_cpu.gradient_norms(grad, table_m6, index_k)


@_norms.add("triton", _triton_refuses)
def _triton_norms(grad: Tensor, table_m6: Tensor, index_k: Tensor | None) -> Tensor:
    from fastlora_triton import adamw_step as kernels

    return kernels.gradient_norms(grad, table_m6, index_k)


@_norms.add("cuda", _cuda_refuses(1))
def _cuda_norms(grad: Tensor, table_m6: Tensor, index_k: Tensor) -> Tensor:
    ranges = tuple(map(tuple, table_m6[:, 4:].tolist()))
    most_entries = max((end - begin for begin, end in ranges), default=0)
    return torch.ops.fastlora_cuda.gradient_norms(grad, index_k, _on_device(ranges, grad.device), most_entries)


@lru_cache(maxsize=8)
def _on_device(ranges: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """int64 [M, 2], copied once: a step can then be captured as a graph."""
    return torch.tensor(ranges, dtype=torch.int64, device=device).reshape(-1, 2)


gradient_norms_op = _norms.torch_op()


@gradient_norms_op.register_fake
def _(grad: Tensor, table_m6: Tensor, index_k: Tensor | None) -> Tensor:
    return grad.new_empty(table_m6.shape[0])


def _reference_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    clip_coef: Tensor,
    table_m6: Tensor,
    index_k: Tensor | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """torch's own fused AdamW on each matrix, contiguous in PEFT's layout."""
    for place in _places(param, table_m6, index_k):
        targets = ((param, place.elements), (exp_avg, place.entries), (exp_avg_sq, place.entries))
        new = [place.spread(buffer[where]) for buffer, where in targets]
        adamw(
            [new[0]],
            [place.spread(grad[place.elements]) * clip_coef],
            [new[1]],
            [new[2]],
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
        for (buffer, where), matrix in zip(targets, new, strict=True):
            buffer[where] = place.collect(matrix)


_step = Dispatch("adamw_step", _reference_step)


@_step.add("cpp", _cpp_refuses)
def _cpp_step(*args: Any) -> None:
    torch.ops.fastlora_cpu.adamw_step(*args)


@_step.add("triton", _triton_refuses)
def _triton_step(*args: Any) -> None:
    from fastlora_triton import adamw_step as kernels

    kernels.adamw_step(*args)


@_step.add("cuda", _cuda_refuses(5))
def _cuda_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    clip_coef: Tensor,
    table_m6: Tensor,
    index_k: Tensor,
    *numbers: Any,
) -> None:
    torch.ops.fastlora_cuda.adamw_step(param, grad, exp_avg, exp_avg_sq, clip_coef, index_k, *numbers)


adamw_step_op = _step.torch_op(mutates_args=("param", "exp_avg", "exp_avg_sq"))


@adamw_step_op.register_fake
def _(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    clip_coef: Tensor,
    table_m6: Tensor,
    index_k: Tensor | None,
    *rest: Any,
) -> None:
    _check_sizes(param, grad, exp_avg, exp_avg_sq, index_k)


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


def _sample_index(param: Tensor, segments: Sequence[Segment]) -> Tensor:
    """Two entries in three train, in runs of two."""
    positions = torch.cat([torch.arange(s.offset, s.offset + s.numel) for s in segments]).sort().values
    return positions[positions % 3 > 0].to(param.device, torch.int32)


def sample_norm_inputs(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Arguments of `gradient_norms_op`: no matrix at all, then uneven ranks without and with an index."""
    segments, (grad,) = _sample_buffers(dtype, device, 1)
    for places, index_k in (((), None), (segments, None), (segments, _sample_index(grad, segments))):
        yield grad, segment_table(places, index_k), index_k


def sample_step_inputs(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Arguments of `adamw_step_op`: no matrix at all, then uneven ranks without and with an index."""
    segments, (param, grad, exp_avg, root) = _sample_buffers(dtype, device, 4)
    clip_coef = torch.tensor(0.5, dtype=dtype, device=device)
    for places, index_k in (((), None), (segments, None), (segments, _sample_index(param, segments))):
        moments = [m.clone() if index_k is None else m[index_k.long()] for m in (exp_avg, root.square())]
        yield param.clone(), grad, *moments, clip_coef, segment_table(places, index_k), index_k, 3, 1e-3, 0.9, 0.999, 1e-8, 0.1


def _entries_and_index_bytes(table_m6: Tensor, index_k: Tensor | None) -> tuple[int, int]:
    """Entries that train, and the bytes that their index takes."""
    entries = int((table_m6[:, 5] - table_m6[:, 4]).sum())
    return entries, 0 if index_k is None else entries * index_k.element_size()


def norm_cost(grad: Tensor, table_m6: Tensor, index_k: Tensor | None) -> Cost:
    """Reads each trained entry of the gradient (and of the index) once; a multiply and an add each."""
    entries, index_bytes = _entries_and_index_bytes(table_m6, index_k)
    return Cost(flops=2 * entries, bytes=(entries + len(table_m6)) * grad.element_size() + index_bytes)


def step_cost(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    clip_coef: Tensor,
    table_m6: Tensor,
    index_k: Tensor | None,
    *rest: Any,
) -> Cost:
    """Four reads and three writes for each entry that trains, and its index; frozen entries cost nothing."""
    entries, index_bytes = _entries_and_index_bytes(table_m6, index_k)
    return Cost(flops=FLOPS_PER_ENTRY * entries, bytes=7 * entries * param.element_size() + index_bytes)


SPECS = (
    OpSpec("gradient_norms", gradient_norms_op, sample_norm_inputs, norm_cost),
    OpSpec("adamw_step", adamw_step_op, sample_step_inputs, step_cost),
)
