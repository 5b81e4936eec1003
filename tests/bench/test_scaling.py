"""bench.scaling: shapes are what the axes say, predicted work is counted another way, no process twice, time split fully."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench import scaling
from bench.contender import Contender
from bench.gemm_peak import Model
from bench.scaling import POINTS, Machine, entries_rows, scaling_table, split_table, update_rows, vocabulary_rows
from bench.scaling_point import Point, point_config, random_batch, read_point
from bench.time_split import REST, split_by_class
from fastlora.packing import pack
from tests.bench.synthetic_rows import scaling_rows

MACHINE = Machine("cpu", 1, None)
MODEL = Model(2, 64, 96, 4, 2, 16, 131)
FAKE_WORKER = (sys.executable, "-m", "tests.bench.fake_worker")
ALL_POINTS = [pytest.param(point, id=f"{axis} {value}") for axis, points in POINTS.items() for value, point in points.items()]


def quiet(message: str) -> None:
    pass


@pytest.mark.parametrize("point", ALL_POINTS)
def test_batch_packs_to_the_tokens_that_are_predicted(point: Point) -> None:
    packed = pack(random_batch(point, 49152))
    assert len(packed.input_ids_t) == sum(group.inputs for group in point.groups)
    assert len(packed.targets_c) == 16 * point.completion_tokens
    assert len(set(packed.roots)) == point.num_prompts, "completions of a prompt share it"


def test_axes_change_one_thing() -> None:
    assert {point.num_prompts * point.num_generations for point in POINTS["group size"].values()} == {16}
    assert {value: point.num_generations for value, point in POINTS["group size"].items()} == {4: 4, 8: 8, 16: 16}
    assert all(point == Point(rank=value) for value, point in POINTS["rank"].items())
    assert all(point == Point(completion_tokens=value) for value, point in POINTS["completion tokens"].items())


def test_point_reaches_the_run(tmp_path: Path) -> None:
    point = Point(2, 8, 115, 64, rank=128)
    point.write(tmp_path)
    assert read_point(tmp_path) == point
    config = point_config(tmp_path, Contender("fastlora", "bfloat16"), point)
    sizes = (config.rollout.num_prompts, config.rollout.num_generations, config.rollout.max_completion_length, config.lora.r)
    assert sizes == (2, 8, 64, 128)
    assert (config.optimizer_steps, config.model.dtype, config.trainer.implementation) == (config.trainer.steps, "bfloat16", "cpp")


def test_a_shape_on_several_axes_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "POINT_WORKER", FAKE_WORKER)
    monkeypatch.setattr(scaling, "POINTS", {"group size": {4: Point()}, "rank": {8: Point(rank=8), 32: Point()}})
    monkeypatch.setattr(scaling, "write_problems", lambda folder, rows: None)
    rows = list(update_rows(tmp_path, MODEL, MACHINE, 3, quiet))
    assert (tmp_path / "log").read_text().count("run") == 2 * (1 + 3)
    assert [(row["op"], row["value"]) for row in rows] == [("scaling.group_size", 4), ("scaling.rank", 8), ("scaling.rank", 32)]
    assert rows[0]["median"] == rows[2]["median"] == 18.0  # the fake takes 16 + 1, 16 + 2, 16 + 3 seconds
    assert rows[0]["gflop"] == rows[2]["gflop"] > rows[1]["gflop"] > 0
    assert rows[0]["gflop_per_s"] == pytest.approx(rows[0]["gflop"] / 18.0)
    assert all(row["peak_bytes"] > 0 for row in rows)


def test_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "REPEATS", 1)
    rows = list(vocabulary_rows(8, (64, 128), MACHINE, quiet))
    assert [(row["implementation"], row["value"]) for row in rows] == [
        *(("one pass", 64), ("two passes", 64), ("one pass", 128), ("two passes", 128))
    ]
    assert [row["gflop"] * 1e9 for row in rows] == pytest.approx([products * 2 * 512 * 8 * v for v in (64, 128) for products in (2, 3)])


def test_optimizer_state_and_traffic_follow_the_trainable_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two float32 moments an entry and its int32 index; the norms read 1 float and write 2 · 7 in all, a step reads 4 and writes 3."""
    monkeypatch.setattr(scaling, "REPEATS", 1)
    total = 2 * 3 * (4 * 16 + 2 * (2 * 16) + 64 + 96 + 96 + 64)
    rows = list(entries_rows(MODEL, 3, (0.01, 0.1, 1.0), MACHINE, quiet))
    assert rows[-1]["value"] == total
    for row, share in zip(rows, (0.01, 0.1, 1.0), strict=True):
        assert row["value"] == pytest.approx(share * total, rel=0.5)
        assert row["state_bytes"] == 12 * row["value"]
        assert row["gb"] * 1e9 == pytest.approx((8 + 2) * 4 * row["value"] + 2 * 7 * 4)


@pytest.mark.parametrize(
    ("op", "label"),
    [
        ("aten::mm", "GEMM"),
        ("aten::addmm_", "GEMM"),
        ("mkldnn::_linear_pointwise", "GEMM"),
        ("fastlora_cpu::packed_attention_backward", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::_log_softmax_backward_data", "log-prob rows"),
        ("fastlora_cpu::logprob_rows_forward", "log-prob rows"),
        ("aten::_fused_adamw_", "optimizer"),
        ("fastlora_cpu::gradient_norms", "optimizer"),
        ("fastlora_cpu::rms_norm_forward", "norms, rotary, SwiGLU"),
        ("aten::silu_backward", "norms, rotary, SwiGLU"),
        ("aten::mul", "norms, rotary, SwiGLU"),
        ("aten::copy_", REST),
        ("aten::empty", REST),
    ],
)
def test_op_names_fall_into_their_class(op: str, label: str) -> None:
    split = split_by_class([(op, 2.0)], wall_seconds=10.0)
    assert split[label] == (10.0 if label == REST else 2.0)
    assert sum(split.values()) == 10.0


def test_names_of_our_ops_are_those_that_run() -> None:
    """A renamed C++ op would land in `rest`."""
    patterns = ("packed_attention", "logprob_rows", "rms_norm", "swiglu", "adamw", "gradient_norms")
    registered = [name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastlora::")]
    assert all(any(pattern in name for name in registered) for pattern in patterns)


def test_tables() -> None:
    console = Console(record=True, width=200)
    console.print(scaling_table(scaling_rows()))
    console.print(split_table(scaling_rows()))
    text = console.export_text()
    growth = [line.split("│")[5].strip() for line in text.splitlines() if line.startswith("│ rank")]
    assert growth == ["1.00", "4.00", "8.00"]
    assert all(float(a) < float(b) for a, b in pairwise(growth))
    assert "3.00 s (75%)" in text and "0.50 s (20%)" in text
