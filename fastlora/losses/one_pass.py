"""Log-probabilities, loss and the gradient of the hidden states in one pass over the head.

    z_cv = h_cd W_vdᵀ        logp, entropy = rows of z        ℓ = loss(logp, entropy)
    dz = rows of z with dℓ/dlogp        dh_cd = dz_cv W_vd

A tile of logits is made, looked at and overwritten with its gradient before the next one is made: 4 c d v operations where a loss that
needs every log-probability first takes 6 (the logits twice). That works when dℓ/dlogp of a token depends on nothing that other tokens'
logits say: `losses.policy.is_token_level`. The head is frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlora.losses.nucleus_logprob import nucleus_tiles
from fastlora.ops.linear_logprob import row_tiles
from fastlora.ops.logprob_rows import logprob_rows, logprob_rows_backward_
from fastlora.packing import PackedTokens

TILE_ELEMENTS = 256 * 49152
"""Logits in memory at once on a CPU: 25 MB in bfloat16. GEMMs of 256 rows run at full speed, and a tile of this size still fits the L3
cache."""
GPU_TILE_ELEMENTS = 2048 * 151936
"""On a GPU: 622 MB in bfloat16. 2,048 rows of Qwen's vocabulary are 144 waves of 128 × 128 tiles on an H100; with the CPU's 82 rows a
product would be 9 waves of tiles that are two thirds full, with the loss's launches after each. (Not run on a GPU.)"""


def tile_elements(device: torch.device) -> int:
    """Logits in memory at once."""
    return GPU_TILE_ELEMENTS if device.type == "cuda" else TILE_ELEMENTS


LossOf = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""(logp_nt, entropy_nt) -> (loss, metrics)."""


def one_pass_loss(
    hidden_cd: Tensor,
    weight_vd: Tensor,
    bias_v: Tensor | None,
    packed: PackedTokens,
    temperature: float,
    loss_of: LossOf,
    top_p: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, differentiable in hidden_cd; metrics) of a token-level loss.

    hidden_cd: [C, d], the hidden states of `packed.predictors_c`. weight_vd, bias_v: the frozen head. loss_of is called once for each
    tile, with zeros for the tokens outside it, to learn the tile's dℓ/dlogp, and once with everything, for the value and the
    metrics. top_p < 1: normalised over the nucleus (ops.nucleus_rows).
    """
    metrics: dict[str, Tensor] = {}
    loss = _OnePass.apply(hidden_cd, weight_vd, bias_v, packed, temperature, loss_of, top_p, metrics)
    return loss, metrics


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_cd: Tensor,
        weight_vd: Tensor,
        bias_v: Tensor | None,
        packed: PackedTokens,
        temperature: float,
        loss_of: LossOf,
        top_p: float,
        metrics: dict[str, Tensor],
    ) -> Tensor:
        dh_cd, logps, entropies = torch.empty_like(hidden_cd), [], []
        tiles = row_tiles(hidden_cd, weight_vd, bias_v, tile_elements(hidden_cd.device))
        for pairs, z_cv in nucleus_tiles(tiles, packed.targets_c, temperature, top_p):
            targets_c = packed.targets_c[pairs]
            logp_c, entropy_c, log_z_c = logprob_rows(z_cv, targets_c, temperature, True)
            with torch.enable_grad():
                leaf_c = logp_c.detach().requires_grad_()
                loss, _ = loss_of(packed.unpack(leaf_c, pairs), packed.unpack(entropy_c, pairs))
            (dlogp_c,) = torch.autograd.grad(loss, leaf_c)
            logprob_rows_backward_(z_cv, targets_c, dlogp_c, None, log_z_c, entropy_c, temperature)
            dh_cd[pairs] = z_cv.mm(weight_vd)
            logps.append(logp_c)
            entropies.append(entropy_c)
        loss, named = loss_of(packed.unpack(torch.cat(logps)), packed.unpack(torch.cat(entropies)))
        metrics.update(named)
        ctx.save_for_backward(dh_cd)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        (dh_cd,) = ctx.saved_tensors
        # Almost always exactly 1 (the loss itself is differentiated): no pass over dh then. A GPU is not asked: it would have to finish the
        # forward pass before it is given anything more to do, and no CUDA graph could hold the step; [8192, 1536] take it 15 µs.
        is_one = dloss.device.type == "cpu" and float(dloss) == 1.0
        return dh_cd if is_one else dh_cd * dloss.to(dh_cd.dtype), *(None,) * 7
