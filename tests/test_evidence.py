"""The facts behind README's matrix, in a small checkout: baseline, kernels of an op's file, a card's rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastlora import doctor
from fastlora.evidence import COMPILED, NOT_RUN, TESTED, Evidence, EvidenceError
from fastlora.ops import swiglu
from fastlora.ops.registry import Dispatch, dispatchers

CARD = "NVIDIA H100 80GB HBM3"
TRITON = """
@triton.jit
def _helper(x): ...

@triton.jit(do_not_specialize=["T"])
def one_kernel(x): ...

@jit
def two_kernel(x): ...
"""
CUDA = "__global__ void __launch_bounds__(256) three_kernel(float* x) { }\ntemplate <class T> __global__ void four_kernel(const T* x);\n"


def checkout(root: Path, baseline: dict[str, object]) -> Path:
    """Kernels of swiglu, and a baseline."""
    for name, text in (
        ("kernels/fastlora_triton/swiglu.py", TRITON),
        ("csrc/cuda/swiglu.cuh", CUDA),
        ("bench/compile_baseline.json", json.dumps(baseline)),
    ):
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text(text)
    return root


def dispatch(*names: str) -> Dispatch:
    """Of swiglu with implementations of these names; not among the package's ops."""
    made = Dispatch("swiglu", swiglu._reference)
    dispatchers["swiglu"] = swiglu._forward
    for name in names:
        made.add(name)(swiglu._reference)
    return made


ALL = {"3.9.0": {"one_kernel bf16": 90, "two_kernel fp32": 30}, "nvcc 13.0": {"three_kernel cuda": 40, "four_kernel bf16": 20}}


def test_states(tmp_path: Path) -> None:
    evidence, op = Evidence(checkout(tmp_path, ALL)), dispatch("cpp", "triton", "cuda", "liger")
    assert [evidence.state(op, name) for name in ("reference", "cpp", "triton", "cuda", "liger", "torch")] == [
        *(TESTED, TESTED),
        *(COMPILED, COMPILED),
        NOT_RUN,
        None,
    ]


@pytest.mark.parametrize("missing", ["one_kernel bf16", "two_kernel fp32"])
def test_a_kernel_outside_the_baseline_is_not_compiled(tmp_path: Path, missing: str) -> None:
    kept = {"3.9.0": {name: registers for name, registers in ALL["3.9.0"].items() if name != missing}}
    assert Evidence(checkout(tmp_path, kept)).state(dispatch("triton"), "triton") == NOT_RUN


def test_a_cards_rows_name_it_and_only_times_count(tmp_path: Path) -> None:
    rows = tmp_path / "bench" / "results" / "nvidia-h100" / "gpu.jsonl"
    evidence, op = Evidence(checkout(tmp_path, ALL)), dispatch("triton", "liger")
    rows.parent.mkdir(parents=True)
    written = [("triton", 1e-4), ("liger", None), ("reference", 2e-4)]
    rows.write_text("".join(json.dumps({"op": "swiglu", "implementation": i, "median": m, "device": CARD}) + "\n" for i, m in written))
    assert evidence.state(op, "triton") == f"tested on {CARD}"
    assert evidence.state(op, "liger") == NOT_RUN


def test_outside_of_a_checkout_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(EvidenceError, match="is not a checkout of fastlora"):
        Evidence(tmp_path)


def test_cells_say_what_the_two_directions_do_not_share(tmp_path: Path) -> None:
    evidence = Evidence(checkout(tmp_path, ALL))
    titles = {"torch": "torch", "cpp": "C++"}
    both, forward_only = dispatch("torch", "cpp"), dispatch("torch")
    assert doctor._cell(titles, both, both, evidence) == "tested (torch, C++)"
    assert doctor._cell(titles, both, forward_only, evidence) == "tested (torch); forward tested, backward – (C++)"
    assert doctor._cell({"triton": ""}, dispatch("triton"), None, evidence) == COMPILED
    assert doctor._cell({"cuda": ""}, both, both, evidence) == "–"
