"""bench.tune without a GPU: candidates, what the compiler says of them, tiles that reach the launchers, a refusal by name."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton kernels need triton")

from bench import tune
from bench.tune import SUBJECTS, Subject, candidates, main, row_of, source, use_tiles
from fastlora_triton import lora_linear
from fastlora_triton.tiles import Tiles

ROW = row_of("bf16", 90)


def test_candidates_start_with_the_committed_row_and_fit_the_chip() -> None:
    for subject in SUBJECTS:
        found = list(candidates(subject, ROW, 2, 90))
        assert found[0] == ROW and len(set(found)) == len(found) > 1
        for c in found[1:]:
            assert {name for name in Tiles.__dataclass_fields__ if getattr(c, name) != getattr(ROW, name)} <= subject.values.keys()
            if subject.name == "products":
                assert c.stages * (c.t + c.n) * c.k * 2 <= 232448 and 32 <= c.t * c.n / (32 * c.warps) <= 128


def test_tiles_reach_the_kernels_and_leave() -> None:
    x, other = torch.empty(0, dtype=torch.bfloat16, device="meta"), replace(ROW, t=64)
    with use_tiles(other):
        assert lora_linear.tiles_for(x) == other
    assert lora_linear.tiles_for(x) == ROW


def test_without_a_gpu_it_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main([]) == 2
    assert "torch sees none here; --dry-run" in capsys.readouterr().err


def test_dry_run_lists_what_compiles_and_why_the_rest_does_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The committed tiles, which keep all limits, fewer ranks a tile, and a block that is no power of two."""
    monkeypatch.setattr(tune, "SUBJECTS", (Subject("ranks", {"r": (32, 48)}, ("lora_group_step",)),))
    assert main(["--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"[12] of 3 candidates keep the limits of sm_90", shown) and "power of 2" in shown


def test_a_row_prints_as_it_stands_in_the_table() -> None:
    assert eval(source(ROW), {"Tiles": Tiles}) == ROW
