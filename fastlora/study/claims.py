"""Verdicts on published claims, each by a stated test and never by prose.

    interval    inside the claimed region: supported; disjoint from it: not supported; else undecided
    p value     below the level (after Holm where several are tested): supported in the claimed direction, not supported in the
                other; else undecided. A claim of *no* difference needs an interval within ± a margin instead: a large p shows nothing
    exact       a property that holds or does not (a budget, a count): supported or not supported

A claim about *accuracy* stays undecided, whatever its interval says, below the items and seeds that the study's config asks for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from fastlora.progress import format_p

Verdict = Literal["supported", "not supported", "undecided"]
Kind = Literal["mechanism", "accuracy"]

LEVEL = 0.05
"""Of every test, and one minus the confidence of every interval."""


class HasInterval(Protocol):
    """A number with the limits of its 95 % interval: `Proportion`, `PassAtK`, `Correlation`, `Estimate`."""

    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its limits."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return _with_limits(self)


@dataclass(frozen=True, slots=True)
class Claim:
    """One row of the verdict table."""

    text: str
    """What is claimed, in one sentence."""
    source: str
    """Who claims it: "arXiv 2605.07366, table 2"."""
    published: str
    """Their number."""
    measured: str
    """Ours, with its interval; for an undecided claim also what is lacking."""
    test: str
    """What decides it, in words, with its threshold."""
    verdict: Verdict
    kind: Kind


@dataclass(frozen=True, slots=True)
class Decision:
    """What a test found."""

    verdict: Verdict
    measured: str
    test: str

    def claim(self, text: str, *, source: str, published: str) -> Claim:
        """The row of a claim about a mechanism. One about accuracy needs `accuracy_claim`."""
        return Claim(text, source, published, self.measured, self.test, self.verdict, "mechanism")


@dataclass(frozen=True, slots=True)
class Region:
    """The values that a claim allows: `above(x)` and `below(x)` without x itself, `within(a, b)` with both."""

    low: float
    high: float
    closed: bool

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"a claimed region needs two different limits in order, got {self.low} and {self.high}")

    def holds(self, low: float, high: float) -> bool:
        """All of [low, high] is claimed."""
        return self.low <= low and high <= self.high if self.closed else self.low < low and high < self.high

    def misses(self, low: float, high: float) -> bool:
        """Nothing of [low, high] is claimed."""
        return high < self.low or low > self.high if self.closed else high <= self.low or low >= self.high

    def __str__(self) -> str:
        if self.closed:
            return f"within {_number(self.low)} to {_number(self.high)}"
        return f"above {_number(self.low)}" if math.isfinite(self.low) else f"below {_number(self.high)}"


def above(limit: float) -> Region:
    """More than `limit`."""
    return Region(limit, math.inf, closed=False)


def below(limit: float) -> Region:
    """Less than `limit`."""
    return Region(-math.inf, limit, closed=False)


def within(low: float, high: float) -> Region:
    """From `low` to `high`; "no difference worth speaking of" is `within(-margin, margin)`."""
    return Region(low, high, closed=True)


def by_interval(estimate: HasInterval, region: Region, what: str) -> Decision:
    """Decides from the 95 % interval of `what` ("correlation of early and late profile").

    A limit that is not a number decides nothing (a correlation of constants has none). Raises ValueError for limits out of order.
    """
    value, low, high = estimate.value, estimate.low, estimate.high
    if low > high:
        raise ValueError(f"{what}: the interval's limits {low} and {high} are out of order")
    test = f"the 95 % interval of {what} lies {region}: supported; wholly outside: not supported"
    if math.isnan(value) or math.isnan(low) or math.isnan(high):
        return Decision("undecided", f"{_number(value)}: not a number, so it has no interval", test)
    verdict: Verdict = "supported" if region.holds(low, high) else "not supported" if region.misses(low, high) else "undecided"
    return Decision(verdict, _with_limits(estimate), test)


def _with_limits(estimate: HasInterval) -> str:
    return f"{_number(estimate.value)} [{_number(estimate.low)}, {_number(estimate.high)}]"


def by_p_value(
    difference: float, p_value: float, claimed: Literal["higher", "lower"], what: str, *, test_name: str, level: float = LEVEL
) -> Decision:
    """Decides from a two-sided p, corrected already if several claims are tested (`test_name`: "exact McNemar, Holm over 5 pairs").

    Raises ValueError unless 0 <= p_value <= 1.
    """
    if not 0 <= p_value <= 1:
        raise ValueError(f"{what}: {p_value} is not a p value")
    test = f"{test_name}: p < {level:g} and {what} {claimed}: supported; p < {level:g} and not {claimed}: not supported"
    agrees = difference > 0 if claimed == "higher" else difference < 0
    verdict: Verdict = "undecided" if p_value >= level or difference == 0 else "supported" if agrees else "not supported"
    return Decision(verdict, f"difference {_number(difference)}, {format_p(p_value)}", test)


def by_property(holds: Mapping[str, bool], what: str) -> Decision:
    """Decides from an exact property of every case ("proportional/seed-0": its budget was kept). Raises ValueError without a case."""
    if not holds:
        raise ValueError(f"{what}: no case to look at")
    failed = [name for name, held in holds.items() if not held]
    test = f"{what}, exactly, in every case: supported; in any case not: not supported"
    if failed:
        return Decision("not supported", f"fails in {len(failed)} of {len(holds)}: {_listed(failed)}", test)
    return Decision("supported", f"holds in {len(holds)} of {len(holds)}", test)


@dataclass(frozen=True, slots=True)
class Sample:
    """The evaluation behind a claim about accuracy, and what the study's config asks for."""

    items: int
    seeds: int
    min_items: int
    min_seeds: int
    needed: str = ""
    """What it takes to find the gap, by power: "a gap of +0.020 needs 4,321 items × 3 seeds"; empty = not computed."""


