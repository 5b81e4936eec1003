"""One attempt at one cell, in this process: its log, its lock, how it ends; a training run that goes on from its checkpoint. No Ray."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from fastlora.config import load_config
from fastlora.metrics import MetricsWriter, RunSummary
from fastlora.study.cells import Cell
from fastlora.study.worker import BusyError, locked, run_cell
from tests.study.configs import quick_cell as cell
from tests.trainer.runs import adapter_tensors, write_config


def test_only_errors_that_may_pass_are_tried_again(tmp_path: Path) -> None:
    outcomes = {
        task: run_cell(cell(task, task), tmp_path / task, 1, Path.cwd()) for task in ("refuse", "explode", "lose_engine", "interrupt")
    }
    assert {task: (outcome.state, outcome.retry) for task, outcome in outcomes.items()} == {
        "refuse": ("failed", False),
        "explode": ("failed", True),
        "lose_engine": ("failed", True),
        "interrupt": ("stopped", False),
    }


def test_an_attempt_waits_for_the_one_before_it_and_does_not_repeat_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A killed command's worker may live for a moment; two must not write one folder."""
    one, cwd = cell("one", "write"), Path.cwd()
    folder = tmp_path / one.key
    assert run_cell(one, folder, 1, cwd).state == "finished"
    assert run_cell(one, folder, 1, cwd).state == "finished"
    assert len((folder / "ran.txt").read_text().splitlines()) == 1
    with locked(tmp_path / ".lock", 0.0), pytest.raises(BusyError, match="another process writes"), locked(tmp_path / ".lock", 0.2):
        pass
    print("back on the terminal")
    assert capfd.readouterr().out == "back on the terminal\n"


def test_a_stopped_training_cell_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that misses eval.required_gain is finished all the same."""
    one = Cell("one", load_config(write_config(tmp_path, **{"eval.required_gain": "0.5"})))
    assert run_cell(one, tmp_path / "whole", 1, Path.cwd()).state == "finished"
    step = MetricsWriter.step

    def interrupted(self: MetricsWriter, number: int, metrics: Mapping[str, float]) -> None:
        step(self, number, metrics)
        if number == 3:
            raise KeyboardInterrupt

    broken = tmp_path / "broken"
    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "step", interrupted)
        assert run_cell(one, broken, 1, Path.cwd()).state == "stopped"
    assert not (broken / "finished.json").exists() and not (broken / "summary.json").exists()
    assert run_cell(one, broken, 2, Path.cwd()).state == "finished"
    assert "Resuming" in (broken / "log.txt").read_text() and RunSummary.read(broken).learned is False
    assert json.loads((broken / "finished.json").read_text()) | {"seconds": 0} == {
        "name": "one",
        "task": "train",
        "key": "broken",
        "seconds": 0,
        "attempts": 2,
    }
    first, second = adapter_tensors(tmp_path / "whole"), adapter_tensors(broken)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
