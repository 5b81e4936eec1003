"""flex: the packing as a BlockMask, in plain torch on the CPU and in fp64, against the op's reference; windows included."""

from __future__ import annotations

import pytest
import torch

from fastlora import flex
from fastlora.ops import packed_attention as op
from tests.attention_reference import assert_is_the_reference, let_run_here

CPU = torch.device("cpu")
SAMPLES = [arguments for arguments in op.sample_inputs(torch.float64, CPU) if len(arguments[0])]


@pytest.fixture
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op's `flex` runs on the CPU. torch refuses gradients there, for want of a kernel; the formula in plain torch has them."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    let_run_here(monkeypatch, "flex")


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize("index", range(len(SAMPLES)))
def test_flex_is_the_reference(index: int) -> None:
    assert_is_the_reference("flex", SAMPLES[index])


def test_blocks_of_other_families_are_skipped() -> None:
    """Four families of 256 tokens: of 8 × 8 blocks of 128 only a family's own are looked at, 3 below the diagonal each."""
    cu_seqlens = tuple(range(0, 1025, 128))
    mask = flex.block_mask(cu_seqlens, (0, 0, 2, 2, 4, 4, 6, 6), 0, CPU)
    assert int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()) == 4 * 3
    assert int(mask.full_kv_num_blocks.sum()) == 4  # a completion on all of its prompt needs no mask inside


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, None),
        ({"q_td": torch.empty(3, 64, dtype=torch.float64)}, "not torch.float64"),
        ({"q_td": torch.empty(3, 64), "head_dim": 8}, "heads of at least 16, not 8"),
        ({"q_td": torch.empty(0, 64)}, "no empty tensors"),
        ({"q_td": torch.empty(3, 64), "head_dim": 32}, None),
    ],
)
def test_reasons(arguments: dict[str, object], reason: str | None) -> None:
    assert flex.refuses(CPU) == "it runs on a GPU, the tensors are on cpu"
    found = flex.refuses(torch.device("cuda"), **arguments)
    assert found is None if reason is None else reason in (found or "")
