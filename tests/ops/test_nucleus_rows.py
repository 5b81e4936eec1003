"""nucleus_rows against a nucleus counted token by token in fp64, and what `logprob_rows` makes of rows without what is outside it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fastlora.ops import nucleus_rows as op
from fastlora.ops.nucleus_rows import keep_nucleus_, nucleus_rows
from fastlora.ops.registry import use_implementation

SHAPES = [(0, 7), (1, 1), (3, 2), (63, 97), (5, 1024), (3, 1025), (2, 49_152)]
TOP_PS = (1e-9, 0.1, 0.5, 0.9, 0.999, 1 - 1e-7)
IMPLEMENTATIONS = ("reference", "torch")


def counted_nucleus(z_tv: Tensor, temperature: float, top_p: float) -> Tensor:
    """bool [t, v], by the definition: a token whose more probable ones do not reach top_p. O(v) a distinct logit, in fp64."""
    p_tv = torch.softmax(z_tv.double() / temperature, -1)
    inside_tv = torch.zeros(z_tv.shape, dtype=torch.bool)
    for z_v, p_v, inside_v in zip(z_tv, p_tv, inside_tv, strict=True):
        for z in z_v.unique().flip(0):
            if float(p_v[z_v > z].sum()) >= top_p:
                break
            inside_v |= z_v == z
    return inside_tv


def _logits(t: int, v: int, dtype: torch.dtype, size: float = 2.0) -> Tensor:
    return (size * torch.randn(t, v, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
def test_the_nucleus_is_the_counted_one(shape: tuple[int, int], dtype: torch.dtype, implementation: str) -> None:
    """In bfloat16 nearly every boundary is a tie. float32 sums may move a boundary that top_p hits to 1e-6: none here does."""
    for top_p, temperature in itertools.product(TOP_PS[: None if dtype == torch.float64 else -1], (0.7, 1.3)):
        z_tv = _logits(*shape, dtype)
        with use_implementation(implementation):
            floor_t = nucleus_rows(z_tv, temperature, top_p)
        assert floor_t.shape == shape[:1] and floor_t.dtype == dtype
        assert torch.equal(z_tv >= floor_t[:, None], counted_nucleus(z_tv, temperature, top_p)), (top_p, temperature)


@pytest.mark.parametrize("k", [(1,), (2, 5), (97,), (1000,)], ids=str)
def test_the_floor_does_not_depend_on_what_is_looked_at_first(monkeypatch: pytest.MonkeyPatch, k: tuple[int, ...]) -> None:
    """Sharp, flat and tied rows, five at a time; some are done after the first k, some after a sort."""
    z_tv = _logits(64, 97, torch.float64) * torch.logspace(-2, 1, 64, dtype=torch.float64)[:, None]
    z_tv[::3] = z_tv[::3].round()
    with use_implementation("reference"):
        expected_t = nucleus_rows(z_tv, 1.0, 0.8)
    monkeypatch.setattr(op, "TOP_K", k)
    monkeypatch.setattr(op, "SORTED_ELEMENTS", 5 * 97)
    assert torch.equal(nucleus_rows(z_tv, 1.0, 0.8), expected_t)


def test_only_rows_that_need_it_are_sorted_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """One flat row among 40 sharp ones."""
    z_tv = 8 * _logits(41, 49_152, torch.float32)
    z_tv[17] *= 1e-3
    seen, topk = [], Tensor.topk
    monkeypatch.setattr(Tensor, "topk", lambda self, k: seen.append((len(self), k)) or topk(self, k))
    nucleus_rows(z_tv, 1.0, 0.9)
    assert seen == [(41, 64), (1, 1024), (1, 49_152)]


def test_equal_logits_are_all_in() -> None:
    z_tv = torch.zeros(2, 1031)
    z_tv[1, 5] = 1.0
    assert bool((nucleus_rows(z_tv, 1.0, 0.5) == 0).all())
    assert float(nucleus_rows(z_tv[1:], 1.0, 1e-4)) == 1.0


def test_a_row_with_a_nan_stays_a_nan_and_ruled_out_tokens_stay_out() -> None:
    z_tv = _logits(2, 97, torch.float32)
    z_tv[0, 3], z_tv[1, :50] = math.nan, -math.inf
    for implementation in IMPLEMENTATIONS:
        with use_implementation(implementation):
            kept_tv = z_tv.clone()
            keep_nucleus_(kept_tv, torch.tensor([1, 60]), 1.0, 0.9)
        assert kept_tv[0].isnan().any() and torch.equal(kept_tv[0].isfinite(), z_tv[0].isfinite())
        assert bool((kept_tv[1, :50] == -math.inf).all()) and bool(kept_tv[1, 50:].isfinite().any())


@pytest.mark.parametrize("top_p", TOP_PS)
def test_what_is_outside_is_ruled_out_but_for_the_target(top_p: float) -> None:
    """Targets inside and outside the nucleus; a target outside changes nobody else."""
    z_tv, targets_t = _logits(63, 97, torch.float64), torch.randint(97, (63,))
    inside_tv = counted_nucleus(z_tv, 0.8, top_p)
    kept_tv = z_tv.clone()
    keep_nucleus_(kept_tv, targets_t, 0.8, top_p)
    inside_tv[torch.arange(63), targets_t] = True
    assert torch.equal(kept_tv, torch.where(inside_tv, z_tv, -math.inf))


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 0.9), (-1.0, 0.9), (1.0, 0.0), (1.0, 1.0), (1.0, 1.1)])
def test_refuses_by_name(temperature: float, top_p: float) -> None:
    with pytest.raises(ValueError, match=r"^nucleus_rows: a positive temperature and a top_p between 0 and 1"):
        nucleus_rows(torch.zeros(1, 3), temperature, top_p)
