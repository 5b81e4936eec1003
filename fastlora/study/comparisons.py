"""Strategies compared on the same held-out problems with the same seeds.

    per seed     exact McNemar and Newcombe's interval of the gap                      (fastlora.statistics.paired_test)
    pooled       bootstrap of the gap over items and seeds                             (paired_bootstrap)
    together     Holm's correction over all pairs of one call                          (holm)
    power        items and seeds that a gap of the measured size needs                 (items_for_seeds, items_needed)

A gap is second − first, in fractions of the problems.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fastlora.evaluate import Answer
from fastlora.progress import format_p
from fastlora.statistics import (
    PairedTest,
    SeededDifference,
    holm,
    items_for_seeds,
    items_needed,
    paired_bootstrap,
    paired_test,
    proportion_interval,
    variance_components,
)
from fastlora.study.claims import Decision, Estimate, Sample, by_interval, by_p_value, within
from fastlora.study.report import Table, Value
from fastlora.study.results import CellResult, Cells, ResultError

Answers = Mapping[int, Sequence[Answer]]
"""Seed -> one strategy's answers to the held-out problems."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two strategies."""

    first: str
    second: str
    per_seed: Mapping[int, PairedTest]
    pooled: SeededDifference
    p_holm: float
    """`pooled.p_value` after Holm's correction over the comparisons made together."""
    num_together: int
    """How many those were."""
    needed: str
    """"a gap of +0.020 needs 4,321 items × 3 seeds"; empty if there is no gap."""

    @property
    def gap(self) -> Estimate:
        """Pooled, with its interval, which is not corrected for the number of comparisons."""
        return Estimate(self.pooled.difference, self.pooled.low, self.pooled.high)

    def second_is_higher(self) -> Decision:
        """Supported: the gap is positive and its corrected p below the level."""
        over = "items and seeds" if self.pooled.seeds_resampled else "items"
        test_name = f"paired bootstrap over {over}, Holm over {self.num_together} comparisons"
        what = f"accuracy of {self.second} against {self.first}"
        decision = by_p_value(self.gap.value, self.p_holm, "higher", what, test_name=test_name)
        return replace(decision, measured=f"{_points(self.gap)}, {format_p(self.p_holm)}")

    def no_difference(self, margin: float) -> Decision:
        """Supported: the interval lies within ± margin (a fraction). A test that finds nothing would not show it."""
        decision = by_interval(self.gap, within(-margin, margin), f"the accuracy of {self.second} less that of {self.first}")
        return replace(decision, measured=_points(self.gap))

    def sample(self, min_items: int, min_seeds: int) -> Sample:
        """For `accuracy_claim`."""
        return Sample(self.pooled.num_items, self.pooled.num_seeds, min_items, min_seeds, self.needed)


def answers_after(cells: Mapping[int, CellResult]) -> Answers:
    """A strategy's answers by seed."""
    return {seed: cell.run.eval_after for seed, cell in cells.items()}


def answers_before(cells: Mapping[int, CellResult]) -> Answers:
    """The base model's, as the same cells recorded them before training."""
    return {seed: cell.run.eval_before for seed, cell in cells.items()}


def compare(strategies: Mapping[str, Answers], pairs: Sequence[tuple[str, str]]) -> tuple[Comparison, ...]:
    """Every (first, second) of `pairs`, corrected together.

    Raises ResultError for a strategy that is not there, and for two with other seeds or other problems: they cannot be paired.
    """
    found = []
    for first, second in pairs:
        if unknown := [name for name in (first, second) if name not in strategies]:
            raise ResultError(f"no cell of strategy {unknown[0]} is there to compare; there are {', '.join(strategies)}")
        _check_paired(first, strategies[first], second, strategies[second])
        first_si, second_si = _right(strategies[first]), _right(strategies[second])
        per_seed = {
            seed: paired_test(_correct(strategies[first][seed]), _correct(strategies[second][seed])) for seed in sorted(strategies[first])
        }
        found.append((first, second, per_seed, paired_bootstrap(first_si, second_si), _needed(first_si, second_si)))
    if not found:
        return ()
    corrected = holm([pooled.p_value for _, _, _, pooled, _ in found]).adjusted
    return tuple(
        Comparison(first, second, per_seed, pooled, p_holm, len(found), needed)
        for (first, second, per_seed, pooled, needed), p_holm in zip(found, corrected, strict=True)
    )


def mean_accuracy(answers: Answers) -> Estimate:
    """Over seeds and problems. Several seeds answer the same problems, so the interval is a bootstrap over both; of one seed, Wilson's."""
    if len(answers) == 1:
        (correct,) = (_correct(one) for one in answers.values())
        one_seed = proportion_interval(sum(correct), len(correct))
        return Estimate(one_seed.value, one_seed.low, one_seed.high)
    right_si = _right(answers)
    pooled = paired_bootstrap(np.zeros_like(right_si), right_si)
    return Estimate(pooled.difference, pooled.low, pooled.high)


