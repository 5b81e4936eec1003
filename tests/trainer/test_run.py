"""A whole run, its folder, and resuming it to the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from fastlora.metrics import RunSummary
from tests.tolerances import FP32_LOGPROB
from tests.trainer.runs import adapter_tensors, run, write_config

REPOSITORY = Path(__file__).parents[2]


def rows(run_folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what the clock and the allocator decide."""
    clocked = ("seconds/", "tokens_per_second", "memory/")
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(clocked)} for line in lines]


def assert_same_run(one: Path, other: Path) -> None:
    """The same adapter bits, metrics, completions and gradient profile."""
    first, second = adapter_tensors(one), adapter_tensors(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert rows(one) == rows(other)
    assert (one / "completions.jsonl").read_text() == (other / "completions.jsonl").read_text()
    profiles = [pq.read_table(folder / "gradient_profile.parquet").to_pylist() for folder in (one, other)]
    assert profiles[0] == profiles[1]


def test_run_leaves_everything_behind(tmp_path: Path) -> None:
    assert run(write_config(tmp_path), "--name", "a") == 0
    folder = tmp_path / "runs" / "a"
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "completions.jsonl",
        "gradient_profile.parquet",
        "eval_before.jsonl",
        "eval_after.jsonl",
        "summary.json",
        "report.html",
        "adapter",
        "checkpoints",
    }
    summary = RunSummary.read(folder)
    assert summary.steps == 4 and summary.learned is None
    assert summary.rank_pattern["model.layers.0.self_attn.q_proj"] == 3
    assert not any("k_proj" in name for name in summary.rank_pattern)
    # widths of the tiny Llama: 64, MLP 96, q 64, v 32 (2 KV heads of 16); 2 layers
    per_layer = 3 * (64 + 64) + 4 * (64 + 32) + 4 * (64 + 64) + 2 * 4 * (64 + 96) + 5 * (96 + 64)
    assert summary.trainable_parameters == 2 * per_layer
    metrics = rows(folder)
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    assert sum(row["tokens"] for row in metrics) == summary.tokens
    assert any(tensor.any() for name, tensor in adapter_tensors(folder).items() if "lora_B" in name)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"trainer.implementation": '"reference"', "loss.beta": "0.05"},
        {"trainer.num_iterations": "2", "trainer.gradient_accumulation_steps": "2"},
        {"loss.entropy_coef": "0.01", "loss.use_adaptive_entropy": "true", "loss.entropy_target": "5.0"},
        {"objective": '"sft"', "rollout.num_generations": "1", "advantage.scale_rewards": '"none"', "log.gradient_cosine": "true"},
        {"model.quantization": '"nf4"'},
    ],
    ids=["default", "reference-kl", "iterations", "entropy", "sft, cosines", "nf4"],
)
def test_resumed_run_has_the_bits_of_an_unbroken_one(tmp_path: Path, changes: dict[str, str]) -> None:
    config = write_config(tmp_path, **changes)
    assert run(config, "--name", "whole") == 0
    broken = tmp_path / "runs" / "broken"
    command = [sys.executable, "train.py", str(config), "--name", "broken"]
    # Dies at the worst moment: right after step 3 was logged, before its checkpoint; SIGKILL, so that nothing can be tidied up.
    killer = (
        "import os, signal, sys, fastlora.metrics as m\n"
        "step = m.MetricsWriter.step\n"
        "def dying(self, number, metrics):\n"
        "    step(self, number, metrics)\n"
        "    if number == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "m.MetricsWriter.step = dying\n"
        "import train; sys.exit(train.main(sys.argv[1:]))\n"
    )
    command[1:2] = ["-c", killer]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    assert subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True).returncode == -signal.SIGKILL
    assert not (broken / "summary.json").exists()
    assert run(Path("--resume"), str(broken)) == 0
    assert_same_run(tmp_path / "runs" / "whole", broken)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    config = write_config(tmp_path, **{"trainer.checkpoint_every": "0", "trainer.steps": "6"})
    assert run(config, "--name", "whole") == 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(REPOSITORY / "train.py"), str(config), "--name", "stopped"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    stopped = tmp_path / "runs" / "stopped"
    metrics = stopped / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    if process.returncode == 0:
        pytest.skip("the run finished before the signal arrived")
    assert process.returncode == 130, output
    assert "--resume" in output and "Traceback" not in output
    assert run(Path("--resume"), str(stopped)) == 0
    assert_same_run(tmp_path / "runs" / "whole", stopped)


