"""Verdicts at, just below and just above every limit, against definitions written out here."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlora.study.claims import (
    LEVEL,
    Claim,
    Decision,
    Estimate,
    Region,
    Sample,
    Verdict,
    above,
    accuracy_claim,
    below,
    by_interval,
    by_p_value,
    by_property,
    conclusions,
    within,
)

NUMBERS = st.floats(-1e3, 1e3, allow_nan=False).map(lambda x: round(x, 3))
REGIONS = st.one_of(
    NUMBERS.map(above), NUMBERS.map(below), st.tuples(NUMBERS, NUMBERS).filter(lambda p: p[0] < p[1]).map(lambda p: within(*p))
)

JUST_ABOVE, JUST_BELOW = math.nextafter(0.8, 1), math.nextafter(0.8, 0)


@pytest.mark.parametrize(
    ("low", "high", "region", "verdict"),
    [
        (JUST_ABOVE, 0.9, above(0.8), "supported"),
        (0.8, 0.9, above(0.8), "undecided"),  # 0.8 itself is not above 0.8
        (JUST_BELOW, 0.9, above(0.8), "undecided"),
        (0.1, JUST_ABOVE, above(0.8), "undecided"),
        (0.1, 0.8, above(0.8), "not supported"),
        (0.1, JUST_BELOW, above(0.8), "not supported"),
        (0.1, JUST_BELOW, below(0.8), "supported"),
        (0.1, 0.8, below(0.8), "undecided"),
        (0.8, 0.9, below(0.8), "not supported"),
        (JUST_BELOW, 0.9, below(0.8), "undecided"),
        (-0.8, 0.8, within(-0.8, 0.8), "supported"),
        (-0.8, JUST_ABOVE, within(-0.8, 0.8), "undecided"),
        (0.8, 0.9, within(-0.8, 0.8), "undecided"),  # 0.8 is claimed, the rest is not
        (JUST_ABOVE, 0.9, within(-0.8, 0.8), "not supported"),
        (-2.0, -0.9, within(-0.8, 0.8), "not supported"),
        (-2.0, 2.0, within(-0.8, 0.8), "undecided"),
    ],
)
def test_an_interval_decides_at_its_limits(low: float, high: float, region: Region, verdict: Verdict) -> None:
    decision = by_interval(Estimate((low + high) / 2, low, high), region, "the share")
    assert decision.verdict == verdict
    assert f"the 95 % interval of the share lies {region}: supported; wholly outside: not supported" == decision.test


@given(NUMBERS, NUMBERS, REGIONS)
def test_an_interval_decides_as_its_points_do(a: float, b: float, region: Region) -> None:
    """Membership of 101 points of the interval, ends included, is the definition."""
    low, high = min(a, b), max(a, b)
    points = np.linspace(low, high, 101)
    claimed = (region.low <= points) & (points <= region.high)
    if not region.closed:
        claimed &= (points != region.low) & (points != region.high)
    verdict = by_interval(Estimate(a, low, high), region, "x").verdict
    if verdict == "supported":
        assert claimed.all()
    elif verdict == "not supported":
        assert not claimed.any()
    else:
        edges = (region.low, region.high)
        assert (claimed.any() and not claimed.all()) or any(low <= edge <= high for edge in edges)


@given(NUMBERS, NUMBERS, st.floats(0, 10), REGIONS)
def test_a_wider_interval_decides_nothing_new(a: float, b: float, more: float, region: Region) -> None:
    low, high = min(a, b), max(a, b)
    narrow, wide = (by_interval(Estimate(a, low - d, high + d), region, "x").verdict for d in (0.0, more))
    assert wide in (narrow, "undecided")


@given(NUMBERS, NUMBERS, NUMBERS, st.floats(0, 10))
def test_a_stricter_claim_is_no_easier(a: float, b: float, limit: float, more: float) -> None:
    estimate = Estimate(a, min(a, b), max(a, b))
    order = ("not supported", "undecided", "supported")
    easy, strict = (by_interval(estimate, above(x), "x").verdict for x in (limit, limit + more))
    assert order.index(strict) <= order.index(easy)


def test_what_is_not_a_number_decides_nothing() -> None:
    for estimate in (Estimate(math.nan, math.nan, math.nan), Estimate(0.9, 0.85, math.nan)):
        decision = by_interval(estimate, above(0.8), "the correlation")
        assert decision.verdict == "undecided"
        assert "not a number" in decision.measured


def test_limits_out_of_order_are_errors() -> None:
    with pytest.raises(ValueError, match="the gap: the interval's limits 2 and 1 are out of order"):
        by_interval(Estimate(1.5, 2, 1), above(0), "the gap")
    with pytest.raises(ValueError, match="two different limits in order"):
        within(1, 1)


@pytest.mark.parametrize(
    ("p", "difference", "claimed", "verdict"),
    [
        (math.nextafter(LEVEL, 0), 0.1, "higher", "supported"),
        (LEVEL, 0.1, "higher", "undecided"),
        (math.nextafter(LEVEL, 1), 0.1, "higher", "undecided"),
        (0.001, -0.1, "higher", "not supported"),
        (0.001, -0.1, "lower", "supported"),
        (0.001, 0.1, "lower", "not supported"),
        (0.9, -0.1, "lower", "undecided"),
        (0.0, 0.0, "higher", "undecided"),
    ],
)
def test_a_p_value_decides_with_its_direction(p: float, difference: float, claimed: Literal["higher", "lower"], verdict: Verdict) -> None:
    decision = by_p_value(difference, p, claimed, "uniform", test_name="McNemar, Holm over 5")
    assert decision.verdict == verdict
    assert decision.test.startswith("McNemar, Holm over 5: p < 0.05 and uniform")


@given(st.floats(0, 1), st.floats(0, 1), NUMBERS)
def test_a_larger_p_value_decides_nothing_new(p: float, other: float, difference: float) -> None:
    small, large = (by_p_value(difference, q, "higher", "x", test_name="t").verdict for q in sorted((p, other)))
    assert large in (small, "undecided")


@pytest.mark.parametrize("p", [-1e-9, 1 + 1e-9, math.nan])
def test_no_p_value(p: float) -> None:
    with pytest.raises(ValueError, match="is not a p value"):
        by_p_value(0.1, p, "higher", "x", test_name="t")


def test_an_exact_property_needs_every_case() -> None:
    kept = {f"cell-{i}": True for i in range(7)}
    assert by_property(kept, "budget").verdict == "supported"
    assert by_property(kept, "budget").measured == "holds in 7 of 7"
    failed = by_property({**kept, **{f"cell-{i}": False for i in (1, 3, 4, 6)}}, "budget")
    assert (failed.verdict, failed.measured) == ("not supported", "fails in 4 of 7: cell-1, cell-3, cell-4 and 1 more")
    assert by_property({**kept, "cell-6": False}, "budget").verdict == "not supported"
    with pytest.raises(ValueError, match="budget: no case"):
        by_property({}, "budget")


DECIDED = Decision("supported", "0.1 [0.05, 0.15]", "interval above 0")


@pytest.mark.parametrize(
    ("items", "seeds", "verdict", "reason"),
    [
        (999, 3, "undecided", "only 999 items of 1,000"),
        (1000, 3, "supported", None),
        (1001, 4, "supported", None),
        (1000, 2, "undecided", "only 2 seeds of 3"),
        (1, 1, "undecided", "only 1 item of 1,000 and 1 seed of 3"),
    ],
)
def test_accuracy_needs_items_and_seeds(items: int, seeds: int, verdict: Verdict, reason: str | None) -> None:
    sample = Sample(items, seeds, 1000, 3, "a gap of +0.1 needs 77 items")
    claim = accuracy_claim("a beats b", DECIDED, sample, source="paper", published="+0.1")
    expected = DECIDED.measured if reason is None else f"{DECIDED.measured}; {reason}; a gap of +0.1 needs 77 items"
    assert (claim.verdict, claim.measured, claim.kind) == (verdict, expected, "accuracy")
    assert claim.test == "interval above 0; undecided below 1,000 items or 3 seeds"


@given(st.integers(1, 2000), st.integers(1, 5), st.sampled_from(["supported", "not supported", "undecided"]))
def test_a_sample_only_ever_takes_a_verdict_away(items: int, seeds: int, verdict: Verdict) -> None:
    claim = accuracy_claim("x", Decision(verdict, "m", "t"), Sample(items, seeds, 1000, 3), source="s", published="p")
    assert claim.verdict == (verdict if items >= 1000 and seeds >= 3 else "undecided")


@given(st.lists(st.sampled_from(["supported", "not supported", "undecided"]), max_size=6))
def test_conclusions_are_the_verdicts(verdicts: list[Verdict]) -> None:
    claims = [Claim(f"claim {i}", "s", "p", f"m{i}", "t", verdict, "mechanism") for i, verdict in enumerate(verdicts)]
    may, may_not = conclusions(claims)
    assert len(may) + len(may_not) == len(claims)
    assert may == tuple(f"{v.capitalize()}: claim {i} (m{i})" for i, v in enumerate(verdicts) if v != "undecided")
    assert may_not == tuple(f"Undecided: claim {i} (m{i})" for i, v in enumerate(verdicts) if v == "undecided")


def test_undecided_accuracy_is_one_sentence() -> None:
    claims = [
        Claim(f"claim {i}", "s", "p", f"m{i}", "t", "undecided", kind) for i, kind in enumerate(("accuracy", "mechanism", "accuracy"))
    ]
    assert conclusions(claims) == ((), ("Undecided: claim 1 (m1)", "Undecided about accuracy, 2 claims: claim 0; claim 2"))


def test_numbers_in_print() -> None:
    assert by_interval(Estimate(-0.0321, -0.05, 1234.56), above(0), "x").measured == "−0.0321 [−0.05, 1,234.6]"
    assert DECIDED.claim("a", source="b", published="c") == Claim("a", "b", "c", DECIDED.measured, DECIDED.test, "supported", "mechanism")
