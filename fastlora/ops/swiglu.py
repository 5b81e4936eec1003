"""swiglu: y = silu(gate) ∘ up, the gated activation of a Llama-like MLP (Shazeer 2020, arXiv 2002.05202, eq. 5).

    σ = 1 / (1 + e^−gate)        y = gate σ up
    d gate = dy up σ (1 + gate (1 − σ))        d up = dy gate σ

Nothing besides the inputs is kept. Computed in float32 (float64 for float64) and rounded once. On a GPU: Liger's kernels, where they are
installed (fastlora/liger.py). Bytes: forward reads two and writes one tensor, backward reads three and writes two. FLOPs: some 15 an entry
(the exponential), twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora import liger
from fastlora.ops.registry import Cost, Dispatch, OpSpec, call, cpp_refuses


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]


def _reference(gate: Tensor, up: Tensor) -> Tensor:
    """y like gate."""
    wide_gate, wide_up = _wide(gate, up)
    return (F.silu(wide_gate) * wide_up).to(gate.dtype)


_forward = Dispatch("swiglu", _reference)


@_forward.add("cpp", cpp_refuses)
def _cpp(gate: Tensor, up: Tensor) -> Tensor:
    return torch.ops.fastlora_cpu.swiglu_forward(gate.contiguous(), up.contiguous())


_forward.add("liger", liger.refuses)(liger.swiglu)

swiglu_op = _forward.torch_op()


@swiglu_op.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _reference_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(d gate, d up)."""
    d, g, u = _wide(dy, gate, up)
    s = torch.sigmoid(g)
    return (d * u * s * (1 + g * (1 - s))).to(gate.dtype), (d * g * s).to(gate.dtype)


_backward = Dispatch("swiglu_backward", _reference_backward)


@_backward.add("cpp", cpp_refuses)
def _cpp_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.fastlora_cpu.swiglu_backward(dy.contiguous(), gate.contiguous(), up.contiguous())


_backward.add("liger", liger.refuses)(liger.swiglu_backward)

swiglu_backward_op = _backward.torch_op()


@swiglu_backward_op.register_fake
def _(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    return swiglu_backward_op(dy, *ctx.saved_tensors)


swiglu_op.register_autograd(_autograd, setup_context=_setup_context)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """y of gate and up, all of one shape and floating dtype. Differentiable. Raises ValueError when shapes or dtypes disagree."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"swiglu: gate {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype} differ")
    return call(swiglu_op, _forward, gate, up)


def cost(gate: Tensor, up: Tensor) -> Cost:
    """Forward pass."""
    return Cost(15 * gate.numel(), 3 * gate.numel() * gate.element_size())


def backward_cost(dy: Tensor, gate: Tensor, up: Tensor) -> Cost:
    """Backward pass."""
    return Cost(20 * gate.numel(), 5 * gate.numel() * gate.element_size())


def sample_inputs(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Odd sizes; values from −6 to 6, and one beyond float32's exponential."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((0, 8), (1, 1), (63, 17), (2, 3, 32)):
        gate, up = (6 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
        gate.view(-1)[:1] = -200.0
        yield gate.to(device).requires_grad_(), up.to(device).requires_grad_()


def backward_sample_inputs(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Any, ...]]:
    """The forward samples with a gradient."""
    for gate, up in sample_inputs(dtype, device):
        yield gate.detach().cos(), gate.detach(), up.detach()


SPEC = OpSpec("swiglu", swiglu_op, sample_inputs, cost)
BACKWARD_SPEC = OpSpec("swiglu_backward", swiglu_backward_op, backward_sample_inputs, backward_cost)
