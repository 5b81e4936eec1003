"""sample_rows: a token from each row of logits by inverse transform sampling, and its log-probability.

    p_tv = softmax(z_tv / temperature)        token_t = min {v : Σ_{w ≤ v} p_tw > u_t}        logp_t = log p_t,token_t

with u_t uniform in [0, 1) given by the caller. The sums run in float64 (C++: float32 within blocks of 1,024 tokens, float64 over them), so
that a token's chance is right to some 1e-6 of itself. FLOPs: some 40 an entry (two exponentials); bytes: the logits, from cache the second
time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastlora.ops.registry import Cost, Dispatch, OpSpec, cpp_refuses


def _reference(z_tv: Tensor, uniforms_t: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(tokens int64 [t], logp [t])."""
    logp_tv = torch.log_softmax(z_tv.to(torch.promote_types(z_tv.dtype, torch.float32)) / temperature, dim=-1)
    tokens_t1 = inverse_transform(logp_tv, uniforms_t)
    return tokens_t1.squeeze(1), logp_tv.gather(1, tokens_t1).squeeze(1)


def inverse_transform(logp_tv: Tensor, uniforms_t: Tensor) -> Tensor:
    """int64 [t, 1], the first column of each row whose cumulative probability exceeds the uniform number."""
    cumulative_tv = logp_tv.double().exp().cumsum(-1)
    index = torch.searchsorted(cumulative_tv, uniforms_t[:, None] * cumulative_tv[:, -1:], right=True)
    return index.clamp(max=logp_tv.shape[1] - 1)


_sample = Dispatch("sample_rows", _reference)


def _cpp_refuses_rows(device: torch.device, *args: Any) -> str | None:
    return cpp_refuses(device, *args[:1])  # the uniform numbers are float64


@_sample.add("cpp", _cpp_refuses_rows)
def _cpp(z_tv: Tensor, uniforms_t: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return torch.ops.fastlora_cpu.sample_rows(z_tv.contiguous(), uniforms_t.contiguous(), temperature)


sample_rows_op = _sample.torch_op()


@sample_rows_op.register_fake
def _(z_tv: Tensor, uniforms_t: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logp_t = z_tv.new_empty(len(z_tv), dtype=torch.promote_types(z_tv.dtype, torch.float32))
    return torch.empty_like(logp_t, dtype=torch.long), logp_t


def sample_rows(z_tv: Tensor, uniforms_t: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(tokens int64 [t], their log-probabilities float32 [t]) from logits [t, v] and uniform numbers float64 [t] in [0, 1).

    Not differentiable. Raises ValueError when shapes disagree or the temperature is not positive.
    """
    if uniforms_t.shape != z_tv.shape[:1] or temperature <= 0:
        raise ValueError(
            f"sample_rows: {tuple(z_tv.shape)} logits, {tuple(uniforms_t.shape)} uniform numbers, temperature {temperature}: one number a "
            "row and a positive temperature are needed"
        )
    return _sample(z_tv, uniforms_t, temperature)


def cost(z_tv: Tensor, uniforms_t: Tensor, temperature: float) -> Cost:
    """Two exponentials an entry; the logits once."""
    return Cost(40 * z_tv.numel(), z_tv.numel() * z_tv.element_size() + 20 * len(z_tv))


def sample_inputs(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Odd sizes, more than one block of the C++ kernel, both ends of the unit interval."""
    generator = torch.Generator().manual_seed(0)
    for t, v, temperature in ((0, 3, 1.0), (1, 1, 0.5), (63, 97, 1.3), (5, 2500, 0.8)):
        z_tv = (3 * torch.randn(t, v, generator=generator, dtype=torch.float64)).to(dtype).to(device)
        uniforms_t = torch.rand(t, generator=generator, dtype=torch.float64).to(device)
        uniforms_t[:1], uniforms_t[1:2] = 0.0, 1 - 2**-53
        yield z_tv, uniforms_t, temperature


SPEC = OpSpec("sample_rows", sample_rows_op, sample_inputs, cost)
