"""The compile gate: today's kernels pass it, and each of its limits is seen when it is broken."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton kernels need triton")

import torch
import triton

from bench import compile_gate, cuda_gate
from bench.compile_gate import Variant, broken_limits
from bench.cubin import Machine

GOOD = Machine(128, 0, 98304, 8, Counter({"HGMMA.64x128x16.F32.BF16": 8, "UTMALDG.2D": 2, "LDG.E.128": 1}))


@pytest.mark.slow
def test_every_kernel_keeps_the_limits(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One model here; the command takes three, which differ in nothing that the compiler sees."""
    monkeypatch.setattr(compile_gate, "MODELS", {"Qwen2.5-1.5B": compile_gate.MODELS["Qwen2.5-1.5B"]})
    assert compile_gate.main(["--json"]) == 0, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["failures"] == [] and found["max_stack_bytes"] == 0 and found["matrix_kernels_without_hgmma"] == 0
    assert found["kernels"] == len(compile_gate.MATRIX_KERNELS) + 9 + len(cuda_gate.KERNELS) and found["max_shared_bytes"] <= 232448


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 100])
def test_other_architectures_compile_without_spills(
    capability: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_gate, "MODELS", {"Qwen2.5-1.5B": compile_gate.MODELS["Qwen2.5-1.5B"]})
    monkeypatch.setattr(compile_gate, "RANKS", ((32, 32, 32),))
    monkeypatch.setattr(compile_gate, "DTYPES", {"bf16": torch.bfloat16})
    assert compile_gate.main(["--json", "--no-cuda", "--capability", str(capability)]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"stack_bytes": 8}, "8 bytes of stack"),
        ({"shared_bytes": 232449}, "232449 bytes of shared memory"),
        ({"instructions": Counter({"UTMALDG.2D": 2})}, "no wgmma"),
        ({"instructions": GOOD.instructions + Counter({"HMMA.16816.F32.BF16": 4})}, "4 mma.sync"),
        ({"instructions": Counter({"HGMMA.64x128x16.F32.BF16": 8, "LDG.E.U16": 64})}, "no TMA and no 16-byte load"),
        ({"registers": 255, "warps": 16}, "does not fit an SM"),
        ({"registers": 160}, "160 registers, 128 in the baseline"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_limit_is_seen_when_it_is_broken(
    broken: dict[str, object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_gate, "BASELINE", tmp_path / "baseline.json")
    (tmp_path / "baseline.json").write_text(
        json.dumps({triton.__version__: {"shrink_kernel bf16": 128}, "1.0.0": {"shrink_kernel bf16": 1}})
    )
    good = Variant("shrink_kernel", "bf16", "a case", GOOD)
    assert broken_limits([good], 90) == []
    assert f"shrink_kernel bf16 (a case): {message}" in broken_limits([replace(good, machine=replace(GOOD, **broken))], 90)


def test_a_kernel_without_a_baseline_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_gate, "BASELINE", tmp_path / "missing.json")
    assert broken_limits([Variant("new_kernel", "bf16", "a case", GOOD)], 90) == [
        "new_kernel bf16 (a case): not in the baseline: --write-baseline"
    ]


def test_without_nvcc_the_gate_fails_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(compile_gate, "BASELINE", tmp_path / "baseline.json")
    (tmp_path / "baseline.json").write_text(json.dumps({triton.__version__: {"shrink_kernel bf16": 128}}))
    monkeypatch.setattr(compile_gate, "compile_all", lambda *_: [Variant("shrink_kernel", "bf16", "a case", GOOD)])
    monkeypatch.setattr(cuda_gate, "find_nvcc", lambda: None)
    assert compile_gate.main(["--json"]) == 1
    shown = capsys.readouterr()
    (failure,) = json.loads(shown.out.splitlines()[-1])["failures"]
    assert "nvcc was not found" in failure and "--no-cuda" in failure and failure in shown.err
    assert compile_gate.main(["--no-cuda"]) == 0


def test_nvccs_kernels_must_load_16_bytes_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_gate, "BASELINE", tmp_path / "baseline.json")
    (tmp_path / "baseline.json").write_text(json.dumps({triton.__version__: {"sparse_db_kernel bf16": 64}}))
    narrow = Variant("sparse_db_kernel", "bf16", "a file", Machine(64, 0, 30728, 8, Counter({"LDG.E": 9})))
    assert broken_limits([narrow], 90) == ["sparse_db_kernel bf16 (a file): no TMA and no 16-byte load"]
    assert broken_limits([replace(narrow, machine=replace(narrow.machine, instructions=Counter({"LDG.E.128": 1})))], 90) == []


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "ctas"),
    [(32, 0, 4, 16), (128, 0, 8, 2), (255, 0, 8, 1), (64, 98304, 4, 2), (64, 116000, 4, 1), (16, 0, 1, 32), (64, 232449, 4, 0)],
)
def test_ctas_on_an_sm(registers: int, shared: int, warps: int, ctas: int) -> None:
    """By hand from the limits of compute capability 9.0: 65,536 registers, 228 KiB, 64 warps, 32 CTAs."""
    assert Machine(registers, 0, shared, warps, Counter()).ctas_on_an_sm(90) == ctas
