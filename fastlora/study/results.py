"""What finished training cells leave, as the records that studies compare.

CellResult     one cell: held-out answers, accuracy (final, peak), metrics over the steps, gradient norms, ranks, seconds by stage
by_strategy    strategy -> its cells by seed: "proportional/seed-0" is seed 0 of `proportional`
stack          one metric of several cells -> [seeds, steps], NaN where a cell has no value
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastlora.analysis.gradient_profile import LayerNorms, Measure, has_gradient, layer_norms
from fastlora.analysis.run_reader import Run, RunReadError, read_run
from fastlora.errors import FastloraError
from fastlora.metrics import MetricsError
from fastlora.progress import STAGES
from fastlora.statistics import Proportion, proportion_interval
from fastlora.study.worker import FINISHED_FILE

SEED_IN_NAME = re.compile(r"(?P<strategy>.+)/seed-(?P<seed>\d+)")


class ResultError(FastloraError):
    """A cell is unfinished or damaged, or cells cannot be compared; the message names cell and folder."""


@dataclass(frozen=True)
class CellResult:
    """One finished training cell."""

    name: str
    run: Run

    @property
    def correct(self) -> list[bool]:
        """After training, one a held-out problem, in the split's order."""
        return [answer.correct for answer in self.run.eval_after]

    @property
    def correct_before(self) -> list[bool]:
        """The same problems, answered by the base model."""
        return [answer.correct for answer in self.run.eval_before]

    @property
    def accuracy(self) -> Proportion:
        """Greedy, after training, with its Wilson interval."""
        return proportion_interval(sum(self.correct), len(self.correct))

    @property
    def accuracy_before(self) -> Proportion:
        """Greedy, of the base model, with its Wilson interval."""
        return proportion_interval(sum(self.correct_before), len(self.correct_before))

    @cached_property
    def peak(self) -> tuple[int, Proportion]:
        """(step, accuracy) at the best evaluation; of equal ones the earliest. Those during training count too, on their problems.

        The largest of several noisy numbers is biased upwards, the more so the more there are: compare peaks with peaks only.
        """
        found = [(self.run.summary.steps, self.accuracy)]
        accuracy_s, items_s = self.column("eval/accuracy"), self.column("eval/num_problems")
        for step, accuracy, items in zip(self.steps, accuracy_s, items_s, strict=True):
            if np.isfinite(accuracy):
                found.append((int(step), proportion_interval(round(accuracy * items), int(items))))
        return max(found, key=lambda one: (one[1].value, -one[0]))

    @property
    def steps(self) -> NDArray[np.int64]:
        """Of the metrics' rows, increasing, [s]."""
        return self.run.metrics["step"].astype(np.int64)

    def column(self, metric: str) -> NDArray[np.float64]:
        """One metric over the steps, [s]; NaN throughout if the run never logged it."""
        return self.run.metrics.get(metric, np.full(len(self.run.metrics["step"]), np.nan))

    @property
    def ranks(self) -> Mapping[str, int]:
        """Module -> rank at the end; empty in full fine-tuning."""
        return self.run.summary.rank_pattern

    @property
    def seconds(self) -> dict[str, float]:
        """Stage -> seconds of all steps together."""
        return {stage: float(np.nansum(self.column(f"seconds/{stage}"))) for stage in (*STAGES, "other")}

    def layer_norms(self, measure: Measure = "raw", matrices: str = "AB") -> LayerNorms:
        """Gradient norms by layer and step. Raises ResultError when nothing was recorded (full fine-tuning) or all was zero."""
        if not has_gradient(self.run.gradient_profile):
            raise ResultError(f"cell {self.name} ({self.run.path}): its gradient profile has no gradient: full fine-tuning, or no step")
        return layer_norms(self.run.gradient_profile, measure, matrices)


def read_cell(name: str, folder: Path) -> CellResult:
    """A finished cell. Raises ResultError for one that is not finished, or whose files are missing or damaged."""
    finished = folder / FINISHED_FILE
    try:
        json.loads(finished.read_bytes())
    except FileNotFoundError:
        raise ResultError(
            f"cell {name} ({folder}) is not finished: it has no {FINISHED_FILE}. "
            "Run the study again: finished cells are kept, the rest resume"
        ) from None
    except ValueError as error:
        raise ResultError(f"cell {name}: {finished} is damaged: {error}. Remove it and run the study again") from None
    try:
        return CellResult(name, read_run(folder))
    except (RunReadError, MetricsError) as error:
        raise ResultError(f"cell {name} is damaged: {error}. To compute it anew, remove {folder} and run the study again") from None


Cells = Mapping[str, Mapping[int, CellResult]]
"""Strategy -> seed -> cell."""


def by_strategy(folders: Mapping[str, Path]) -> dict[str, dict[int, CellResult]]:
    """Cells named `STRATEGY/seed-N` -> strategy -> seed -> result, seeds in order. Raises ResultError for another name, and read_cell's."""
    found: dict[str, dict[int, CellResult]] = {}
    for name, folder in folders.items():
        match = SEED_IN_NAME.fullmatch(name)
        if match is None:
            raise ResultError(f"cell {name} ({folder}): its name does not end in /seed-N, so it is no repetition of a strategy")
        found.setdefault(match["strategy"], {})[int(match["seed"])] = read_cell(name, folder)
    return {strategy: dict(sorted(cells.items())) for strategy, cells in found.items()}


def stack(cells: Sequence[CellResult], metric: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(steps [s], values [seeds, s]) of one metric over all steps that any cell has; NaN where a cell has no value."""
    steps = np.unique(np.concatenate([cell.steps for cell in cells]))
    values_ns = np.full((len(cells), len(steps)), np.nan)
    for row, cell in zip(values_ns, cells, strict=True):
        row[np.searchsorted(steps, cell.steps)] = cell.column(metric)
    return steps, values_ns
