"""attention: SDPA as transformers runs it without cu_seqlens; with them, each segment causally to itself and to what it continues."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fastlora.attention import ATTENTION, PREPARED_MASK, _attention
from tests.tiny import TINY_FAMILIES, make_tiny_model
from tests.tolerances import FP64_EXACT

HEADS, KV_HEADS, WIDTH = 6, 2, 8
LENGTHS = (1, 7, 7, 2, 13, 7, 1, 1, 1)
"""Alone and in runs of equal neighbours, which attend as one batch."""
ROOTS = {"lone": tuple(range(len(LENGTHS))), "families": (0, 1, 1, 1, 4, 4, 6, 6, 6)}
"""Segment that each continues: itself, or a prompt before it."""
CU_SEQLENS = tuple(sum(LENGTHS[:i]) for i in range(len(LENGTHS) + 1))


def _by_hand(query: Tensor, key: Tensor, value: Tensor, roots: tuple[int, ...], scaling: float, window: int | None) -> Tensor:
    """[T, H, e] by one softmax per token and head, over the last `window` tokens of its root, if another, and of its own up to itself."""
    output = torch.empty(sum(LENGTHS), HEADS, WIDTH, dtype=query.dtype)
    spans = list(itertools.pairwise(CU_SEQLENS))
    for segment, (start, end) in enumerate(spans):
        before = [] if roots[segment] == segment else list(range(*spans[roots[segment]]))
        for i in range(start, end):
            seen = [*before, *range(start, i + 1)][-(window or sum(LENGTHS)) :]
            for head in range(HEADS):
                kv = head // (HEADS // KV_HEADS)
                weights = torch.softmax(scaling * (key[0, kv, seen] @ query[0, head, i]), 0)
                output[i, head] = weights @ value[0, kv, seen]
    return output


@pytest.mark.parametrize("roots", ROOTS)
@pytest.mark.parametrize("scaling", [None, 0.5])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 13, 14])
def test_packed_attention(window: int | None, scaling: float | None, roots: str) -> None:
    query, key, value = (torch.randn(1, heads, sum(LENGTHS), WIDTH, dtype=torch.float64) for heads in (HEADS, KV_HEADS, KV_HEADS))
    layout = {"cu_seqlens": CU_SEQLENS, "roots": ROOTS[roots]}
    got, weights = _attention(torch.nn.Module(), query, key, value, None, **layout, scaling=scaling, sliding_window=window)
    expected = _by_hand(query, key, value, ROOTS[roots], 1 / math.sqrt(WIDTH) if scaling is None else scaling, window)
    assert weights is None and got.shape == (1, sum(LENGTHS), HEADS, WIDTH)
    assert float((got[0] - expected).abs().max()) < FP64_EXACT


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_without_cu_seqlens_it_is_transformers_sdpa_to_the_bit(family: str, window: int | None) -> None:
    """Padded, with and without a mask; generation needs it too."""
    model = make_tiny_model(family, **({"sliding_window": window} if family == "mistral" else {}))
    ids = torch.arange(3, 33).reshape(3, 10)
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[2, :9] = 0
    results = []
    for implementation in ("sdpa", ATTENTION):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            results.append((model(ids, attention_mask=mask).logits, model(ids).logits))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_the_prepared_mask_is_never_read() -> None:
    """NaN in it changes nothing; it only keeps transformers from building a mask of T × T."""
    model = make_tiny_model("mistral", sliding_window=3)
    model.set_attn_implementation(ATTENTION)
    ids, arguments = torch.arange(3, 13)[None], {"cu_seqlens": (0, 4, 10), "roots": (0, 1), "use_cache": False}
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    with torch.no_grad():
        plain, poisoned = (
            model(ids, position_ids=positions, attention_mask=mask, **arguments).logits
            for mask in (PREPARED_MASK, torch.full_like(PREPARED_MASK, torch.nan))
        )
    assert torch.equal(plain, poisoned) and bool(plain.isfinite().all())
