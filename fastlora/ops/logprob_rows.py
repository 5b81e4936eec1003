"""logprob_rows: what a policy loss needs of rows of logits, and the gradient of the logits in their place.

    log p_tv = z_tv / temperature − log_z_t        log_z_t = log Σ_v e^(z_tv / temperature)
    logp_t = log p at target_t        entropy_t = −Σ_v p_tv log p_tv                                 (nats)

Backward, overwriting z with dz:

    dz_tv = (dlogp_t (1[v = target_t] − p_tv) − dentropy_t p_tv (log p_tv + entropy_t)) / temperature

with 0 log 0 = 0: a logit of −inf (a token that is ruled out) adds nothing to the entropy and gets no gradient from it.
The tile z [t, v] is the only thing of that size; `linear_logprob` and `losses.one_pass` make it chunk by chunk. Computed in float32
(float64 for float64). Bytes: forward reads z, backward reads and writes it. FLOPs: some 20 an entry each (an exponential).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastlora.ops.registry import Cost, Dispatch, OpSpec, cpp_refuses, triton_refuses


def _scaled(z_tv: Tensor, temperature: float) -> Tensor:
    return z_tv.to(torch.promote_types(z_tv.dtype, torch.float32)) / temperature


def _target_column(targets_t: Tensor, v: int) -> tuple[Tensor, Tensor]:
    """(column [t, 1], inside the vocabulary; bool [t, 1]: is it the target's?). A GPU must not wait for a check of the targets."""
    column_t1 = targets_t[:, None]
    return column_t1.clamp(0, v - 1), (column_t1 >= 0) & (column_t1 < v)


def _reference(z_tv: Tensor, targets_t: Tensor, temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(logp_t, entropy_t or empty [0], log_z_t)."""
    scaled_tv = _scaled(z_tv, temperature)
    log_z_t = scaled_tv.logsumexp(-1)
    log_p_tv = scaled_tv - log_z_t[:, None]
    p_tv = log_p_tv.exp()
    entropy_t = -(p_tv * log_p_tv).masked_fill(p_tv == 0, 0.0).sum(-1) if with_entropy else log_z_t.new_empty(0)
    column_t1, present_t1 = _target_column(targets_t, z_tv.shape[1])
    logp_t = log_p_tv.gather(-1, column_t1).masked_fill(~present_t1, math.nan).squeeze(-1)
    return logp_t, entropy_t, log_z_t


_forward = Dispatch("logprob_rows", _reference)


@_forward.add("cpp", cpp_refuses)
def _cpp(z_tv: Tensor, targets_t: Tensor, temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.fastlora_cpu.logprob_rows_forward(z_tv.contiguous(), targets_t.contiguous(), temperature, with_entropy)


@_forward.add("triton", triton_refuses)
def _triton(z_tv: Tensor, targets_t: Tensor, temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    from fastlora_triton import logprob_rows as kernels

    return kernels.forward(z_tv.contiguous(), targets_t.contiguous(), temperature, with_entropy)


logprob_rows_op = _forward.torch_op()


@logprob_rows_op.register_fake
def _(z_tv: Tensor, targets_t: Tensor, temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    logp_t = z_tv.new_empty(z_tv.shape[0], dtype=torch.promote_types(z_tv.dtype, torch.float32))
    return logp_t, torch.empty_like(logp_t) if with_entropy else logp_t.new_empty(0), torch.empty_like(logp_t)


def _reference_backward(
    z_tv: Tensor, targets_t: Tensor, dlogp_t: Tensor, dentropy_t: Tensor | None, log_z_t: Tensor, entropy_t: Tensor, temperature: float
) -> None:
    """Overwrites z_tv with its gradient. dlogp_t, dentropy_t (None = 0), log_z_t, entropy_t: float32 [t]."""
    log_p_tv = _scaled(z_tv, temperature) - log_z_t[:, None]
    p_tv = log_p_tv.exp()
    column_t1, present_t1 = _target_column(targets_t, z_tv.shape[1])
    dz_tv = (-p_tv).scatter_add_(-1, column_t1, present_t1.to(p_tv.dtype)) * dlogp_t[:, None]
    if dentropy_t is not None:
        dz_tv -= (dentropy_t[:, None] * p_tv * (log_p_tv + entropy_t[:, None])).masked_fill_(p_tv == 0, 0.0)
    z_tv.copy_(dz_tv / temperature)


_backward = Dispatch("logprob_rows_backward", _reference_backward)


def _contiguous_only(refuses: Callable[..., str | None]) -> Callable[..., str | None]:
    """`refuses`, and contiguous logits only: they are overwritten."""

    def stricter(device: torch.device, *args: Any) -> str | None:
        if (reason := refuses(device, *args)) or not args:
            return reason
        return None if args[0].is_contiguous() else "it overwrites contiguous logits only"

    return stricter


@_backward.add("cpp", _contiguous_only(cpp_refuses))
def _cpp_backward(
    z_tv: Tensor, targets_t: Tensor, dlogp_t: Tensor, dentropy_t: Tensor | None, log_z_t: Tensor, entropy_t: Tensor, temperature: float
) -> None:
    dentropy_t = None if dentropy_t is None else dentropy_t.contiguous()
    torch.ops.fastlora_cpu.logprob_rows_backward_(
        z_tv, targets_t.contiguous(), dlogp_t.contiguous(), dentropy_t, log_z_t.contiguous(), entropy_t.contiguous(), temperature
    )


@_backward.add("triton", _contiguous_only(triton_refuses))
def _triton_backward(
    z_tv: Tensor, targets_t: Tensor, dlogp_t: Tensor, dentropy_t: Tensor | None, log_z_t: Tensor, entropy_t: Tensor, temperature: float
) -> None:
    from fastlora_triton import logprob_rows as kernels

    vectors = [None if x is None else x.contiguous() for x in (targets_t, dlogp_t, dentropy_t, log_z_t, entropy_t)]
    kernels.backward_(z_tv, *vectors, temperature)


logprob_rows_backward_op = _backward.torch_op(mutates_args=("z_tv",))


@logprob_rows_backward_op.register_fake
def _(z_tv, targets_t, dlogp_t, dentropy_t, log_z_t, entropy_t, temperature):  # type: ignore[no-untyped-def]
    torch._check(targets_t.shape == z_tv.shape[:1], lambda: "logprob_rows: one target for each row")


def logprob_rows(z_tv: Tensor, targets_t: Tensor, temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(logp_t, entropy_t, log_z_t), float32 [t], of logits z_tv [t, v]; entropy_t is empty [0] when not wanted. Not differentiable.

    targets_t: int64 [t] in [0, v); the C++ kernels raise RuntimeError on another, elsewhere its logp is NaN. The caller has checked
    shapes (ops.linear_logprob).
    """
    return _forward(z_tv, targets_t, temperature, with_entropy)


def logprob_rows_backward_(
    z_tv: Tensor, targets_t: Tensor, dlogp_t: Tensor, dentropy_t: Tensor | None, log_z_t: Tensor, entropy_t: Tensor, temperature: float
) -> None:
    """Overwrites the logits z_tv [t, v] with the gradient that dlogp_t and dentropy_t (None = 0) give them."""
    _backward(z_tv, targets_t, dlogp_t, dentropy_t, log_z_t, entropy_t, temperature)


def cost(z_tv: Tensor, targets_t: Tensor, temperature: float, with_entropy: bool) -> Cost:
    """Forward pass: the tile once."""
    return Cost(20 * z_tv.numel(), z_tv.numel() * z_tv.element_size() + 4 * 5 * len(z_tv))


def backward_cost(z_tv: Tensor, targets_t: Tensor, *rest: Any) -> Cost:
    """Backward pass: the tile read and written."""
    return Cost(20 * z_tv.numel(), 2 * z_tv.numel() * z_tv.element_size() + 4 * 6 * len(z_tv))


def sample_inputs(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Odd row counts and vocabularies; a sum over more than one block of 4,096; logits far apart."""
    generator = torch.Generator().manual_seed(0)
    for t, v, temperature, with_entropy, size in (
        (0, 5, 1.0, True, 1),
        (1, 1, 0.7, True, 1),
        (63, 97, 1.3, False, 30),
        (5, 9001, 0.9, True, 4),
    ):
        z_tv = (size * torch.randn(t, v, generator=generator, dtype=torch.float64)).to(dtype).to(device)
        yield z_tv, torch.randint(v, (t,), generator=generator).to(device), temperature, with_entropy


def backward_sample_inputs(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Any, ...]]:
    """The forward samples with gradients of logp and, where it was computed, of the entropy."""
    for z_tv, targets_t, temperature, with_entropy in sample_inputs(dtype, device):
        logp_t, entropy_t, log_z_t = logprob_rows_op(z_tv, targets_t, temperature, with_entropy)
        yield z_tv, targets_t, logp_t.cos(), entropy_t.sin() if with_entropy else None, log_z_t, entropy_t, temperature


SPEC = OpSpec("logprob_rows", logprob_rows_op, sample_inputs, cost)
BACKWARD_SPEC = OpSpec("logprob_rows_backward", logprob_rows_backward_op, backward_sample_inputs, backward_cost)
