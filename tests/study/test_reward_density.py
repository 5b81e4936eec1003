"""What the study of reward density makes of runs whose spread, truncation and accuracy are planted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastlora.study.config import load_study_config
from fastlora.study.results import CellResult, Cells, read_cell
from fastlora.study.reward_density import COLLAPSE_STEP, RewardDensity
from tests.study.configs import write_study
from tests.study.synthetic_cell import make_cell

STEPS = 24
SECTION = """
seeds = [0]
[reward_density]
ranks = [1, 16]
full = false
regimes = ["outcome", "process"]
"""


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> CellResult:
    return read_cell("any/seed-0", make_cell(tmp_path_factory.mktemp("cell") / "0", seed=0))


def planted(cell: CellResult, std_s: list[float], *, truncated: float = 0.0, right: bool = True) -> CellResult:
    """The cell with this spread at its steps, this truncation at the last, and all or none of its answers right."""
    steps = np.arange(1, len(std_s) + 1, dtype=float)
    metrics = {"step": steps, "advantage/std": np.array(std_s), "completion/truncated": np.full(len(steps), truncated)}
    answers = tuple(replace(answer, correct=right) for answer in cell.run.eval_after)
    before = tuple(replace(answer, correct=True) for answer in cell.run.eval_before)
    summary = replace(cell.run.summary, steps=len(steps))
    return replace(cell, run=replace(cell.run, metrics=metrics, summary=summary, eval_before=before, eval_after=answers))


def study(folder: Path, more: str = "") -> RewardDensity:
    return RewardDensity(load_study_config(write_study(folder, SECTION + more, study="reward-density")))


@pytest.mark.parametrize(
    ("process_r16", "peaks", "over_the_run"),
    [
        ([2.0] * STEPS, "supported", "supported"),
        ([0.1] * STEPS, "not supported", "not supported"),  # one rank of two at the peak, and less on average
        ([0.1] * (STEPS - 1) + [12.0], "supported", "undecided"),  # a single peak says nothing of the run
    ],
)
def test_the_spread_of_two_regimes(synthetic: CellResult, tmp_path: Path, process_r16: list[float], peaks: str, over_the_run: str) -> None:
    """Under outcome rewards 1 and 1.2 in turn, under process rewards 2 at rank 1 and what is given at rank 16."""
    outcome = planted(synthetic, [1.0, 1.2] * (STEPS // 2))
    cells: Cells = {
        "outcome r 1": {0: outcome},
        "outcome r 16": {0: outcome},
        "process r 1": {0: planted(synthetic, [2.0] * STEPS)},
        "process r 16": {0: planted(synthetic, process_r16)},
    }
    at_peak, in_all = study(tmp_path)._advantage_claims(cells)
    assert (at_peak.verdict, in_all.verdict) == (peaks, over_the_run)
    assert in_all.measured.startswith(f"{np.log((2.0 + np.mean(process_r16)) / 2 / 1.1):.3g} ".replace("-", "−"))


def test_steps_without_any_spread_are_counted(synthetic: CellResult, tmp_path: Path) -> None:
    """Half of the batches under outcome rewards have none: the ratio of means is finite where a mean of logs is not."""
    cells: Cells = {
        f"{regime} r {rank}": {0: planted(synthetic, std_s)}
        for rank in (1, 16)
        for regime, std_s in (("outcome", [0.0, 1.0] * (STEPS // 2)), ("process", [1.0] * STEPS))
    }
    _, in_all = study(tmp_path)._advantage_claims(cells)
    assert in_all.verdict == "supported" and in_all.measured.startswith("0.693 ")


@pytest.mark.parametrize(
    ("steps", "truncated", "right", "collapses", "does_not_end"),
    [
        (COLLAPSE_STEP - 1, 1.0, False, "undecided", "undecided"),
        (COLLAPSE_STEP, 1.0, False, "supported", "supported"),
        (COLLAPSE_STEP, 0.5, False, "supported", "not supported"),  # what a laptop saw: answers of two tokens, all of them wrong
        (COLLAPSE_STEP, 1.0, True, "not supported", "supported"),
    ],
)
def test_only_a_run_that_is_long_enough_says_whether_it_collapses(
    synthetic: CellResult, tmp_path: Path, steps: int, truncated: float, right: bool, collapses: str, does_not_end: str
) -> None:
    short = planted(synthetic, [1.0] * 8, truncated=1.0, right=False)
    longer = planted(synthetic, [1.0] * steps, truncated=truncated, right=right)
    claims = study(tmp_path)._collapse_claims({"process r 1": {0: short}, f"process r 16, {steps} steps": {0: longer}})
    assert [claim.verdict for claim in claims] == [collapses, does_not_end]


def test_one_more_process_run_is_as_long_as_asked(tmp_path: Path) -> None:
    (cells,) = study(tmp_path, "collapse_rank = 4\ncollapse_steps = 90\n").plan()
    assert cells[0].name == "process r 4, 90 steps/seed-0"
    assert (cells[0].config.trainer.steps, cells[0].config.lora.r, cells[0].config.eval.every) == (90, 4, 10)
    assert 90 not in {cell.config.trainer.steps for cell in cells[1:]} and len(cells) == 5
