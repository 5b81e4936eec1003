"""A fresh adapter of which nothing but dB is asked: B = 0 and A frozen, as scoring has it.

    y_m = x W_mᵀ + b_m        dB_m = s_m dY_mᵀ (x A_mᵀ)        dX = Σ_m dY_m W_m

The adapter changes neither y nor dX, so that of its five products (ops.lora_linear) x Aᵀ and dB are left, both in the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora.ops.lora_linear import module_b


def with_gradient_of_b(
    x: Tensor, outputs: Sequence[Tensor], a_rd: Tensor, b_flat: Tensor, ranks: Sequence[int], scales: Sequence[float]
) -> list[Tensor]:
    """outputs: y_m [*, n_m] of the frozen layers for x [*, d]. The same values, from which dB reaches `b_flat`; see ops.lora_linear."""
    return list(_GradientOfB.apply(x, a_rd, b_flat, ranks, scales, *outputs))


class _GradientOfB(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a_rd: Tensor, b_flat: Tensor, ranks: Sequence[int], scales: Sequence[float], *outputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, a_rd)
        ctx.b_like, ctx.ranks, ctx.scales = b_flat, ranks, scales
        return tuple(y.view_as(y) for y in outputs)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, a_rd = ctx.saved_tensors
        h_tr = x.reshape(-1, x.shape[-1]).to(a_rd.dtype) @ a_rd.t()
        db_flat = torch.empty_like(ctx.b_like)
        db_rn = module_b(db_flat, [dy.shape[-1] for dy in dys], ctx.ranks)
        for dy, db, h, rank, scale in zip(dys, db_rn, h_tr.split(list(ctx.ranks), dim=1), ctx.ranks, ctx.scales, strict=True):
            if rank:
                torch.mm(h.t(), dy.reshape(-1, dy.shape[-1]).to(h.dtype), out=db).mul_(scale)
        return None, None, db_flat, None, None, *dys