def test_full_fine_tuning_trains_every_weight(tmp_path: Path) -> None:
    changes = {"method": '"full"', "lora.rank_pattern": "{}", "optim.lr": "1e-3"}
    assert run(write_config(tmp_path, **changes), "--name", "full") == 0
    folder = tmp_path / "runs" / "full"
    assert (folder / "model" / "model.safetensors").exists() and not (folder / "adapter").exists()
    summary = RunSummary.read(folder)
    assert summary.rank_pattern == {} and summary.trainable_parameters > 50_000


def test_full_fine_tuning_holds_on_to_where_it_began(tmp_path: Path) -> None:
    """KL to the reference policy: 0 before the first update, more after every one."""
    changes = {"method": '"full"', "lora.rank_pattern": "{}", "optim.lr": "1e-2", "loss.beta": "0.1"}
    assert run(write_config(tmp_path, **changes), "--name", "full") == 0
    kl = [row["kl"] for row in rows(tmp_path / "runs" / "full")]
    assert abs(kl[0]) < FP32_LOGPROB < kl[1]


def test_run_that_does_not_learn_fails_visibly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(write_config(tmp_path, **{"eval.required_gain": "0.5"}), "--name", "a") == 3
    assert "did not learn" in capsys.readouterr().out
    assert RunSummary.read(tmp_path / "runs" / "a").learned is False


def test_replayed_rollouts_give_the_same_adapter(tmp_path: Path) -> None:
    recording = tmp_path / "rollouts"
    config = write_config(tmp_path)
    assert run(config, "--name", "live", "--rollout.record-path", str(recording)) == 0
    assert run(config, "--name", "replayed", "--rollout.sampler", "replay", "--rollout.replay-path", str(recording)) == 0
    live, replayed = (adapter_tensors(tmp_path / "runs" / name) for name in ("live", "replayed"))
    assert all(torch.equal(live[name], replayed[name]) for name in live)


def test_a_recorded_sampler_is_compared_and_corrected_for(tmp_path: Path) -> None:
    """Recorded at top-p .8: metrics.jsonl says how far the full softmax is from it, and that the renormalised one is not."""
    recording = tmp_path / "rollouts"
    config = write_config(tmp_path, **{"rollout.top_p": "0.8"})
    assert run(config, "--name", "live", "--rollout.record-path", str(recording)) == 0
    replay = ("--rollout.sampler", "replay", "--rollout.replay-path", str(recording), "--loss.sampler-correction", "token_truncate")
    first = {}
    for name, option in (("full", "--loss.no-renormalize-top-p"), ("nucleus", "--loss.renormalize-top-p")):
        assert run(config, "--name", name, *replay, option) == 0
        rows = [json.loads(line) for line in (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        assert all({"mismatch/abs_p99", "mismatch_kl", "mismatch/corrected"} <= row.keys() for row in rows)
        assert "Sampler and trainer" in (tmp_path / "runs" / name / "report.html").read_text()
        first[name] = rows[0]
    assert "mismatch_kl" not in (tmp_path / "runs" / "live" / "metrics.jsonl").read_text()
    assert first["full"]["mismatch/mean"] > 0.05 and first["full"]["mismatch/ratio_max"] < 1
    assert first["nucleus"]["mismatch/abs_max"] < 1e-4
