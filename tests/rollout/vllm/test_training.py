"""Whole runs whose rollouts come from the engine: on time and one step ahead, stopped and resumed to the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastlora.interrupt import Interrupted
from fastlora.metrics import MetricsWriter
from fastlora.objectives import PolicyObjective
from fastlora.rollout.vllm import build
from fastlora.rollout.vllm.weight_files import send_weights, write_weights
from tests import tolerances
from tests.rollout.vllm.engines import KeptEngine, tiny_model
from tests.trainer.runs import adapter_tensors, run, write_config

AHEAD = {"vllm.staleness": "1", "loss.sampler_correction": '"token_truncate"'}


@pytest.fixture
def shared(engine: KeptEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs use the engine that is there instead of starting their own."""
    monkeypatch.setattr(build, "_servers", lambda *_: [engine])


def config_of(folder: Path, model_folder: Path, **changes: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return write_config(folder, **{"rollout.sampler": '"vllm"', "model.name": f'"{model_folder}"', **changes})


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def unclocked(folder: Path) -> list[dict[str, float]]:
    clocked = ("seconds", "per_second", "memory/")
    return [{name: value for name, value in row.items() if not any(part in name for part in clocked)} for row in rows(folder)]


@pytest.mark.parametrize("changes", [{}, AHEAD], ids=["on time", "one step ahead"])
def test_a_run_and_its_resumption(changes: dict[str, str], shared: None, model_folder: Path, tmp_path: Path, monkeypatch) -> None:
    config = config_of(tmp_path, model_folder, **changes)
    assert run(config, "--name", "whole") == 0
    whole = tmp_path / "runs" / "whole"
    log_step = MetricsWriter.step

    def interrupted(self: MetricsWriter, number: int, metrics) -> None:
        log_step(self, number, metrics)
        if number == 2:
            raise Interrupted

    monkeypatch.setattr(MetricsWriter, "step", interrupted)
    assert run(config, "--name", "broken") == 130
    monkeypatch.setattr(MetricsWriter, "step", log_step)
    assert run("--resume", str(tmp_path / "runs" / "broken")) == 0
    broken = tmp_path / "runs" / "broken"
    one, other = adapter_tensors(whole), adapter_tensors(broken)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [row["reward/mean"] for row in unclocked(whole)] == [row["reward/mean"] for row in unclocked(broken)]
    assert (whole / "completions.jsonl").read_text() == (broken / "completions.jsonl").read_text()
    staleness = [row["sampler/staleness"] for row in rows(whole)]
    assert staleness == ([0, 1, 1, 1] if changes else [0, 0, 0, 0])
    versions = [json.loads(line)["adapter_version"] for line in (whole / "completions.jsonl").read_text().splitlines()]
    assert sorted(set(versions)) == ([0, 1, 2] if changes else [0, 1, 2, 3])


def test_ahead_interrupted_inside_a_step(shared: None, model_folder: Path, tmp_path: Path, monkeypatch) -> None:
    """Between a step's rollout and its update, with reasoning-gym's problems, whose metadata JSON cannot hold."""
    sums = {
        "data.source": '"reasoning_gym:chain_sum"',
        "data.options": "{ max_terms = 2, max_digits = 1 }",
        "data.train_size": "12",
        "data.max_prompt_length": "96",
        "data.eval_path": '"none"',
    }
    config = config_of(tmp_path, model_folder, **AHEAD, **sums)
    config.write_text("".join(line for line in config.read_text().splitlines(True) if "eval_path" not in line))
    assert run(config, "--name", "whole") == 0
    collect = PolicyObjective.collect

    def interrupted(self: PolicyObjective, step: int, *arguments):
        data = collect(self, step, *arguments)
        if step == 3:
            raise Interrupted
        return data

    monkeypatch.setattr(PolicyObjective, "collect", interrupted)
    assert run(config, "--name", "broken") == 130
    monkeypatch.setattr(PolicyObjective, "collect", collect)
    assert run("--resume", str(tmp_path / "runs" / "broken")) == 0
    one, other = (adapter_tensors(tmp_path / "runs" / name) for name in ("whole", "broken"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    logs = [(tmp_path / "runs" / name / "completions.jsonl").read_text() for name in ("whole", "broken")]
    assert logs[0] == logs[1]


def test_on_time_the_sides_agree_and_ahead_they_differ_by_a_step(shared: None, model_folder: Path, tmp_path: Path) -> None:
    for name, changes in (("on-time", {}), ("ahead", AHEAD)):
        assert run(config_of(tmp_path / name, model_folder, **changes), "--name", name) == 0
    on_time, ahead = (rows(tmp_path / name / "runs" / name) for name in ("on-time", "ahead"))
    assert all(row["mismatch/abs_max"] <= tolerances.SAMPLER_LOGP_FP32 for row in on_time)
    assert ahead[0]["mismatch/abs_max"] <= tolerances.SAMPLER_LOGP_FP32
    assert all(row["mismatch/abs_max"] > 10 * tolerances.SAMPLER_LOGP_FP32 for row in ahead[1:])
    assert all(row["mismatch/ratio_max"] > 1 for row in ahead[1:])
    for row in on_time:
        assert {"sampler/restarts", "sampler/sampling_seconds"} <= row.keys()
    assert {"sampler/swap_seconds", "sampler/canary_max_abs"} <= on_time[1].keys()


WEIGHTS = {
    "full": {"method": '"full"', "lora.rank_pattern": "{}", "optim.lr": "1e-3"},
    "merged": {"vllm.weights": '"merged"'},
    "auto": {"vllm.weights": '"auto"'},
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_themselves_reach_the_engine(
    case: str, shared: None, engine: KeptEngine, model_folder: Path, tmp_path: Path, capsys
) -> None:
    """Full fine-tuning and merged copies: what was sampled has the trainer's log-probabilities at every step. Last, the base goes back."""
    base = engine.client.worker("fastlora_weight_checksums")
    try:
        assert run(config_of(tmp_path, model_folder, **WEIGHTS[case]), "--name", "x") == 0
        steps = rows(tmp_path / "runs" / "x")
        assert all(row["mismatch/abs_max"] <= tolerances.SAMPLER_LOGP_FP32 for row in steps)
        assert all(row["sampler/canary_undecided"] == 0 for row in steps[1:])
        moved = engine.client.worker("fastlora_weight_checksums") != base
        chosen = capsys.readouterr().out
        assert moved == (case != "auto" or "merged copy it is" in chosen)
        if case == "auto":
            assert "vllm.weights = 'auto': swap and sampling of a step, measured: adapter " in chosen
    finally:
        folder = tmp_path / "base"
        write_weights(folder, tiny_model().module.named_parameters(), torch.float32, version="base", complete=True)
        send_weights(engine.client.call, folder, "base")
    assert engine.client.worker("fastlora_weight_checksums") == base
