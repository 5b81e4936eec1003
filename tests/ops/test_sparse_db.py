"""sparse_db on the CPU: against autograd's whole dB in fp64, both layouts of h, the sums of study S3, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastlora.ops import sparse_db as op
from fastlora.ops.registry import use_implementation
from fastlora_triton.group_layout import RANK_STEP, rank_columns
from tests.tolerances import FP64_EXACT

OUTS, RANKS, SCALES = (40, 16, 136, 9), (3, 0, 17, 64), (0.5, 1.0, 2.0, 3.0)
IMPLEMENTATIONS = ("reference", "torch")
CPU = torch.device("cpu")


def problem(t: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """(dY_m, H [t, Σ r], dB_mᵀ of all modules one after another, by autograd), float64."""
    h = torch.randn(t, sum(RANKS), dtype=torch.float64)
    dys = [torch.randn(t, n, dtype=torch.float64) for n in OUTS]
    b = [torch.zeros(r, n, dtype=torch.float64, requires_grad=True) for r, n in zip(RANKS, OUTS, strict=True)]
    ys = [s * h_m @ b_rn for s, h_m, b_rn in zip(SCALES, h.split(RANKS, 1), b, strict=True)]
    gradients = torch.autograd.grad(ys, b, dys)
    return dys, h, torch.cat([g.flatten() for g in gradients])


def rounded_up(h: Tensor) -> Tensor:
    """Every module's ranks in columns of their own, as lora_linear's Triton kernels keep them; what is between them is NaN."""
    parts = [torch.nn.functional.pad(part, (0, -part.shape[1] % RANK_STEP), value=float("nan")) for part in h.split(RANKS, 1)]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("every", [1, 7, 5000])
@pytest.mark.parametrize("t", [0, 1, 63, 1000])
def test_it_is_the_chosen_part_of_db(t: int, every: int, implementation: str) -> None:
    dys, h, db = problem(t)
    index_k = torch.arange(len(db))[::every]
    for layout, integers in ((h, torch.int32), (rounded_up(h), torch.int64)):
        with use_implementation(implementation):
            got = op.sparse_db([dy.view(1, *dy.shape) for dy in dys], layout.view(1, *layout.shape), index_k.to(integers), RANKS, SCALES)
        torch.testing.assert_close(got, db[index_k], rtol=FP64_EXACT, atol=FP64_EXACT * max(1, t))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sums_are_added_to_in_place_over_batches(implementation: str) -> None:
    index_k, sums, gradients = torch.tensor([0, 5, 2000]), torch.zeros(4, 3, dtype=torch.float64), []
    with use_implementation(implementation):
        for t in (63, 5, 0):
            dys, h, db = problem(t)
            op.sparse_db(dys, h, index_k, RANKS, SCALES, sums)
            gradients.append(db[index_k])
    g = torch.stack(gradients)
    torch.testing.assert_close(sums, torch.stack([g.sum(0), g.sign().sum(0), g.abs().sum(0), g.square().sum(0)]))


def test_no_modules_with_ranks() -> None:
    dys, h = [torch.randn(3, 4)], torch.randn(3, 0)
    assert op.sparse_db(dys, h, torch.empty(0, dtype=torch.int32), [0], [1.0]).shape == (0,)


def wrong(**changes: Any) -> dict[str, Any]:
    arguments = {"dys": [torch.zeros(3, 8)], "h": torch.zeros(3, 2), "index_k": torch.tensor([1]), "ranks": [2], "scales": [1.0]}
    return arguments | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": []}, "1 gradients, 1 ranks and 0 scales"),
        ({"h": torch.zeros(3, 3)}, r"h has 3 columns; ranks \[2\] need 2, or 16 rounded up"),
        ({"dys": [torch.zeros(4, 8)]}, r"dY of module 0 is \[4, 8\]"),
        ({"dys": [torch.zeros(3, 8, dtype=torch.bfloat16)]}, "dY of module 0 is .* torch.bfloat16"),
        ({"index_k": torch.tensor([1.0])}, "index_k is torch.float32"),
        ({"sums_4k": torch.zeros(3, 1)}, r"sums_4k is \[3, 1\]"),
        ({"sums_4k": torch.zeros(4, 1, dtype=torch.float64)}, "torch.float64, it must be"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"sparse_db: .*{message}"):
        op.sparse_db(**wrong(**changes))


def test_cost_by_hand() -> None:
    """t 3, one module of 8 outputs and rank 2, 5 entries: 2 · 3 · 5 FLOPs; dY 96, H 24, an int64 index 40, db 20, sums 2 · 80 bytes."""
    arguments = ([torch.zeros(3, 8)], torch.zeros(3, 2), torch.arange(5), [2], [1.0])
    assert op.cost(*arguments, None) == op.Cost(30, 180)
    assert op.cost(*arguments, torch.zeros(4, 5)) == op.Cost(30, 340)


def test_rounded_up_columns() -> None:
    assert rounded_up(torch.zeros(1, sum(RANKS))).shape[1] == rank_columns(RANKS) == 16 + 32 + 64
