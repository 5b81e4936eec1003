"""--dry-run prints the plan of the shipped configs without their weights."""

from __future__ import annotations

from pathlib import Path

import pytest

import train

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("name", ["qwen2.5-1.5b_gsm8k_1xh100", "qwen3-1.7b_math_1xh100"])
def test_dry_run_needs_no_weights(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([str(CONFIGS / f"{name}.toml"), "--dry-run"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "expected peak" in shown and "groups that share an input" in shown and "keys and values" in shown


def test_the_reference_path_is_not_planned(capsys: pytest.CaptureFixture[str]) -> None:
    config = CONFIGS / "qwen3-1.7b_math_1xh100.toml"
    assert train.main([str(config), "--dry-run", "--trainer.implementation", "reference"]) == 0
    shown = capsys.readouterr().out
    assert "memory: not planned" in shown and "expected peak" not in shown


def test_an_engine_of_our_own_is_planned_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([str(CONFIGS / "qwen2.5-1.5b_gsm8k_1xh100.toml"), "--dry-run", "--rollout.sampler", "vllm"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "vLLM's engine: KV cache of" in shown and "expected peak with the engine" in shown and "while the trainer updates" in shown


def test_models_of_rewards_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Whether they have weights of their own; the memory plan counts the policy alone."""
    config = [str(CONFIGS / "qwen3-1.7b_math_1xh100.toml"), "--dry-run", "--reward.grader", "outcome"]
    assert train.main([*config, "--reward.functions", "process"]) == 0
    assert "reward process: peiyi9979/math-shepherd-mistral-7b-prm, weights of its own, which" in " ".join(capsys.readouterr().out.split())
    assert train.main([*config, "--reward.functions", "distillation", "--reward.distillation.adapter", "teacher"]) == 0
    assert "reward distillation: Qwen/Qwen3-1.7B-Base, the base weights of the model that" in " ".join(capsys.readouterr().out.split())
