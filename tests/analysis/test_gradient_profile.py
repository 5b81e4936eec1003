"""Layer norms against a plain loop over the rows."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from fastlora.analysis.gradient_profile import (
    LayerNorms,
    Measure,
    has_gradient,
    layer_norms,
    layer_ranks,
    measures,
    module_shares,
    rank_shift_correlation,
)
from fastlora.metrics import GRADIENT_PROFILE_SCHEMA
from tests.tolerances import FP64_EXACT

ROWS = [  # step, layer, matrix, rank, norm; layers and steps out of order, layer 7 without A, two norms not finite
    (4, 7, "B", 5, 2.0), (4, 0, "A", 3, 1.0), (4, 0, "B", 3, 4.0), (4, 0, "A", 17, 2.5), (2, 0, "A", 3, 0.0),
    (2, 0, "B", 3, 0.5), (2, 7, "B", 5, math.nan), (2, 11, "A", 1, 8.0), (4, 11, "A", 1, 0.25),
    (4, 11, "B", 1, math.inf),
]  # fmt: skip


def table(rows: list[tuple[int, int, str, int, float]], masked: bool = False) -> pa.Table:
    """One module a layer and rank; ‖∂L/∂ΔW‖ is thrice the norm of B."""
    columns = {
        "step": [r[0] for r in rows],
        "module": [f"m{r[1]}.{r[3]}" for r in rows],
        "layer": [r[1] for r in rows],
        "projection": ["p"] * len(rows),
        "matrix": [r[2] for r in rows],
        "rank": [r[3] for r in rows],
        "norm": [r[4] for r in rows],
        "delta_w_norm": [None if masked or r[2] == "A" else 3 * r[4] for r in rows],
        "component_norms": [None] * len(rows),
    }
    return pa.table(columns, schema=GRADIENT_PROFILE_SCHEMA)


@pytest.mark.parametrize(
    ("measure", "matrices"),
    [("raw", "AB"), ("raw", "A"), ("raw", "B"), ("rank_normalised", "AB"), ("rank_normalised", "B"), ("delta_w", "AB")],
)
def test_layer_norms_are_the_root_of_summed_squares(measure: Measure, matrices: str) -> None:
    result = layer_norms(table(ROWS), measure, matrices)
    factor = 9 if measure == "delta_w" else 1
    assert (result.layers.tolist(), result.steps.tolist()) == ([0, 7, 11], [2, 4])
    for i, layer in enumerate([0, 7, 11]):
        for j, step in enumerate([2, 4]):
            squares = [
                factor * norm**2 / (rank if measure == "rank_normalised" else 1)
                for s, la, matrix, rank, norm in ROWS
                if (s, la) == (step, layer) and matrix in ("B" if measure == "delta_w" else matrices)
            ]
            if all(map(math.isfinite, squares)):
                assert result.norms_ls[i, j] == pytest.approx(math.sqrt(sum(squares)), rel=FP64_EXACT)
            else:
                assert np.isnan(result.norms_ls[i, j])


def test_equal_gradients_per_row_give_equal_shares_once_the_rank_is_taken_out() -> None:
    """‖g‖ = √r in every layer: shares go like √r raw, and are all alike rank-normalised."""
    ranks = [1, 2, 3, 17, 32]
    rows = [(step, layer, "A", rank, math.sqrt(rank)) for step in (1, 2) for layer, rank in enumerate(ranks)]
    raw, normalised = layer_norms(table(rows)), layer_norms(table(rows), "rank_normalised")
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


def test_delta_w_is_refused_where_there_is_none() -> None:
    assert measures(table(ROWS)) == ("raw", "rank_normalised", "delta_w")
    assert measures(table(ROWS, masked=True)) == ("raw", "rank_normalised") == measures(table([]))
    with pytest.raises(ValueError, match="this profile has no delta_w"):
        layer_norms(table(ROWS, masked=True), "delta_w")
    with pytest.raises(ValueError, match="it has none of A alone"):
        layer_norms(table(ROWS), "delta_w", "A")


def test_shares_by_module() -> None:
    rows = [(1, 0, "A", 3, 3.0), (1, 0, "B", 3, 4.0), (1, 0, "B", 5, 10.0), (1, 2, "B", 3, 5.0)]
    assert module_shares(table(rows)) == pytest.approx({"m0.3": 0.25, "m0.5": 0.5, "m2.3": 0.25}, rel=FP64_EXACT)
    assert module_shares(table(rows), "delta_w") == pytest.approx({"m0.3": 4 / 19, "m0.5": 10 / 19, "m2.3": 5 / 19}, rel=FP64_EXACT)


def test_ranks_of_layers_count_every_module_once() -> None:
    """Two steps, one of them with two optimizer steps; layer 2 has its rank in A as well; layer 0 two modules."""
    rows = [(step, layer, "B", rank, 1.0) for step in (1, 1, 2) for layer, rank in ((2, 4), (0, 3), (0, 5))]
    rows += [(1, 2, "A", 4, 1.0)]
    assert layer_ranks(table(rows)).tolist() == [8.0, 4.0]


def norms_of(shares_ls: list[list[float]]) -> LayerNorms:
    values = np.array(shares_ls)
    return LayerNorms(np.arange(len(values), dtype=np.int32), np.arange(values.shape[1], dtype=np.int32), values)


def test_early_against_late_is_first_against_last_third() -> None:
    """7 counted steps: thirds of 2. The middle ones and a step without gradient are noise that must not matter."""
    generator = np.random.default_rng(0)
    early, late = generator.dirichlet(np.ones(5), 2).T, generator.dirichlet(np.ones(5), 2).T
    noise = generator.dirichlet(np.ones(5), 3).T
    steps = np.concatenate([early * 7, np.zeros((5, 1)), noise, late / 3], axis=1)  # sizes differ, shares count
    x, y = early.mean(1), late.mean(1)
    expected = ((x - x.mean()) * (y - y.mean())).sum() / math.sqrt(((x - x.mean()) ** 2).sum() * ((y - y.mean()) ** 2).sum())
    assert norms_of(steps.tolist()).early_late_correlation == pytest.approx(expected, rel=1e-9)
    assert math.isnan(norms_of([[1, 1, 1], [1, 2, 1]]).early_late_correlation), "all layers alike early: no correlation"
    with pytest.raises(ValueError, match="need 3 steps with a gradient, here are 2"):
        _ = norms_of([[1, 2], [2, 3]]).early_late_correlation


def test_rank_against_the_change_of_share() -> None:
    """With shares ∝ √r over a uniform reference the correlation is that of r and √r."""
    ranks = np.array([20.0, 24, 32, 36, 40])
    share, uniform = np.sqrt(ranks) / np.sqrt(ranks).sum(), np.full(5, 0.2)
    assert rank_shift_correlation(ranks, share, uniform) == pytest.approx(np.corrcoef(ranks, np.sqrt(ranks))[0, 1], rel=1e-9)
    assert rank_shift_correlation(ranks, uniform - share, np.zeros(5)) < -0.99
    assert math.isnan(rank_shift_correlation(np.full(5, 32.0), share, uniform)), "uniform ranks explain nothing"
    with pytest.raises(ValueError, match="not the same layers"):
        rank_shift_correlation(ranks[1:], share, uniform)
