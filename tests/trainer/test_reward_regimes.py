"""Whole runs under rewards that run a model: the same trainer, loss and files whichever it is; a failing one loses nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastlora.metrics import RunSummary
from fastlora.rewards.teacher import Teacher
from fastlora.types import Rollout
from tests.tiny import make_tiny_tokenizer
from tests.trainer.runs import adapter_tensors, run, save_tiny_model, write_config, write_reward


def regime(folder: Path, name: str, **changes: str) -> Path:
    """A config of two steps under the reward `name`; held-out answers are judged by a user's function."""
    settings = {
        "reward.functions": f'["{name}"]',
        "reward.grader": f'"{write_reward(folder)}:digits"',
        "advantage.estimator": '"deposits"',
        "rollout.max_completion_length": "12",
        "trainer.steps": "2",
        "trainer.checkpoint_every": "1",
        **changes,
    }
    return write_config(folder, **settings)


def process(folder: Path, **changes: str) -> Path:
    tags = {"step_tag": '"#"', "positive_tag": '"+"', "negative_tag": '"-"', "model": f'"{folder / "model"}"'}
    return regime(folder, "process", **{f"reward.process.{name}": value for name, value in tags.items()}, **changes)


def distillation(folder: Path, **changes: str) -> Path:
    """The teacher is the adapter of a run that rewarded digits, with other ranks, on the base that the student trains on."""
    teacher = {"lora.r": "6", "lora.rank_pattern": "{ v_proj = 0, up_proj = 2 }", "trainer.steps": "3", "optim.lr": "3e-2"}
    assert run(write_config(folder, **teacher), "--name", "teacher") == 0
    return regime(folder, "distillation", **{"reward.distillation.adapter": f'"{folder / "runs" / "teacher" / "adapter"}"'}, **changes)


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_trained(folder: Path, name: str) -> list[dict[str, float]]:
    """Two steps, finite metrics, an adapter that moved. (That the base did not, the run itself checks.)"""
    metrics = rows(folder)
    assert [row["step"] for row in metrics] == [1, 2] and RunSummary.read(folder).steps == 2
    assert all({f"reward/{name}", "advantage/std", "advantage/max_abs", "reward/frac_zero_std"} <= row.keys() for row in metrics)
    assert all(0 < row["advantage/std"] <= row["advantage/max_abs"] for row in metrics)
    assert any(tensor.any() for key, tensor in adapter_tensors(folder).items() if "lora_B" in key)
    return metrics


@pytest.mark.parametrize(("normalize", "implementation"), [("deposits", "auto"), ("returns", "reference")])
def test_process(tmp_path: Path, normalize: str, implementation: str) -> None:
    changes = {"advantage.normalize": f'"{normalize}"', "trainer.implementation": f'"{implementation}"'}
    assert run(process(tmp_path, **changes), "--name", "a") == 0
    metrics = assert_trained(tmp_path / "runs" / "a", "process")
    assert all(0 < row["reward/process"] < 1 for row in metrics)


def test_distillation(tmp_path: Path) -> None:
    assert run(distillation(tmp_path), "--name", "a") == 0
    metrics = assert_trained(tmp_path / "runs" / "a", "distillation")
    assert all(row["advantage/std"] == pytest.approx(1, abs=0.05) for row in metrics)  # every token's deposit, normalised in its group


def test_full_fine_tuning_under_a_process_reward(tmp_path: Path) -> None:
    """The judge has weights of its own: those of the same name move."""
    changes = {"method": '"full"', "lora.rank_pattern": "{}", "optim.lr": "1e-3"}
    assert run(process(tmp_path, **changes), "--name", "full") == 0
    assert RunSummary.read(tmp_path / "runs" / "full").steps == 2


def test_a_reward_that_turns_nan_stops_the_run_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = distillation(tmp_path)
    assert run(config, "--name", "whole") == 0
    score, calls = Teacher.score, 0

    def broken(self: Teacher, rollout: Rollout) -> Tensor:
        nonlocal calls
        calls += 1
        return score(self, rollout) * (torch.nan if calls == 2 else 1)

    monkeypatch.setattr(Teacher, "score", broken)
    capsys.readouterr()
    assert run(config, "--name", "broken") == 1
    output = " ".join(capsys.readouterr().out.split())
    assert "RewardError: reward distillation deposited nan at token 0 of completion 0 (example" in output
    assert "Saved up to step-" in output and "--resume" in output
    monkeypatch.undo()
    assert run(Path("--resume"), str(tmp_path / "runs" / "broken")) == 0
    whole, broken_one = (adapter_tensors(tmp_path / "runs" / name) for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken_one[name]) for name in whole)


def test_a_teacher_with_another_vocabulary_costs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = make_tiny_tokenizer()
    more.add_tokens(["<think>"])
    save_tiny_model(tmp_path / "model", vocab_size=132)
    more.save_pretrained(tmp_path / "model")
    save_tiny_model(tmp_path / "teacher")
    config = regime(tmp_path, "distillation", **{"reward.distillation.model": f'"{tmp_path / "teacher"}"'})
    assert run(config, "--name", "a") == 1
    assert "RewardError" in (output := " ".join(capsys.readouterr().out.split())) and "has another vocabulary" in output
    assert not (tmp_path / "runs").exists()


def test_a_judge_without_the_tags_costs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(process(tmp_path), "--name", "a", "--reward.process.step-tag", "ки") == 1
    assert "step_tag = 'ки' (2:" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "runs").exists()
