"""logprob_rows on a GPU: log-probability, entropy and log Z of rows of logits, and the logits' gradient in their place; formulas in
fastlora/ops/logprob_rows.py.

Forward: a program walks along its row with a running maximum, Σ e^(z − m) and Σ e^(z − m) z, so that z is read once. Backward: a program
for every BLOCK of every row reads z and writes dz. A tile of 256 rows of Qwen's vocabulary is 78 MB in bfloat16: 23 µs and 46 µs at 3.35
TB/s. One program a row: 256 rows are two for every SM.

sm_90, bf16: 64 and 40 registers, 4 and 6 CTAs an SM; every byte moves once. Not run on a GPU: compiled for sm_80, sm_90 and sm_100 and run
on a CPU (tests/ops/test_triton_logprob_rows.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora_triton.launch import launch

BLOCK = 4096
"""Entries of a step: 8 warps, 16 each a thread, two 16-byte loads in bfloat16."""


@triton.jit
def rows_kernel(
    z_ptr,  # [T, V]
    target_ptr,  # int64 [T]
    logp_ptr,
    entropy_ptr,
    log_z_ptr,
    V,
    inverse_temperature,
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0)
    row = z_ptr + t.to(tl.int64) * V
    i = tl.arange(0, BLOCK)
    top = -float("inf")
    total = 0.0
    weighted = 0.0
    for v0 in range(0, V, BLOCK):
        z = tl.load(row + v0 + i, mask=v0 + i < V, other=-float("inf")).to(tl.float32) * inverse_temperature
        higher = tl.maximum(top, tl.max(z, axis=0))
        shrink = tl.where(top == higher, 1.0, tl.exp(top - higher))  # both −inf while every logit so far is
        e = tl.where(z == -float("inf"), 0.0, tl.exp(z - higher))
        total = total * shrink + tl.sum(e, axis=0)
        if WITH_ENTROPY:
            weighted = weighted * shrink + tl.sum(tl.where(e == 0.0, 0.0, e * z), axis=0)
        top = higher
    log_z = top + tl.log(total)
    target = tl.load(target_ptr + t)
    inside = (target >= 0) & (target < V)
    at_target = tl.load(row + target, mask=inside, other=float("nan")).to(tl.float32) * inverse_temperature
    tl.store(logp_ptr + t, at_target - log_z)
    tl.store(log_z_ptr + t, log_z)
    if WITH_ENTROPY:
        tl.store(entropy_ptr + t, log_z - weighted / total)


@triton.jit
def rows_gradient_kernel(
    z_ptr,  # [T, V], overwritten
    target_ptr,
    dlogp_ptr,
    dentropy_ptr,
    entropy_ptr,
    log_z_ptr,
    V,
    inverse_temperature,
    HAS_DENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = v < V
    at = z_ptr + t.to(tl.int64) * V + v
    log_p = tl.load(at, mask=there, other=-float("inf")).to(tl.float32) * inverse_temperature - tl.load(log_z_ptr + t)
    p = tl.exp(log_p)
    one_hot = (v == tl.load(target_ptr + t)).to(tl.float32)
    dz = tl.load(dlogp_ptr + t) * (one_hot - p)
    if HAS_DENTROPY:
        dz -= tl.where(p == 0.0, 0.0, tl.load(dentropy_ptr + t) * p * (log_p + tl.load(entropy_ptr + t)))
    tl.store(at, (dz * inverse_temperature).to(z_ptr.dtype.element_ty), mask=there)


def forward(z_tv: Tensor, targets_t: Tensor, temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(logp_t, entropy_t or empty [0], log_z_t), float32. z_tv contiguous; a target outside [0, v) gives NaN."""
    t, v = z_tv.shape
    logp_t, log_z_t = (torch.empty(t, dtype=torch.float32, device=z_tv.device) for _ in range(2))
    entropy_t = torch.empty(t if with_entropy else 0, dtype=torch.float32, device=z_tv.device)
    launch(
        rows_kernel,
        (t,),
        z_tv,
        targets_t,
        logp_t,
        entropy_t if with_entropy else logp_t,  # not written without
        log_z_t,
        v,
        1.0 / temperature,
        WITH_ENTROPY=with_entropy,
        BLOCK=BLOCK,
        num_warps=8,
    )
    return logp_t, entropy_t, log_z_t


def backward_(
    z_tv: Tensor, targets_t: Tensor, dlogp_t: Tensor, dentropy_t: Tensor | None, log_z_t: Tensor, entropy_t: Tensor, temperature: float
) -> None:
    """Overwrites z_tv (contiguous) with its gradient; the vectors are float32 [t], contiguous."""
    t, v = z_tv.shape
    has_dentropy = dentropy_t is not None
    launch(
        rows_gradient_kernel,
        (t, triton.cdiv(v, BLOCK)),
        z_tv,
        targets_t,
        dlogp_t,
        dentropy_t if has_dentropy else dlogp_t,  # not read without
        entropy_t if has_dentropy else dlogp_t,
        log_z_t,
        v,
        1.0 / temperature,
        HAS_DENTROPY=has_dentropy,
        BLOCK=BLOCK,
        num_warps=8,
    )
