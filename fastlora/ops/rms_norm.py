"""rms_norm: root-mean-square normalisation of rows with a gain (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4).

    r_t = 1 / √(mean_d x_td² + ε)        y_td = x_td r_t w_d

Backward, with g_td = w_d dy_td:

    dx_td = r_t (g_td − x_td r_t² mean_d(g_td x_td))        dw_d = Σ_t dy_td x_td r_t

Statistics in float32 (float64 for float64), one rounding at the end; Hugging Face's modules round x r to the dtype of x before the gain.
On a GPU: Liger's kernels, where they are installed (fastlora/liger.py). Bytes: forward reads x and writes y; backward reads dy and x and
writes dx. FLOPs: some 4 an entry forward, 8 backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastlora import liger
from fastlora.ops.registry import Cost, Dispatch, OpSpec, call, cpp_refuses


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _reference(x: Tensor, weight_d: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y like x, r [rows] in float32), r kept for the backward pass."""
    wide = x.to(_accumulation_dtype(x))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd * weight_d.to(wide.dtype)).to(x.dtype), rstd.reshape(-1)


_forward = Dispatch("rms_norm", _reference)


@_forward.add("cpp", cpp_refuses)
def _cpp(x: Tensor, weight_d: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.ops.fastlora_cpu.rms_norm_forward(x.contiguous(), weight_d.contiguous(), eps)


_forward.add("liger", liger.refuses)(liger.rms_norm)

rms_norm_op = _forward.torch_op()


@rms_norm_op.register_fake
def _(x: Tensor, weight_d: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.numel() // max(1, x.shape[-1]), dtype=_accumulation_dtype(x))


def _reference_backward(dy: Tensor, x: Tensor, weight_d: Tensor, rstd_t: Tensor, need_dw: bool) -> tuple[Tensor, Tensor]:
    """(dx like x, dw [d]; empty [0] when not needed)."""
    wide, g, rstd = x.to(rstd_t.dtype), dy.to(rstd_t.dtype), rstd_t.view(*x.shape[:-1], 1)
    gw = g * weight_d.to(rstd_t.dtype)
    dx = rstd * (gw - wide * rstd.square() * (gw * wide).mean(-1, keepdim=True))
    dw = (g * wide * rstd).reshape(-1, x.shape[-1]).sum(0).to(weight_d.dtype) if need_dw else weight_d.new_empty(0)
    return dx.to(x.dtype), dw


_backward = Dispatch("rms_norm_backward", _reference_backward)


@_backward.add("cpp", cpp_refuses)
def _cpp_backward(dy: Tensor, x: Tensor, weight_d: Tensor, rstd_t: Tensor, need_dw: bool) -> tuple[Tensor, Tensor]:
    tensors = (dy.contiguous(), x.contiguous(), weight_d.contiguous(), rstd_t.contiguous())
    dx, partial_bd = torch.ops.fastlora_cpu.rms_norm_backward(*tensors, need_dw)
    return dx, partial_bd.sum(0).to(weight_d.dtype) if need_dw else weight_d.new_empty(0)


_backward.add("liger", liger.refuses)(liger.rms_norm_backward)

rms_norm_backward_op = _backward.torch_op()


@rms_norm_backward_op.register_fake
def _(dy: Tensor, x: Tensor, weight_d: Tensor, rstd_t: Tensor, need_dw: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight_d.new_empty(weight_d.shape if need_dw else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight_d, _ = inputs
    ctx.save_for_backward(x, weight_d, output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor | None, None]:
    need_dw = ctx.needs_input_grad[1]
    dx, dw = rms_norm_backward_op(dy, *ctx.saved_tensors, need_dw)
    return dx, dw if need_dw else None, None


rms_norm_op.register_autograd(_autograd, setup_context=_setup_context)


def rms_norm(x: Tensor, weight_d: Tensor, eps: float) -> Tensor:
    """y [*, d] of x [*, d] and the gain weight_d [d], both of one floating dtype. Differentiable in both.

    Raises ValueError when the widths or dtypes disagree.
    """
    if weight_d.shape != x.shape[-1:] or weight_d.dtype != x.dtype:
        raise ValueError(f"rms_norm: weight {tuple(weight_d.shape)} {weight_d.dtype} does not fit x {tuple(x.shape)} {x.dtype}")
    return call(rms_norm_op, _forward, x, weight_d, eps)[0]


def cost(x: Tensor, weight_d: Tensor, eps: float) -> Cost:
    """Forward pass: x and the gain read, y and r written."""
    return Cost(4 * x.numel(), (2 * x.numel() + weight_d.numel()) * x.element_size() + 4 * x.numel() // max(1, x.shape[-1]))


def backward_cost(dy: Tensor, x: Tensor, weight_d: Tensor, rstd_t: Tensor, need_dw: bool) -> Cost:
    """Backward pass: dy, x, gain and r read, dx (and dw) written."""
    weights = weight_d.numel() * (2 if need_dw else 1)
    return Cost((10 if need_dw else 8) * x.numel(), (3 * x.numel() + weights) * x.element_size() + rstd_t.numel() * rstd_t.element_size())


def sample_inputs(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Odd row counts and widths; a trained gain; three dimensions."""
    generator = torch.Generator().manual_seed(0)
    for shape, train_gain in (((0, 16), False), ((1, 7), True), ((63, 40), True), ((2, 5, 64), False), ((130, 33), True)):
        x, weight_d = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).to(device) for s in (shape, shape[-1:]))
        yield x.requires_grad_(), weight_d.requires_grad_(train_gain), 1e-5


def backward_sample_inputs(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Any, ...]]:
    """The forward samples with a gradient, with and without dw."""
    for x, weight_d, eps in sample_inputs(dtype, device):
        y, rstd_t = rms_norm_op(x.detach(), weight_d.detach(), eps)
        yield y.cos(), x.detach(), weight_d.detach(), rstd_t, weight_d.requires_grad


SPEC = OpSpec("rms_norm", rms_norm_op, sample_inputs, cost)
BACKWARD_SPEC = OpSpec("rms_norm_backward", rms_norm_backward_op, backward_sample_inputs, backward_cost)
