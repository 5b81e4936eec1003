"""From made-up measurements: the JSON keys that issue 3 names, every ratio the right way up, the fields of a row."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from bench.accuracy import Errors
from bench.contender import Contender
from bench.gemm_peak import Work
from bench.race import Result
from bench.report import TARGETS, Measured, json_line, merge_summary, print_tables, summary, write_rows

REQUIRED = {
    *("update_speedup_default", "update_speedup_best", "update_speedup_plain", "full_finetune_ratio", "flop_ratio"),
    *("memory_ratio_default", "memory_ratio_best", "contenders", "gemm_share_bf16", "gemm_share_fp32", "step_speedup"),
    *("step_speedup_best", "logprob_error_ratio", "gradient_error_ratio", "commit", "device"),
}
ROW = {
    *("op", "implementation", "device", "dtype", "shape", "median", "p20", "p80", "gflop_per_s", "gb_per_s"),
    *("share_of_peak", "x_baseline", "peak_bytes", "commit"),
}

OURS, TRL, SMALL = Contender("fastlora", "bfloat16"), Contender("trl"), Contender("trl", "bfloat16", 4)


def result(contender: Contender, seconds: float, peak_bytes: int) -> Result:
    return Result(contender, [seconds, 100.0, seconds / 2, seconds, seconds], [2 * seconds] * 5, peak_bytes)


def measured() -> Measured:
    ours, full = result(OURS, 4.0, 3 << 30), result(replace(OURS, method="full"), 5.0, 6 << 30)
    default, small = result(TRL, 20.0, 15 << 30), result(SMALL, 16.0, 4 << 30)
    return Measured(
        shape="tiny",
        threads=2,
        cosines={"fastlora float32 mb16": 1.0},
        trials=[small],
        updates={
            "default": (ours, default),
            "best": (ours, small),
            "plain": (ours, result(Contender("plain"), 12.0, 1)),
            "full": (ours, full),
        },
        steps={"default": (ours, result(TRL, 40.0, 1)), "best": (ours, result(SMALL, 10.0, 1))},
        errors={
            "bfloat16": (Errors(1.0, 3.0, (3.0,)), Errors(2.0, 4.0, (4.0,))),
            "float32": (Errors(1.0, 1.0, (1.0,)), Errors(1.0, 2.0, (2.0,))),
        },
        lora=Work(Counter({(10, 10, 10): 1}), attention_flops=1000.0),
        full=Work(Counter({(10, 10, 10): 2}), attention_flops=1000.0),
        gemms={
            "bfloat16": (result(OURS, 4.0, 1), result(Contender("gemm", "bfloat16"), 2.0, 1)),
            "float32": (result(OURS, 8.0, 1), result(Contender("gemm", "float32"), 4.0, 1)),
        },
    )


def test_json() -> None:
    numbers = json.loads(json_line(measured()))
    assert numbers.keys() >= REQUIRED
    assert {target.key for target in TARGETS} <= numbers.keys()
    assert all({"name", "seconds", "settings", "peak_bytes"} <= contender.keys() for contender in numbers["contenders"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("update_speedup_default", 20 / 4),
        ("update_speedup_best", 16 / 4),
        ("update_speedup_plain", 12 / 4),
        ("full_finetune_ratio", 4 / 5),
        ("flop_ratio", 3000 / 5000),
        ("memory_ratio_default", 3 / 15),
        ("memory_ratio_best", 3 / 4),
        ("gemm_share_bf16", 3000 / (4 * 1000)),
        ("gemm_share_fp32", 3000 / (8 * 500)),
        ("step_speedup", 40 / 4),
        ("step_speedup_best", 10 / 4),
        ("logprob_error_ratio", 1 / 2),
        ("gradient_error_ratio", 3 / 4),
        ("gradient_error_ratio_fp32", 1 / 2),
    ],
)
def test_ratios(key: str, value: float) -> None:
    assert summary(measured())[key] == pytest.approx(value)


def test_rows_are_appended(tmp_path: Path) -> None:
    path = write_rows(measured(), tmp_path)
    assert write_rows(measured(), tmp_path) == path
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 2 * (8 + 4)
    assert all(row.keys() >= ROW for row in rows)
    assert (rows[0]["x_baseline"], rows[1]["x_baseline"]) == (5.0, 1.0)
    full = next(row for row in rows if row["implementation"].endswith("full"))
    assert full["gflop_per_s"] == pytest.approx(1e-6), "full fine-tuning has its own FLOPs"


def test_parts_measured_again_go_into_the_last_summary(tmp_path: Path) -> None:
    """As a new line, which says what is newer than the rest."""
    summaries = write_rows(measured(), tmp_path).with_name("train_step_summary.jsonl")
    merged = merge_summary({"gemm_share_bf16": 0.9}, ["gemms"], tmp_path)
    first, last = (json.loads(line) for line in summaries.read_text().splitlines())
    assert last == merged and last["again"].keys() == {"gemms"} and last["gemm_share_bf16"] == 0.9
    assert {name for name in last if last[name] != first.get(name)} == {"gemm_share_bf16", "again"}
    assert merge_summary({}, ["errors"], tmp_path)["again"].keys() == {"gemms", "errors"}


def test_tables_show_every_contender_and_every_target() -> None:
    console = Console(record=True, width=200)
    print_tables(measured(), console)
    text = console.export_text()
    assert all(name in text for name in ("trl bfloat16 mb4", "plain float32 mb16", "fastlora bfloat16 mb16 full", "missed", "met"))
    assert all(target.what in text for target in TARGETS)