def accuracy_table(strategies: Cells, published: Mapping[str, float]) -> Table:
    """A strategy's accuracy before and after training, beside the published one."""
    rows = []
    for name, cells in strategies.items():
        before, after = mean_accuracy(answers_before(cells)), mean_accuracy(answers_after(cells))
        items = next(iter(cells.values())).accuracy.n
        rows.append((name, len(cells), items, before.value, after.value, after.low, after.high, published.get(name)))
    return Table(
        "accuracy",
        "Accuracy on held-out problems",
        ("strategy", "seeds", "items", "before", "after", "low", "high", "published"),
        tuple(rows),
        "95 % intervals: Wilson's for one seed, else a bootstrap over items and seeds. Published numbers are of another model and task.",
    )


def accuracies(strategies: Cells) -> dict[str, Estimate]:
    """After training, by strategy."""
    return {name: mean_accuracy(answers_after(cells)) for name, cells in strategies.items()}


def compare_cells(strategies: Cells, pairs: Sequence[tuple[str, str]]) -> tuple[Comparison, ...]:
    """`compare` of what the cells answered after training."""
    return compare({name: answers_after(cells) for name, cells in strategies.items()}, pairs)


def comparison_table(comparisons: Sequence[Comparison], published: Mapping[tuple[str, str], float]) -> Table:
    """One row a pair: the gap beside the published one, its interval, p, what it would take; then each seed's McNemar."""
    seeds = sorted({seed for one in comparisons for seed in one.per_seed})
    columns = (
        *("first", "second", "gap", "low", "high", "published gap", "p, Holm", "items", "seeds", "needed"),
        *(f"seed {seed}: {what}" for seed in seeds for what in ("gap", "McNemar p")),
    )
    rows = tuple(_row(one, seeds, published.get((one.first, one.second))) for one in comparisons)
    note = (
        "Gap: accuracy of the second less that of the first, in fractions of the held-out problems, with the 95 % interval of a paired "
        "bootstrap over items and seeds; p from the same resamples, corrected by Holm over all rows; per seed exact McNemar, not corrected."
    )
    return Table("comparisons", "Strategies compared on the same problems", columns, rows, note)


def _row(one: Comparison, seeds: Sequence[int], published: float | None) -> tuple[Value, ...]:
    gap, sizes = one.gap, (one.pooled.num_items, one.pooled.num_seeds)
    per_seed: list[Value] = []
    for seed in seeds:
        test = one.per_seed.get(seed)
        per_seed += [None, None] if test is None else [test.difference, test.p_value]
    return (one.first, one.second, gap.value, gap.low, gap.high, published, one.p_holm, *sizes, one.needed or None, *per_seed)


def _check_paired(first: str, a: Answers, second: str, b: Answers) -> None:
    if a.keys() != b.keys():
        raise ResultError(f"{first} has seeds {sorted(a)}, {second} has {sorted(b)}: a paired comparison needs the same seeds")
    reference: list[tuple[int, str, str]] | None = None
    for name, answers in ((first, a), (second, b)):
        for seed, one in answers.items():
            problems = [(answer.index, answer.prompt, answer.gold) for answer in one]
            reference = reference or problems
            if problems != reference:
                raise ResultError(
                    f"{name}/seed-{seed} did not answer the same problems as {first}/seed-{next(iter(a))}: they cannot be paired"
                )


def _correct(answers: Sequence[Answer]) -> list[bool]:
    return [answer.correct for answer in answers]


def _right(answers: Answers) -> NDArray[np.float64]:
    """[seeds, items], 1 or 0, seeds in order."""
    return np.array([_correct(answers[seed]) for seed in sorted(answers)], dtype=np.float64)


def _needed(first_si: NDArray[np.float64], second_si: NDArray[np.float64]) -> str:
    """What a gap of the measured size needs to be found, at power .8."""
    difference = float((second_si - first_si).mean())
    if difference == 0:
        return ""
    if len(first_si) > 1:
        try:
            return str(items_for_seeds(difference, variance_components(first_si, second_si), len(first_si)))
        except ValueError as too_few_seeds:  # a gap of 0 is excluded above; the message says how many seeds it takes
            return str(too_few_seeds)
    items = items_needed(difference, float((first_si != second_si).mean()))
    return f"a gap of {difference:+.3f} needs {items:,} items of one seed (power 0.8, alpha 0.05)"


def _points(gap: Estimate) -> str:
    """In percentage points, signed, with a true minus."""
    return f"{100 * gap.value:+.1f} points [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]".replace("-", "−")
