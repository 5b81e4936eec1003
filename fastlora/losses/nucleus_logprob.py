"""Log-probabilities renormalised over the nucleus, differentiable, without the logits of all tokens.

    z_tv = h_td W_vdᵀ + b_v,  −∞ outside the nucleus of temperature and top_p        logp, entropy = rows of z        (ops.nucleus_rows)

The nucleus is a constant for the gradient. As in `ops.linear_logprob` a tile of logits is made, looked at and forgotten, and made again in
the backward pass, nucleus included: the same product gives the same bits. It is that op's path of whole rows (`forward_of_tiles`,
`backward_of_tiles`) on tiles with −∞ in them, and no op of its own: what is new in it is `nucleus_rows`, which is one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastlora.ops.linear_logprob import backward_of_tiles, forward_of_tiles, row_tiles
from fastlora.ops.nucleus_rows import keep_nucleus_


def nucleus_tiles(
    tiles: Iterable[tuple[slice, Tensor]], targets_t: Tensor, temperature: float, top_p: float
) -> Iterator[tuple[slice, Tensor]]:
    """The (tokens, logits) of `row_tiles`, each tile with −∞ outside the nuclei of its rows; untouched where top_p is 1."""
    for tokens, z_tv in tiles:
        if top_p < 1:
            keep_nucleus_(z_tv, targets_t[tokens], temperature, top_p)
        yield tokens, z_tv


def nucleus_logprob(
    hidden_td: Tensor, weight_vd: Tensor, bias_v: Tensor | None, targets_t: Tensor, temperature: float, top_p: float, tile_elements: int
) -> tuple[Tensor, Tensor]:
    """(logp_t, entropy_t), float32 [t] (float64 for float64 inputs), nats, differentiable in hidden_td [t, d], weight_vd and bias_v.

    Both of the distribution renormalised over its nucleus, the target counted in. targets_t: int64 [t] in [0, v). tile_elements: logits
    in memory at once. Raises ValueError when temperature is not positive or top_p not in (0, 1).
    """
    return _NucleusLogprob.apply(hidden_td, weight_vd, bias_v, targets_t, temperature, top_p, tile_elements)


class _NucleusLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_td: Tensor,
        weight_vd: Tensor,
        bias_v: Tensor | None,
        targets_t: Tensor,
        temperature: float,
        top_p: float,
        tile_elements: int,
    ) -> tuple[Tensor, Tensor]:
        tiles = nucleus_tiles(row_tiles(hidden_td, weight_vd, bias_v, tile_elements), targets_t, temperature, top_p)
        logp_t, entropy_t, log_z_t = forward_of_tiles(tiles, hidden_td, targets_t, temperature, True)
        ctx.options = (temperature, top_p, tile_elements)
        ctx.save_for_backward(hidden_td, weight_vd, bias_v, targets_t, log_z_t, entropy_t)
        ctx.set_materialize_grads(False)  # the entropy is often only logged
        return logp_t, entropy_t

    @staticmethod
    def backward(ctx: Any, grad_logp_t: Tensor | None, grad_entropy_t: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_td, weight_vd, bias_v, targets_t, log_z_t, entropy_t = ctx.saved_tensors
        temperature, top_p, tile_elements = ctx.options
        _, need_dw, need_db, *_ = ctx.needs_input_grad
        tiles = nucleus_tiles(row_tiles(hidden_td, weight_vd, bias_v, tile_elements), targets_t, temperature, top_p)
        saved = (hidden_td, weight_vd, targets_t, log_z_t, entropy_t)
        dh_td, dw_vd, db_v = backward_of_tiles(tiles, grad_logp_t, grad_entropy_t, *saved, temperature, need_dw, need_db)
        return dh_td, dw_vd if need_dw else None, db_v if need_db else None, None, None, None, None
