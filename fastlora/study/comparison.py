"""Strategies compared on the same held-out problems with the same seeds: accuracies, gaps, and what a gap of that size would need.

accuracy of a strategy    mean over seeds and problems, interval by resampling both   (statistics.paired_bootstrap against zeros)
gap of two strategies     paired bootstrap over problems and seeds, p after Holm over all gaps of the table
                          exact McNemar per seed beside it
what a gap needs          problems (one seed: Connor's formula), or problems and seeds (variance components), at power .8
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastlora.statistics import (
    SeededDifference,
    design_needed,
    holm,
    items_needed,
    paired_bootstrap,
    paired_test,
    variance_components,
)
from fastlora.study.claims import Claim, Region, Sample, accuracy_claim, by_interval
from fastlora.study.config import ThresholdsConfig
from fastlora.study.pictures import Estimate
from fastlora.study.report import Table
from fastlora.study.results import CellResult, ResultError

Cells = Mapping[str, Mapping[int, CellResult]]
"""Strategy -> seed -> its cell (results.by_strategy)."""


@dataclass(frozen=True, slots=True)
class Gap:
    """How much better `second` is than `first`."""

    first: str
    second: str
    difference: SeededDifference
    mcnemar: tuple[float, ...]
    """Exact p of each seed."""
    adjusted: float
    """p of `difference` after Holm over all gaps that were made together."""
    needs: str
    """What would find a gap of this size."""


def correct_si(cells: Mapping[int, CellResult]) -> NDArray[np.float64]:
    """[seeds, problems], 1 = right after training. Raises ResultError when seeds answered different problems."""
    answered = {tuple(answer.prompt for answer in cell.run.eval_after) for cell in cells.values()}
    if len(answered) != 1:
        names = ", ".join(cell.name for cell in cells.values())
        raise ResultError(f"{names} were evaluated on different problems; set eval.num_problems and data alike and run the study again")
    return np.array([cell.correct for cell in cells.values()], dtype=np.float64)


def accuracy(cells: Mapping[int, CellResult]) -> Estimate:
    """Mean over seeds and problems; Wilson's interval for one seed, resampled problems and seeds for several."""
    if len(cells) == 1:
        (cell,) = cells.values()
        return Estimate(cell.accuracy.value, cell.accuracy.low, cell.accuracy.high)
    right_si = correct_si(cells)
    mean = paired_bootstrap(np.zeros_like(right_si), right_si)
    return Estimate(mean.difference, mean.low, mean.high)


def gaps(cells: Cells, pairs: Sequence[tuple[str, str]]) -> tuple[Gap, ...]:
    """Every pair (first, second), with the seeds that both have. Raises ResultError for a pair without a common seed."""
    found = []
    for first, second in pairs:
        one, two = _common(cells, first, second)
        a_si, b_si = correct_si(one), correct_si(two)
        found.append((first, second, a_si, b_si, paired_bootstrap(a_si, b_si)))
    adjusted = holm([difference.p_value for *_, difference in found]).adjusted if found else ()
    return tuple(
        Gap(
            first,
            second,
            difference,
            tuple(paired_test(a.astype(bool).tolist(), b.astype(bool).tolist()).p_value for a, b in zip(a_si, b_si, strict=True)),
            p,
            needed(a_si, b_si),
        )
        for (first, second, a_si, b_si, difference), p in zip(found, adjusted, strict=True)
    )


def _common(cells: Cells, first: str, second: str) -> tuple[dict[int, CellResult], dict[int, CellResult]]:
    seeds = [seed for seed in cells[first] if seed in cells[second]]
    if not seeds:
        raise ResultError(f"{first} and {second} have no seed in common, so they cannot be compared")
    return {seed: cells[first][seed] for seed in seeds}, {seed: cells[second][seed] for seed in seeds}


def needed(first_si: NDArray[np.float64], second_si: NDArray[np.float64]) -> str:
    """In words, what finds a gap as large as the measured one with power .8 at level .05."""
    gap = float((second_si - first_si).mean())
    if gap == 0:
        return "no gap was measured"
    if len(first_si) == 1:
        return f"{items_needed(gap, float((first_si != second_si).mean())):,} problems, one seed"
    design = design_needed(gap, variance_components(first_si, second_si))
    return f"{design.num_items:,} problems × {design.num_seeds} seeds"


def accuracy_table(cells: Cells, published: Mapping[str, float | None]) -> Table:
    """Each strategy's accuracy before and after; published: strategy -> their accuracy (a fraction), where scales match."""
    rows = []
    for strategy, by_seed in cells.items():
        after = accuracy(by_seed)
        before = float(np.mean([cell.accuracy_before.value for cell in by_seed.values()]))
        size = next(iter(by_seed.values())).accuracy.n
        rows.append((strategy, len(by_seed), size, before, after.value, after.low, after.high, published.get(strategy)))
    return Table(
        "accuracy",
        "Accuracy on held-out problems",
        ("strategy", "seeds", "problems", "before", "after", "low", "high", "published"),
        tuple(rows),
        "95 % intervals: Wilson's for one seed, else problems and seeds resampled. Published numbers are of another model and task.",
    )


def gaps_table(found: Sequence[Gap]) -> Table:
    """The gaps, corrected together."""
    rows = [
        (
            gap.second,
            gap.first,
            gap.difference.difference,
            gap.difference.low,
            gap.difference.high,
            gap.difference.p_value,
            gap.adjusted,
            ", ".join(f"{p:.3g}" for p in gap.mcnemar),
            gap.needs,
        )
        for gap in found
    ]
    return Table(
        "gaps",
        "Gaps between strategies, on the same problems",
        ("strategy", "against", "gap", "low", "high", "p", "p after Holm", "McNemar's p by seed", "this gap needs"),
        tuple(rows),
        "Paired bootstrap over problems and seeds; Holm over the rows of this table; power .8 at level .05.",
    )


def gap_claim(text: str, gap: Gap, region: Region, thresholds: ThresholdsConfig, *, source: str, published: str) -> Claim:
    """A claim about accuracy, decided by the gap's interval where the sample is large enough."""
    difference = gap.difference
    what = f"accuracy of {gap.second} − accuracy of {gap.first}"
    decision = by_interval(difference.difference, (difference.low, difference.high), region, what)
    sample = Sample(difference.num_items, difference.num_seeds, thresholds.min_items, thresholds.min_seeds)
    claim = accuracy_claim(text, decision, sample, source=source, published=published)
    return claim
