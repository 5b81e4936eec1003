"""bench.gpu without a GPU: the dry run, the refusal, the gate, turns, shares, and rows of what was refused."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="bench.gpu takes its models from bench.compile_gate, which needs triton")

import bench.gpu
from bench.gpu import TINY, Heat, Peaks, main, op_race, qualify, race_rows, races, take_turns, update_of
from bench.gpu_race import Entrant, Race, needs
from bench.op_cases import cases
from fastlora.ops.registry import Implementation, dispatchers

CPU = torch.device("cpu")


def test_dry_run_builds_every_shape_and_what_runs_here_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run", "--json", "--models", "Qwen2.5-1.5B"]) == 0, capsys.readouterr().err
    captured = capsys.readouterr()
    found = json.loads(captured.out.splitlines()[-1])
    assert found["wrong"] == [] and found["ran_on_the_cpu"] > 50
    raced = {line.split(": ")[1].split()[0] for line in found["races"]}
    assert raced >= {
        *dispatchers,
        "lora_group_step",
        "head_grpo_step",
        "adamw_tensors",
    }
    assert "[8192, 1536]" in "".join(found["races"]) and "not run on a GPU" in captured.err


def test_sizes_are_those_of_the_models() -> None:
    update = update_of("Qwen3-8B")
    assert (update.tokens, update.rows, update.samples) == (8192, 7168, 32)
    assert update.model.projections["q_proj"] == (4096, 4096) and update.model.projections["down_proj"] == (12288, 4096)


def test_without_a_gpu_it_is_refused_by_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["--out", str(tmp_path)]) == 2
    assert "torch sees none here; --dry-run" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_library_that_is_not_there_is_named() -> None:
    assert needs("no-such-kernels", "no_such_kernels")(CPU) == "not installed: no-such-kernels"
    assert needs("triton", "triton")(CPU) == "triton runs on a GPU, the tensors are on cpu"
    assert needs("trl", "trl", gpu=False)(CPU) is None


def test_a_wrong_entrant_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An implementation of an op, and an entrant of a race of its own."""
    right = dispatchers["swiglu"].implementations["reference"].run
    wrong = Implementation("torch", lambda *arguments: 1.1 * right(*arguments), lambda device, *args: None)
    monkeypatch.setitem(dispatchers["swiglu"].implementations, "torch", wrong)
    (case,) = [case for case in cases(TINY) if case.spec.name == "swiglu"]
    heats = {heat.entrant.name: heat for heat in qualify(op_race(case), CPU)}
    assert heats["reference"].refused is None and heats["torch"].run is None
    assert (heats["torch"].refused or "").startswith("wrong: swiglu") and "not timed" in (heats["torch"].refused or "")


@pytest.mark.parametrize(
    ("planted", "message"),
    [
        (lambda x: 1.1 * x, "off by 1.0e-01"),
        (lambda x: x[1:], r"is \[2\], it must be \[3\]"),
        (lambda x: x * float("nan"), "off by nan"),
    ],
    ids=["scaled", "short", "nan"],
)
def test_the_gate_of_the_races(planted: Callable[[Tensor], Tensor], message: str) -> None:
    entrants = [Entrant("planted", lambda: (lambda: [planted(torch.ones(3))], list))]
    race = Race("an_op", "[3]", torch.float32, 1, 1, Counter(), lambda: [torch.ones(3)], entrants, "planted")
    (heat,) = qualify(race, CPU)
    assert heat.run is None and heat.refused is not None and re.search(message, heat.refused)


def test_entrants_take_turns() -> None:
    order: list[str] = []
    heats = [Heat(Entrant(name, lambda: (list, list)), run=lambda name=name: order.append(name)) for name in "AB"]
    take_turns(heats, lambda run: [run() or 2.0])
    assert order == ["A", "B"] * bench.gpu.ROUNDS and heats[0].seconds == [2e-3] * bench.gpu.ROUNDS


def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of cuBLAS on the op's own products and of the copy; × of the baseline; what has no time has no numbers."""
    monkeypatch.setattr(bench.gpu, "card_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(Peaks, "product", lambda self, shape, dtype: {(10, 10, 10): 1e-6, (10, 10, 20): 3e-6}.get(shape, 1.0))
    monkeypatch.setattr(Peaks, "bytes_per_s", 2e12)
    heats = [
        Heat(Entrant(name, lambda: (list, list)), refused, None, seconds)
        for name, refused, seconds in (
            ("torch eager", None, [16e-6] * 3),
            ("fastlora triton", None, [8e-6, 4e-6, 8e-6]),
            ("Liger", "not installed: liger-kernel", []),
        )
    ]
    race = Race("an_op", "s", torch.bfloat16, 8000.0, 4e6, Counter({(10, 10, 10): 2, (10, 10, 20): 1}), list, (), "torch eager")
    eager, ours, liger = race_rows(race, heats, "Qwen3-8B", Peaks())
    assert ours["share_of_peak"] == pytest.approx((8000 / 8e-6) / (8000 / 5e-6)) and ours["x_baseline"] == pytest.approx(2.0)
    assert ours["share_of_large_gemm"] == pytest.approx(8000 / 8e-6 / (2 * 8192**3))  # in a second, here
    assert eager["x_baseline"] == 1.0 and ours["dtype"] == "bfloat16" and ours["device"] == "NVIDIA H100 80GB HBM3"
    assert liger["refused"] == "not installed: liger-kernel" and liger["median"] is liger["x_baseline"] is liger["share_of_peak"] is None
    memory = Race("an_op", "s", torch.bfloat16, 1.0, 4e6, Counter(), list, (), "gone")
    assert race_rows(memory, heats[1:2], "Qwen3-8B", Peaks())[0]["share_of_peak"] == pytest.approx((4e6 / 8e-6) / 2e12)
    assert bench.gpu.card_slug() == "nvidia-h100-80gb-hbm3"
    assert bench.gpu.table([eager, ours, liger]).row_count == 3


def test_every_peer_of_the_issue_is_an_entrant() -> None:
    names = {entrant.name for race in races(TINY) for entrant in race.entrants}
    assert names >= {
        *("reference", "torch", "triton", "fastlora triton", "torch eager", "torch.compile", "PEFT layers", "TRL chunked"),
        *("Liger fused CE", "Liger fused GRPO", "cut-cross-entropy", "bitsandbytes 8 bit", "bitsandbytes 32 bit", "torch fused"),
    }