def accuracy_claim(text: str, decision: Decision, sample: Sample, *, source: str, published: str) -> Claim:
    """The row of a claim about accuracy: `decision` stands only if the sample is as large as the config asks for."""
    lacking = []
    if sample.items < sample.min_items:
        lacking.append(f"{_count(sample.items, 'item')} of {sample.min_items:,}")
    if sample.seeds < sample.min_seeds:
        lacking.append(f"{_count(sample.seeds, 'seed')} of {sample.min_seeds}")
    verdict: Verdict = "undecided" if lacking else decision.verdict
    reasons = [f"only {' and '.join(lacking)}"] if lacking else []
    if verdict == "undecided" and sample.needed:
        reasons.append(sample.needed)
    measured = "; ".join([decision.measured, *reasons])
    test = f"{decision.test}; undecided below {_count(sample.min_items, 'item')} or {_count(sample.min_seeds, 'seed')}"
    return Claim(text, source, published, measured, test, verdict, "accuracy")


def conclusions(claims: Sequence[Claim]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a reader may conclude (the decided claims, each with its verdict), and what not (the undecided ones; those about accuracy in one
    sentence, their numbers stand in the verdicts)."""
    may = tuple(f"{claim.verdict.capitalize()}: {claim.text} ({claim.measured})" for claim in claims if claim.verdict != "undecided")
    undecided = [claim for claim in claims if claim.verdict == "undecided"]
    may_not = tuple(f"Undecided: {claim.text} ({claim.measured})" for claim in undecided if claim.kind != "accuracy")
    if accuracy := [claim.text for claim in undecided if claim.kind == "accuracy"]:
        may_not += (f"Undecided about accuracy, {_count(len(accuracy), 'claim')}: {'; '.join(accuracy)}",)
    return may, may_not


def _number(value: float) -> str:
    """Three significant digits or more, whole numbers whole; a true minus."""
    text = f"{value:.0f}" if value == round(value, 0) and abs(value) < 1e6 else f"{value:.3g}" if abs(value) < 100 else f"{value:,.1f}"
    return text.replace("-", "−")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _listed(names: Sequence[str], most: int = 3) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
