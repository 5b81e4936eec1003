"""Intervals over steps and by leaving one out, against closed forms; structures against singular values."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from fastlora.study.claims import Estimate
from fastlora.study.placement import Structured
from fastlora.study.resampling import leave_one_out, over_runs, over_steps


def test_the_interval_of_a_mean_of_independent_steps() -> None:
    values = np.random.default_rng(0).normal(3.0, 1.0, size=400)
    found = over_steps(lambda steps: float(values[steps].mean()), len(values))
    assert found.value == pytest.approx(values.mean())
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * values.std(ddof=1) / 20, rel=0.2)


def test_runs_are_resampled_each_by_itself() -> None:
    """The mean of four runs is known twice as well as each; runs of other lengths and levels do not mix."""
    values = [np.random.default_rng(seed).normal(10.0 * seed, 1.0, size=200 + seed) for seed in range(4)]
    found = over_runs([(lambda steps, one=one: float(one[steps].mean()), len(one)) for one in values])
    assert found.value == pytest.approx(np.mean([one.mean() for one in values]))
    assert (found.high - found.low) / 2 == pytest.approx(1.96 / np.sqrt(4 * 200), rel=0.2)


def test_alike_neighbours_widen_it() -> None:
    """Every value twenty times in a row: 400 steps that are worth 20. Blocks of 8 see some of it, single steps would see nothing."""
    values = np.repeat(np.random.default_rng(1).normal(size=20), 20)
    found = over_steps(lambda steps: float(values[steps].mean()), len(values))
    assert (found.high - found.low) / 2 > 1.8 * 1.96 * values.std() / 20


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(2).normal(size=16)
    found = leave_one_out(lambda rows: float(values[rows].mean()), len(values))
    assert (found.high - found.value) == pytest.approx(1.959964 * values.std(ddof=1) / 4, rel=1e-6)


@pytest.mark.parametrize("function", [over_steps, leave_one_out])
def test_two_have_no_interval(function: Callable[[Callable[[NDArray[np.int64]], float], int], Estimate]) -> None:
    found = function(lambda rows: float(rows.sum()), 2)
    assert found.value == 1.0 and math.isnan(found.low) and math.isnan(found.high)


def test_structure_of_unit_gradients() -> None:
    gradients = np.random.default_rng(3).normal(size=(6, 40)) * np.array([1, 100, 1, 1, 3, 1])[:, None]
    one = Structured("grpo", 0, gradients @ gradients.T, 1.0, 6, 0)
    chosen = np.array([0, 1, 3, 5])
    unit = gradients[chosen] / np.linalg.norm(gradients[chosen], axis=1, keepdims=True)
    singular = np.linalg.svd(unit, compute_uv=False)
    share = singular / singular.sum()
    assert one.stable_rank(chosen) == pytest.approx((singular**2).sum() / singular[0] ** 2)
    assert one.effective_rank(chosen) == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    assert one.cosine(chosen) == pytest.approx(np.mean([unit[i] @ unit[i + 1] for i in range(3)]))
