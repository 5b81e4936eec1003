"""The statistics against enumeration, published values and the bootstrap."""

from __future__ import annotations

import random
from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest
from scipy.stats import bootstrap, norm

from fastlora.statistics import paired_test, pass_at_k, proportion_interval
from tests.tolerances import BOOTSTRAP_LIMIT, FP64_EXACT, PUBLISHED_4_DIGITS


def answers(both: int, gained: int, lost: int, neither: int) -> tuple[list[bool], list[bool]]:
    """Two shuffled answer sheets with the given fourfold table."""
    pairs = [(True, True)] * both + [(False, True)] * gained + [(True, False)] * lost + [(False, False)] * neither
    random.Random(0).shuffle(pairs)
    return [b for b, _ in pairs], [a for _, a in pairs]


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 10), (7, 10), (136, 256), (1319, 1319)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_wilson_limits_are_where_the_score_test_just_accepts(successes: int, n: int, confidence: float) -> None:
    """Definition: at a limit p, |p̂ − p| = z √(p (1 − p) / n)."""
    result = proportion_interval(successes, n, confidence)
    z = norm.ppf(0.5 + confidence / 2)
    for p in (result.low, result.high):
        assert (result.value - p) ** 2 == pytest.approx(z * z * p * (1 - p) / n, abs=FP64_EXACT)
    assert 0 <= result.low <= result.value <= result.high <= 1
    assert (result.successes, result.n, result.confidence) == (successes, n, confidence)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (0, 5), (9, 3), (41, 12)])
def test_mcnemar_is_the_exact_sign_test(gained: int, lost: int) -> None:
    n = gained + lost
    tail = sum(Fraction(comb(n, i), 2**n) for i in range(min(gained, lost) + 1))
    before, after = answers(both=31, gained=gained, lost=lost, neither=17)
    result = paired_test(before, after)
    assert result.p_value == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=FP64_EXACT)
    assert (result.gained, result.lost, result.n) == (gained, lost, 48 + n)


def test_newcombe_interval_of_the_published_example() -> None:
    """Newcombe 1998, method 10, table 20 / 12 / 2 / 16: 0.2000, lower limit 0.0562."""
    result = paired_test(*answers(both=20, gained=12, lost=2, neither=16))
    assert result.difference == pytest.approx(0.2)
    assert result.low == pytest.approx(0.0562, abs=PUBLISHED_4_DIGITS)


@pytest.mark.parametrize("table", [(700, 320, 180, 119), (300, 90, 310, 619), (40, 600, 550, 129)])
def test_newcombe_interval_agrees_with_the_bootstrap_on_many_problems(table: tuple[int, int, int, int]) -> None:
    before, after = answers(*table)
    result = paired_test(before, after)
    change = np.array(after, dtype=float) - np.array(before, dtype=float)
    oracle = bootstrap((change,), np.mean, method="percentile", batch=500, rng=1).confidence_interval
    assert (result.low, result.high) == pytest.approx((oracle.low, oracle.high), abs=BOOTSTRAP_LIMIT)


def test_no_change_is_not_certainty() -> None:
    result = paired_test([True] * 30 + [False] * 34, [True] * 30 + [False] * 34)
    assert result.p_value == 1.0
    assert result.low < 0.0 < result.high


def test_swapping_before_and_after_mirrors_the_interval() -> None:
    before, after = answers(20, 12, 2, 16)
    there, back = paired_test(before, after), paired_test(after, before)
    assert (back.low, back.high, back.p_value) == pytest.approx((-there.high, -there.low, there.p_value))
    assert (back.gained, back.lost) == (there.lost, there.gained)


@pytest.mark.parametrize("num_samples", [1, 2, 5, 6])
def test_pass_at_k_counts_every_draw(num_samples: int) -> None:
    num_correct = [*range(num_samples + 1), 0, num_samples]
    for k in range(1, num_samples + 1):
        draws = [any(i < correct for i in draw) for correct in num_correct for draw in combinations(range(num_samples), k)]
        result = pass_at_k(num_samples, num_correct, k)
        assert result.value == pytest.approx(sum(draws) / len(draws), rel=FP64_EXACT)
        assert result.low <= result.value <= result.high


def test_pass_at_k_interval_is_over_problems() -> None:
    """pass@1 with all-or-nothing problems is a plain proportion: the two intervals must then agree."""
    num_correct = [4] * 400 + [0] * 600
    result, wilson = pass_at_k(4, num_correct, 1), proportion_interval(400, 1000)
    assert (result.low, result.high) == pytest.approx((wilson.low, wilson.high), abs=BOOTSTRAP_LIMIT)
    assert result == pass_at_k(4, num_correct, 1), "the same seed must repeat"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: proportion_interval(3, 0), "3 successes of 0"),
        (lambda: proportion_interval(4, 3), "4 successes of 3"),
        (lambda: proportion_interval(1, 3, 95), "confidence = 95"),
        (lambda: paired_test([True], []), "1 before and 0 after"),
        (lambda: paired_test([], []), "0 before and 0 after"),
        (lambda: pass_at_k(4, [1, 2], 5), "pass@5 needs 1 <= k <= 4"),
        (lambda: pass_at_k(4, [1, 5], 2), "between 0 and 4, got"),
        (lambda: pass_at_k(4, [], 2), "at least two problems.*got 0"),
        (lambda: pass_at_k(4, [2], 2), "at least two problems.*got 1"),
    ],
)
def test_nonsense_is_refused(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()
