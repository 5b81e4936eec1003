"""Layer norms against a plain loop over the rows."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from fastlora.analysis.gradient_profile import has_gradient, layer_norms
from fastlora.metrics import GRADIENT_PROFILE_SCHEMA
from tests.tolerances import FP64_EXACT

ROWS = [  # step, layer, matrix, rank, norm; layers and steps out of order, layer 7 without A, two norms not finite
    (4, 7, "B", 5, 2.0), (4, 0, "A", 3, 1.0), (4, 0, "B", 3, 4.0), (4, 0, "A", 17, 2.5), (2, 0, "A", 3, 0.0),
    (2, 0, "B", 3, 0.5), (2, 7, "B", 5, math.nan), (2, 11, "A", 1, 8.0), (4, 11, "A", 1, 0.25),
    (4, 11, "B", 1, math.inf),
]  # fmt: skip


def table(rows: list[tuple[int, int, str, int, float]]) -> pa.Table:
    columns = {
        "step": [r[0] for r in rows],
        "module": ["m"] * len(rows),
        "layer": [r[1] for r in rows],
        "projection": ["p"] * len(rows),
        "matrix": [r[2] for r in rows],
        "rank": [r[3] for r in rows],
        "norm": [r[4] for r in rows],
    }
    return pa.table(columns, schema=GRADIENT_PROFILE_SCHEMA)


@pytest.mark.parametrize("matrices", ["AB", "A", "B"])
@pytest.mark.parametrize("rank_normalised", [False, True])
def test_layer_norms_are_the_root_of_summed_squares(matrices: str, rank_normalised: bool) -> None:
    result = layer_norms(table(ROWS), matrices, rank_normalised)
    assert (result.layers.tolist(), result.steps.tolist()) == ([0, 7, 11], [2, 4])
    for i, layer in enumerate([0, 7, 11]):
        for j, step in enumerate([2, 4]):
            squares = [
                norm**2 / (rank if rank_normalised else 1)
                for s, la, matrix, rank, norm in ROWS
                if (s, la) == (step, layer) and matrix in matrices
            ]
            if all(map(math.isfinite, squares)):
                assert result.norms_ls[i, j] == pytest.approx(math.sqrt(sum(squares)), rel=FP64_EXACT)
            else:
                assert np.isnan(result.norms_ls[i, j])


def test_equal_gradients_per_row_give_equal_shares_once_the_rank_is_taken_out() -> None:
    """‖g‖ = √r in every layer: shares go like √r raw, and are all alike rank-normalised."""
    ranks = [1, 2, 3, 17, 32]
    rows = [(step, layer, "A", rank, math.sqrt(rank)) for step in (1, 2) for layer, rank in enumerate(ranks)]
    raw, normalised = layer_norms(table(rows)), layer_norms(table(rows), rank_normalised=True)
    total = sum(math.sqrt(rank) for rank in ranks)
    np.testing.assert_allclose(raw.share_l, [math.sqrt(rank) / total for rank in ranks], rtol=1e-6)  # norms are stored in fp32
    np.testing.assert_allclose(normalised.share_l, 0.2, rtol=1e-6)
    assert raw.share_ratio == pytest.approx(math.sqrt(32), rel=1e-6)
    assert raw.top_share(0.3) == pytest.approx((math.sqrt(32) + math.sqrt(17)) / total, rel=1e-6), "30% of 5 layers rounds up to 2"
    tops = [raw.top_share(fraction) for fraction in (0.2, 0.4, 0.6, 0.8, 1.0)]
    assert all(a < b for a, b in pairwise(tops))
    assert tops[-1] == pytest.approx(1.0)


def test_a_step_without_a_finite_gradient_does_not_count_in_the_shares() -> None:
    rows = [(1, 0, "A", 1, 0.0), (1, 1, "A", 1, math.nan), (2, 0, "A", 1, 3.0), (2, 1, "A", 1, 1.0)]
    rows += [(3, 0, "A", 1, 0.0), (3, 1, "A", 1, 0.0), (4, 0, "A", 1, 7.0), (4, 1, "A", 1, math.inf)]
    np.testing.assert_allclose(layer_norms(table(rows)).share_l, [0.75, 0.25], rtol=1e-6)
    assert has_gradient(table(rows))
    assert not has_gradient(table(rows[:2]))
    assert not has_gradient(table([]))
