"""The race of a LoRA group, forward and backward: ours, torch eager, torch.compile, PEFT's layers, on the same numbers.

y_m = x W_mᵀ + s_m (x A_mᵀ) B_mᵀ        and the gradients of x, A and B
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.gpu_race import Canonical, Entrant, Race, Run, needs, on_a_gpu, on_meta, ours
from bench.op_cases import Case
from fastlora.ops import lora_linear


def group_race(case: Case, backward: Case, dtype: torch.dtype) -> Race:
    """Outputs, and the gradients of x, A and B, of one group."""
    arguments = on_meta(case, dtype)
    costs = [case.spec.cost(*arguments), backward.spec.cost(*on_meta(backward, dtype))]

    def problem(wider: torch.dtype) -> tuple[Tensor, list[Tensor], Tensor, Tensor, list[int], list[float], list[Tensor]]:
        x, weights, _, a_rd, b_flat, _, ranks, scales, _ = case.arguments(dtype)
        x, a_rd, b_flat = (t.to(wider).requires_grad_() for t in (x, a_rd, b_flat))
        dys = [torch.arange(len(x) * len(w), dtype=torch.float32).view(len(x), -1).sin().to(dtype).to(wider) for w in weights]
        return x, [w if wider == dtype else w.to(wider) for w in weights], a_rd, b_flat, ranks, scales, dys

    def entrant(forward: Callable[..., list[Tensor]], wider: torch.dtype = dtype) -> tuple[Run, Canonical]:
        x, weights, a_rd, b_flat, ranks, scales, dys = problem(wider)

        def run() -> tuple[Tensor, ...]:
            ys = forward(x, weights, a_rd, b_flat, ranks, scales)
            return (*(y.detach() for y in ys), *torch.autograd.grad(ys, (x, a_rd, b_flat), dys))

        return run, list

    def truth() -> list[Tensor]:
        run, canonical = entrant(_group_by_formula, torch.float32 if dtype != torch.float32 else torch.float64)
        return canonical(run())

    def through_op(x: Tensor, weights: list[Tensor], a_rd: Tensor, b_flat: Tensor, *layout: Any) -> list[Tensor]:
        return lora_linear.lora_linear(x, weights, [None] * len(weights), a_rd, b_flat, *layout)

    entrants = [
        *ours("lora_linear", lambda: entrant(through_op)),
        Entrant("torch eager", lambda: entrant(_group_by_formula)),
        Entrant("torch.compile", lambda: entrant(torch.compile(_group_by_formula, dynamic=False)), on_a_gpu),
        Entrant("PEFT layers", lambda: _peft_group(problem(dtype)), needs("peft", "peft", gpu=False)),
    ]
    products = case.gemms + backward.gemms
    work = (sum(c.flops for c in costs), sum(c.bytes for c in costs))
    return Race("lora_group_step", case.shape, dtype, *work, products, truth, entrants, "torch eager")


def _group_by_formula(
    x: Tensor, weights: Sequence[Tensor], a_rd: Tensor, b_flat: Tensor, ranks: Sequence[int], scales: Sequence[float]
) -> list[Tensor]:
    """Module by module, as PEFT's layers compute it."""
    parts = b_flat.split([len(w) * r for w, r in zip(weights, ranks, strict=True)])
    factors = zip(weights, a_rd.split(list(ranks)), parts, ranks, scales, strict=True)
    return [F.linear(x, w) + F.linear(x, a) @ b.view(r, len(w)) * s for w, a, b, r, s in factors]


def _peft_group(problem: tuple[Any, ...]) -> tuple[Run, Canonical]:
    """peft.tuners.lora.Linear over frozen nn.Linear layers, adapters in the dtype of x."""
    import peft
    from peft.tuners.lora import Linear

    x, weights, a_rd, b_flat, ranks, scales, dys = problem
    layers, leaves = [], [x]
    parts = b_flat.detach().split([len(w) * r for w, r in zip(weights, ranks, strict=True)])
    for w, a, b, r, s in zip(weights, a_rd.detach().split(ranks), parts, ranks, scales, strict=True):
        base = nn.Linear(*reversed(w.shape), bias=False, dtype=w.dtype)
        base.weight.data = w
        base.requires_grad_(False)
        layer = Linear(base, "default", peft.LoraConfig(r=r, lora_alpha=s * r), r=r, lora_alpha=s * r).to(x.dtype)
        layer.lora_A["default"].weight.data = a.clone()
        layer.lora_B["default"].weight.data = b.view(r, len(w)).t().contiguous()
        layers.append(layer)
    leaves += [layer.lora_A["default"].weight for layer in layers] + [layer.lora_B["default"].weight for layer in layers]

    def run() -> tuple[Tensor, ...]:
        ys = [layer(x) for layer in layers]
        return (*(y.detach() for y in ys), *torch.autograd.grad(ys, leaves, dys))

    def canonical(found: Sequence[Tensor]) -> list[Tensor]:
        count = len(layers)
        *outputs, dx = found[: count + 1]
        da, db = found[count + 1 : 2 * count + 1], found[2 * count + 1 :]
        return [*outputs, dx, torch.cat(list(da)), torch.cat([g.t().reshape(-1) for g in db])]

    return run, canonical
