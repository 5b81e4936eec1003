"""grpo_loss on a GPU, token-level losses: value, what is reported and dℓ/dlogp in one launch; formulas in fastlora/ops/grpo_loss.py.

    loss = Σ_nt w_n m_nt ℓ_nt        dℓ/dlogp_nt = w_n m_nt ∂ℓ_nt/∂logp_nt

w_n holds the aggregate: the weight of a trained token of sequence n under the loss type. A program walks along one sequence; its sums are
added over the sequences afterwards, in order. The derivatives are autograd's of the reference, at the corners too: min(a, b) gives half to
each where they are equal, and clamp passes a gradient at its bounds.

Bytes: logp, entropy, old and reference logp, advantages and the mask once, dlogp written: 25 a token. The reference takes some 80 launches
forward and backward for the same tokens, 0.4 ms at 5 µs each, whatever their number; one pass over the head calls it for every tile.

sm_90: 128 registers with clip and KL, 4 CTAs an SM. Not run on a GPU: compiled for sm_80, sm_90 and sm_100 and run on a CPU
(tests/ops/test_triton_grpo_loss.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora_triton.launch import launch

BLOCK = 1024
"""Tokens of a step: 4 warps, 8 each a thread."""
SUMS = ("loss", "entropy", "ratio", "tokens", "kl", "low", "high", "region")
"""Of a sequence, over its trained tokens; loss is weighted, the last three count clipped ratios."""

CLIPPED, CISPO, SAPO = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
K1, K2, K3, DENSITY = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)


def kind_of(loss_type: str) -> int:
    """CLIPPED, CISPO or SAPO."""
    return {"cispo": CISPO, "sapo": SAPO}.get(loss_type, CLIPPED).value


def estimator_of(kl_estimator: str) -> int:
    """K1 to DENSITY."""
    return {"k1": K1, "k2": K2, "k3": K3, "density": DENSITY}[kl_estimator].value


class Surrogate(NamedTuple):
    """Which token loss, and its numbers; names as in config.LossConfig."""

    kind: int
    """CLIPPED, CISPO or SAPO."""
    epsilon: float
    epsilon_high: float
    delta: float
    """Infinite: none."""
    temperature_pos: float
    temperature_neg: float
    kl_estimator: int
    """0 without KL, else K1 to DENSITY."""
    beta: float
    use_bias_correction_kl: bool


@triton.jit
def _surrogate(ratio, logp, advantage, epsilon, epsilon_high, delta, temperature_pos, temperature_neg, KIND: tl.constexpr):
    """(ℓ, ∂ℓ/∂logp) before importance ratio and KL."""
    if KIND == CISPO:
        weight = -tl.minimum(ratio, epsilon_high) * advantage
        return weight * logp, weight
    elif KIND == SAPO:
        temperature = tl.where(advantage > 0, temperature_pos, temperature_neg)
        gate = 1 / (1 + tl.exp(-temperature * (ratio - 1)))
        return -gate * 4 / temperature * advantage, -4 * gate * (1 - gate) * ratio * advantage
    else:
        low, high = 1 - epsilon, 1 + epsilon_high
        free = tl.minimum(ratio, delta) * advantage
        held = tl.minimum(tl.maximum(ratio, low), high) * advantage
        moves_free = tl.where(ratio <= delta, 1.0, 0.0)
        moves_held = tl.where((ratio >= low) & (ratio <= high), 1.0, 0.0)
        moves = tl.where(free < held, moves_free, tl.where(free > held, moves_held, 0.5 * (moves_free + moves_held)))
        return -tl.minimum(free, held), -advantage * ratio * moves


@triton.jit
def _kl(logp, ref_logp, ESTIMATOR: tl.constexpr):
    """(KL, ∂KL/∂logp)."""
    d = ref_logp - logp
    if ESTIMATOR == K1:
        return -d, tl.full(d.shape, 1.0, tl.float32)
    elif ESTIMATOR == K2:
        return 0.5 * d * d, -d
    elif ESTIMATOR == K3:
        e = tl.exp(d)
        return e - d - 1, 1 - e
    else:
        p = tl.exp(logp)
        density = -d * p
        return tl.maximum(density, 0.0), tl.where(density >= 0, p + density, 0.0)


@triton.jit(do_not_specialize=["T"])
def grpo_loss_kernel(
    logp_ptr,  # [N, T], as all that is per token
    entropy_ptr,
    mask_ptr,  # uint8
    advantage_ptr,  # [N, T] or [N]
    old_logp_ptr,
    ref_logp_ptr,
    importance_ptr,  # [N, T] or [N]
    weight_ptr,  # [N]
    dlogp_ptr,
    sums_ptr,  # [N, 8]: SUMS
    T,
    epsilon,
    epsilon_high,
    delta,
    temperature_pos,
    temperature_neg,
    beta,
    KIND: tl.constexpr,
    KL: tl.constexpr,
    KL_TIMES_RATIO: tl.constexpr,
    ADVANTAGE_PER_TOKEN: tl.constexpr,
    HAS_OLD: tl.constexpr,
    IMPORTANCE: tl.constexpr,  # values of a sequence: 0 = none, 1, 2 = T
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0)
    row = n.to(tl.int64) * T
    weight = tl.load(weight_ptr + n)
    loss = tl.zeros((BLOCK,), tl.float32)
    entropies, ratios, tokens, kls = loss, loss, loss, loss
    lows, highs, regions = loss, loss, loss
    for t0 in range(0, T, BLOCK):
        t = t0 + tl.arange(0, BLOCK)
        there = t < T
        m = tl.load(mask_ptr + row + t, mask=there, other=0) != 0
        logp = tl.load(logp_ptr + row + t, mask=m, other=0.0)
        ratio = tl.full((BLOCK,), 1.0, tl.float32)
        if HAS_OLD:
            ratio = tl.exp(logp - tl.load(old_logp_ptr + row + t, mask=m, other=0.0))
        if ADVANTAGE_PER_TOKEN:
            advantage = tl.load(advantage_ptr + row + t, mask=m, other=0.0)
        else:
            advantage = tl.load(advantage_ptr + n) + tl.zeros((BLOCK,), tl.float32)
        token_loss, slope = _surrogate(ratio, logp, advantage, epsilon, epsilon_high, delta, temperature_pos, temperature_neg, KIND)
        if IMPORTANCE == 1:
            token_loss, slope = token_loss * tl.load(importance_ptr + n), slope * tl.load(importance_ptr + n)
        if IMPORTANCE == 2:
            importance = tl.load(importance_ptr + row + t, mask=m, other=0.0)
            token_loss, slope = token_loss * importance, slope * importance
        if KL != 0:
            kl, kl_slope = _kl(logp, tl.load(ref_logp_ptr + row + t, mask=m, other=0.0), KL)
            if KL_TIMES_RATIO:
                kl, kl_slope = kl * ratio, (kl_slope + kl) * ratio
            token_loss += beta * kl
            slope += beta * kl_slope
            kls += tl.where(m, kl, 0.0)
        tl.store(dlogp_ptr + row + t, tl.where(m, weight * slope, 0.0), mask=there)
        loss += tl.where(m, token_loss, 0.0)
        entropies += tl.load(entropy_ptr + row + t, mask=m, other=0.0)
        ratios += tl.where(m, ratio, 0.0)
        tokens += tl.where(m, 1.0, 0.0)
        low, high = m & (ratio < 1 - epsilon) & (advantage < 0), m & (advantage > 0)
        if KIND == CISPO:
            highs += tl.where(high & (ratio > epsilon_high), 1.0, 0.0)
        if KIND == CLIPPED:
            high = high & (ratio > 1 + epsilon_high)
            lows += tl.where(low, 1.0, 0.0)
            highs += tl.where(high, 1.0, 0.0)
            regions += tl.where(low | high, 1.0, 0.0)
    out = sums_ptr + 8 * n
    tl.store(out, weight * tl.sum(loss, 0))
    tl.store(out + 1, tl.sum(entropies, 0))
    tl.store(out + 2, tl.sum(ratios, 0))
    tl.store(out + 3, tl.sum(tokens, 0))
    tl.store(out + 4, tl.sum(kls, 0))
    tl.store(out + 5, tl.sum(lows, 0))
    tl.store(out + 6, tl.sum(highs, 0))
    tl.store(out + 7, tl.sum(regions, 0))


def token_loss(
    logp_nt: Tensor,
    entropy_nt: Tensor,
    mask_nt: Tensor,
    advantages_nt: Tensor,
    old_logp_nt: Tensor | None,
    ref_logp_nt: Tensor | None,
    importance_ratio_nt: Tensor | None,
    weight_n: Tensor,
    surrogate: Surrogate,
) -> tuple[Tensor, Tensor]:
    """(dlogp_nt = dloss/dlogp, sums_8: SUMS over the batch), float32; loss = sums_8[0].

    All float32 and contiguous but mask_nt (bool or uint8). advantages_nt, importance_ratio_nt: [n, t] or [n, 1]; weight_n: [n].
    """
    n, t = logp_nt.shape
    dlogp_nt = torch.empty_like(logp_nt)
    sums_n8 = torch.empty(n, len(SUMS), dtype=torch.float32, device=logp_nt.device)
    s = surrogate
    launch(
        grpo_loss_kernel,
        (n,),
        logp_nt,
        entropy_nt,
        mask_nt.view(torch.uint8),
        advantages_nt,
        logp_nt if old_logp_nt is None else old_logp_nt,  # what is missing is not read
        logp_nt if ref_logp_nt is None else ref_logp_nt,
        logp_nt if importance_ratio_nt is None else importance_ratio_nt,
        weight_n,
        dlogp_nt,
        sums_n8,
        t,
        s.epsilon,
        s.epsilon_high,
        s.delta,
        s.temperature_pos,
        s.temperature_neg,
        s.beta,
        KIND=s.kind,
        KL=s.kl_estimator,
        KL_TIMES_RATIO=s.use_bias_correction_kl,
        ADVANTAGE_PER_TOKEN=advantages_nt.shape == logp_nt.shape,
        HAS_OLD=old_logp_nt is not None,
        IMPORTANCE=0 if importance_ratio_nt is None else 1 if importance_ratio_nt.shape != logp_nt.shape else 2,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return dlogp_nt, sums_n8.sum(0)
