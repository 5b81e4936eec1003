"""A run folder comes back as it was written; every missing or damaged file is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fastlora.analysis.run_reader import RunReadError, read_run
from fastlora.metrics import MetricsError
from tests.analysis.synthetic_run import HOSTILE, make_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "sums", layers=3, steps=12, problems=20)


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(finished, tmp_path / "sums"))


def test_a_finished_run_comes_back(finished: Path) -> None:
    run = read_run(finished)
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_bytes().splitlines()]
    assert run.metrics["step"].tolist() == list(range(1, 13))
    np.testing.assert_array_equal(run.metrics["loss"], [row["loss"] for row in rows])
    assert np.flatnonzero(np.isfinite(run.metrics["eval/accuracy"])).tolist() == [9], "absent in every row but that of step 10"
    assert np.isnan(run.metrics["completion/truncated"][11]), "null in the file"
    assert run.config["trainer"]["steps"] == 12
    assert "torch" in run.environment["packages"]
    assert run.summary.name == "sums"
    assert run.gradient_profile.num_rows == 12 * 2 * sum(rank > 0 for rank in run.summary.rank_pattern.values())
    assert [answer.index for answer in run.eval_after] == list(range(20))
    assert run.eval_before[1].completion == HOSTILE, "a line separator inside a text splits no line"
    assert run.completions[2].rewards == {"first_integer": None}
    assert run.completions[2].advantage is None


@pytest.mark.parametrize(
    "name",
    ["config.json", "summary.json", "metrics.jsonl", "completions.jsonl", "gradient_profile.parquet", "environment.json",
     "eval_before.jsonl", "eval_after.jsonl"],
)  # fmt: skip
def test_a_missing_file_is_named(run_dir: Path, name: str) -> None:
    (run_dir / name).rename(run_dir / "elsewhere")
    with pytest.raises((RunReadError, MetricsError), match=name):
        read_run(run_dir)


@pytest.mark.parametrize(
    "name",
    ["config.json", "summary.json", "environment.json", "gradient_profile.parquet/step-000001.parquet", "metrics.jsonl",
     "eval_after.jsonl"],
)  # fmt: skip
def test_a_truncated_file_is_named(run_dir: Path, name: str) -> None:
    data = (run_dir / name).read_bytes()
    (run_dir / name).write_bytes(data[: len(data) - 9])
    with pytest.raises((RunReadError, MetricsError), match=name):
        read_run(run_dir)


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("metrics.jsonl", '{"step": 2, "loss": "low"}', r"metrics\.jsonl, line 2: loss: .*number"),
        ("metrics.jsonl", '{"step": 1}', r"metrics\.jsonl: the steps of its rows do not increase"),
        ("completions.jsonl", '{"step": 2}', r"completions\.jsonl, line 2: prompt: "),
        ("eval_before.jsonl", "nonsense", r"eval_before\.jsonl, line 2: "),
    ],
)
def test_a_damaged_line_is_numbered(run_dir: Path, name: str, line: str, message: str) -> None:
    lines = (run_dir / name).read_bytes().split(b"\n")
    lines[1] = line.encode()
    (run_dir / name).write_bytes(b"\n".join(lines))
    with pytest.raises(RunReadError, match=message):
        read_run(run_dir)


def test_answers_to_different_problems_are_not_compared(run_dir: Path) -> None:
    lines = (run_dir / "eval_after.jsonl").read_bytes().split(b"\n")
    (run_dir / "eval_after.jsonl").write_bytes(b"\n".join(lines[1:]))
    with pytest.raises(RunReadError, match=r"20 and 19 answers.*paired comparison is impossible"):
        read_run(run_dir)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunReadError, match=r"no run folder: it has no config\.json"):
        read_run(tmp_path)
