"""The shipped default config on the real SmolLM2, two steps of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastlora.metrics import RunSummary
from tests.trainer.runs import run

CONFIG = Path(__file__).parents[2] / "configs" / "smollm2_sums_cpu.toml"


@pytest.mark.slow
@pytest.mark.xdist_group("real-model")
@pytest.mark.usefixtures("packaged_model")
def test_default_config_trains_the_real_model(tmp_path: Path) -> None:
    shrink = "--trainer.steps 2 --eval.num-problems 32 --eval.every 1 --eval.num-problems-during 8 --eval.required-gain None"
    pass_at_k = "--eval.pass-at-k 1 4 --eval.num-samples 4 --rollout.num-prompts 4"
    assert run(CONFIG, "--output-dir", str(tmp_path), "--name", "a", *shrink.split(), *pass_at_k.split()) == 0
    folder = tmp_path / "a"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and rows[0]["eval/num_problems"] == 8
    summary = RunSummary.read(folder)
    assert summary.trainable_parameters == 4_055_040 and len(summary.rank_pattern) == 210
    assert set(summary.rank_pattern.values()) == {4, 6, 8, 12, 16, 24, 32}
    # The base model answers a good part of these sums, and a nonsensical prompt, mask or position would make that 0.
    assert 0.1 < summary.accuracy_before < 0.7
    assert summary.pass_at_k_after[1][0] <= summary.pass_at_k_after[4][0]
