"""A batch of scoring beside a step of training: both see the same batches, and neither disturbs the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import fastlora.scoring_time
from fastlora.build import build
from fastlora.config import load_config
from fastlora.objectives import PolicyObjective, StepData
from fastlora.scoring import Scorer, ScoringError
from fastlora.scoring_time import SCORING, STEP, run_scoring_time, time_scoring
from fastlora.trainer import Trainer
from fastlora.turns import Turns, TurnsError
from tests.trainer.runs import write_config


def test_both_take_the_same_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collected: list[tuple[int, Sequence[int]]] = []
    own = PolicyObjective.collect

    def collect(self: PolicyObjective, step: int, *args: Any) -> StepData:
        data = own(self, step, *args)
        collected.append((step, data.batch.completion_ids_nt.flatten().tolist()))
        return data

    scorers: list[Scorer] = []
    trainers: list[Trainer] = []
    monkeypatch.setattr(PolicyObjective, "collect", collect)
    monkeypatch.setattr(fastlora.scoring_time, "Scorer", lambda *args: scorers.append(Scorer(*args)) or scorers[-1])
    monkeypatch.setattr(fastlora.scoring_time, "Trainer", lambda *args: trainers.append(Trainer(*args)) or trainers[-1])
    config = load_config(write_config(tmp_path))
    run_scoring_time(config, tmp_path, {"rounds": 3}, print)
    assert [step for step, _ in collected] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert collected[::2] == collected[1::2]  # trained or not, who samples is untouched
    assert {name: len(seconds) for name, seconds in Turns.read(tmp_path).seconds.items()} == {SCORING: 3, STEP: 3}
    assert trainers[0].done.optimizer_step == 4 and 0 < scorers[0].rows.added <= 4
    scored, trained = scorers[0]._adapter, trainers[0].parts.adapter
    assert trained is not None and not any(bool(scored.b_rn(name).any()) for name in scored.slots)
    assert any(bool(trained.b_rn(name).any()) for name in trained.slots)
    fresh = build(config, Console(quiet=True)).adapter
    assert fresh is not None and all(torch.equal(scored.a_rd(name), fresh.a_rd(name)) for name in scored.slots)


def test_bad_options_are_named(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path))
    with pytest.raises(TurnsError, match="options of scoring times: turns is unknown; known are rounds"):
        run_scoring_time(config, tmp_path, {"turns": 3}, print)
    with pytest.raises(TurnsError, match="2 runs, 2 rounds"):
        time_scoring(config, tmp_path, 2)
    with pytest.raises(ScoringError, match="method is set"):
        time_scoring(load_config(write_config(tmp_path, method='"full"', **{"lora.rank_pattern": "{}"})), tmp_path)
