"""bench.ops on tiny shapes: a case for every op, a gate that sees a wrong result, rows and peaks computed right, a command that runs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

import bench.test_ops
from bench.gemm_peak import Group, Model
from bench.op_cases import Case, Update, adapter_segments, cases
from bench.ops import Peaks, main, ops_rows
from bench.test_ops import GateError, check
from fastlora.ops.registry import Implementation, dispatchers, use_implementation

MODEL = Model(
    num_hidden_layers=2,
    hidden_size=96,
    intermediate_size=40,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=32,
    vocab_size=131,
)
UPDATE = Update(MODEL, (Group(7, (5, 5)), Group(3, (5, 5))), rank=3, tile_rows=6)
CASES = list(cases(UPDATE))


def test_every_op_has_a_case_with_a_name_of_its_own() -> None:
    assert {case.spec.name for case in CASES} == set(dispatchers)
    assert max(Counter(case.name for case in CASES).values()) == 1


def test_sizes_of_the_update() -> None:
    assert (UPDATE.tokens, UPDATE.rows, UPDATE.samples) == (7 + 4 + 4 + 3 + 4 + 4, 20, 4)
    full = Update(MODEL, (Group(115, (128,) * 4),) * 4, 32, 256)
    assert (full.tokens, full.rows, full.samples) == (2492, 2048, 16)


def test_adapter_fills_its_buffer() -> None:
    segments = adapter_segments(MODEL, 3)
    assert len(segments) == 2 * 2 * 7
    assert [s.offset for s in segments[1:]] == [s.offset + s.numel for s in segments[:-1]]
    assert sum(s.numel for s in segments) == 2 * 3 * sum(d + n for d, n in MODEL.projections.values())


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
@torch.no_grad()
def test_gate_passes_and_products_are_the_cost(case: Case) -> None:
    """Where an op consists of its listed products, their 2 m k n are its cost()'s FLOPs (the head's list is of one tile)."""
    for name, implementation in dispatchers[case.spec.name].implementations.items():
        if implementation.refuses(torch.device("cpu")) is None:
            for dtype in case.dtypes:
                with use_implementation(name):
                    arguments = case.arguments(dtype)
                check(case, name, dtype, arguments)
    if case.spec.name.startswith("lora_linear"):
        assert sum(2 * m * k * n * count for (m, k, n), count in case.gemms.items()) == case.spec.cost(*arguments).flops


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("op", ["swiglu", "logprob_rows_backward"])
@torch.no_grad()
def test_gate_sees_a_wrong_result(op: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five per cent too much in an output, or in what is overwritten in place."""
    implementations, right = dispatchers[op].implementations, dispatchers[op].implementations["reference"].run

    def wrong(*arguments: torch.Tensor) -> torch.Tensor | None:
        y = right(*arguments)
        if y is None:
            arguments[0].mul_(1.05)
        return None if y is None else 1.05 * y

    monkeypatch.setitem(implementations, "torch", Implementation("torch", wrong, lambda device, *args: None))
    (case,) = [case for case in CASES if case.spec.name == op]
    with pytest.raises(GateError, match=rf"{op}.* torch, torch\.\w+: output 0 is off"):
        check(case, "torch", dtype, case.arguments(dtype))


class FixedPeaks(Peaks):
    """100 GFLOP/s in bfloat16, 50 in float32; 10 GB/s."""

    def __init__(self) -> None:
        super().__init__(lambda message: None)

    def gemm(self, gemms: Counter[tuple[int, int, int]], dtype: str) -> float:
        assert gemms == Counter({(2, 3, 4): 5})
        return 100e9 if dtype == "bfloat16" else 50e9

    def copy(self, nbytes: int) -> float:
        return 10e9


def test_rows() -> None:
    def entry(name: str, dtype: str, seconds: float, gemms: list[list[int]]) -> dict[str, object]:
        info = {"op": "an_op", "implementation": name, "dtype": dtype, "shape": "s" * (1 + len(gemms)), "flops": 40e9, "bytes": 5e9}
        return {"stats": {"data": [seconds] * 3}, "extra_info": {**info, "gemms": gemms}}

    product = [[2, 3, 4, 5]]
    entries = [
        entry("reference", "bfloat16", 2.0, product),
        entry("cpp", "bfloat16", 0.5, product),
        entry("reference", "float32", 4.0, product),
        entry("reference", "bfloat16", 1.0, []),
    ]
    rows = ops_rows(entries, FixedPeaks(), threads=2, device="cpu", commit_id=None)
    assert [row["share_of_peak"] for row in rows] == pytest.approx([0.2, 0.8, 0.2, 0.5])
    assert [row["x_baseline"] for row in rows] == pytest.approx([1.0, 4.0, 1.0, 1.0])
    assert [row["bound"] for row in rows] == ["gemm"] * 3 + ["memory"]
    assert rows[1]["gflop_per_s"] == pytest.approx(80.0) and rows[1]["gb_per_s"] == pytest.approx(10.0)


def test_peaks_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        monkeypatch.delenv(name, raising=False)  # the suite may be run by xdist, under which pytest-benchmark times nothing
    monkeypatch.setattr("bench.gemm_peak.MIN_SECONDS", 0.0)
    monkeypatch.setattr("bench.ops.COPY_SECONDS", 0.001)
    said: list[str] = []
    peaks = Peaks(said.append)
    gemms = Counter({(8, 8, 8): 2})
    assert peaks.gemm(gemms, "float32") == peaks.gemm(gemms, "float32") > 0
    assert peaks.copy(1 << 12) == peaks.copy(1 << 12) > 0
    assert len(said) == 1


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Two ops, one round each: pytest-benchmark in this process, rows on the disk, the list of them last."""
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        monkeypatch.delenv(name, raising=False)  # the suite may be run by xdist, under which pytest-benchmark times nothing
    monkeypatch.setattr("bench.gemm_peak.MIN_SECONDS", 0.0)
    monkeypatch.setattr("bench.ops.COPY_SECONDS", 0.001)
    monkeypatch.setattr("bench.ops.TIMING", ("--benchmark-min-rounds=1", "--benchmark-max-time=0.0001"))
    monkeypatch.setattr(bench.test_ops, "smollm2_update", lambda: UPDATE)
    monkeypatch.setattr(bench.test_ops, "cases", lambda update: [c for c in CASES if c.spec.name in ("swiglu", "grpo_loss")])
    assert main(["--json", "--threads", "1", "--out", str(tmp_path)]) == 0
    rows = json.loads(capfd.readouterr().out.splitlines()[-1])
    (path,) = tmp_path.glob("*/ops.jsonl")
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    assert {(row["op"], row["dtype"]) for row in rows} == {("swiglu", "bfloat16"), ("swiglu", "float32"), ("grpo_loss", "float32")}

    def broken(case: Case, *rest: object) -> None:
        raise GateError("planted")

    monkeypatch.setattr(bench.test_ops, "check", broken)
    assert main(["--out", str(tmp_path / "none")]) == 1
    assert not (tmp_path / "none").exists()
