"""decode_attention against packed_attention (which has a dense oracle): a row is the last token of a segment that continues its prompt."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastlora.ops.decode_attention import decode_attention
from fastlora.ops.packed_attention import packed_attention, rotate
from fastlora.ops.registry import ImplementationError
from tests.ops.implementations import CPP, Variant, assert_no_worse, running, threads
from tests.tolerances import FP64_EXACT

PROMPTS = (5, 1, 33, 2)
ROWS = ((2, 4), (0, 0), (1, 3), (2, 1), (0, 6))
"""(prompt, slot) of each row: in no order, several of one prompt, none of the last, slots 2 and 5 at rest."""
SLOTS, CAPACITY = 7, 20


@dataclass(frozen=True)
class Problem:
    """Every token of prompts and rows, unrotated: packed as [prompt 0 | its rows' own tokens | prompt 1 | ...]."""

    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor | None
    sin: Tensor | None
    head_dim: int
    own_tokens: int

    @property
    def order(self) -> list[tuple[int, int | None]]:
        """(prompt, row, or None for the prompt itself) of every segment."""
        rows = [(p, [n for n, (prompt, _) in enumerate(ROWS) if prompt == p]) for p in range(len(PROMPTS))]
        return [(p, n) for p, ns in rows for n in (None, *ns)]

    def spans(self) -> list[tuple[int, int]]:
        """First and last token of every segment."""
        ends = torch.tensor([PROMPTS[p] if n is None else self.own_tokens + 1 for p, n in self.order]).cumsum(0).tolist()
        return list(zip([0, *ends], ends, strict=False))

    def to(self, dtype: torch.dtype) -> Problem:
        q, k, v, cos, sin = (None if x is None else x.to(dtype) for x in (self.q, self.k, self.v, self.cos, self.sin))
        return Problem(q, k, v, cos, sin, self.head_dim, self.own_tokens)

    def packed(self, window: int | None) -> Tensor:
        """out [rows, H e] by packed_attention."""
        spans, order = self.spans(), self.order
        roots = [next(s for s, (p, _) in enumerate(order) if p == prompt) for prompt, _ in order]
        options = {"head_dim": self.head_dim, "scaling": 0.3, "cos_te": self.cos, "sin_te": self.sin, "window": window}
        out = packed_attention(self.q, self.k, self.v, [0, *(end for _, end in spans)], roots, **options)
        return torch.stack([out[spans[order.index((p, n))][1] - 1] for n, (p, _) in enumerate(ROWS)])

    def decoded(self, window: int | None) -> Tensor:
        """out [rows, H e] by decode_attention; checks what it writes."""
        spans, order, width = self.spans(), self.order, self.k.shape[1]
        rotated = rotate(self.k.unflatten(-1, (-1, self.head_dim)), self.cos, self.sin).flatten(1)
        prompts = torch.cat([torch.arange(*spans[s]) for s, (_, n) in enumerate(order) if n is None])
        own_k, own_v = (torch.full((SLOTS, CAPACITY, width), torch.nan, dtype=self.k.dtype) for _ in range(2))
        last = []
        for n, (p, slot) in enumerate(ROWS):
            start, end = spans[order.index((p, n))]
            last.append(end - 1)
            own_k[slot, : self.own_tokens], own_v[slot, : self.own_tokens] = rotated[start : end - 1], self.v[start : end - 1]
        caches_before = own_k.clone(), own_v.clone()
        slots = torch.tensor([slot for _, slot in ROWS])
        out = decode_attention(
            *(x[last] for x in (self.q, self.k, self.v)),
            rotated[prompts],
            self.v[prompts],
            torch.tensor([0, *PROMPTS]).cumsum(0),
            torch.tensor([p for p, _ in ROWS]),
            own_k,
            own_v,
            slots,
            self.own_tokens,
            head_dim=self.head_dim,
            scaling=0.3,
            cos_te=None if self.cos is None else self.cos[last],
            sin_te=None if self.sin is None else self.sin[last],
            window=window,
        )
        for cache, before in zip((own_k, own_v), caches_before, strict=True):
            written = before.isnan().index_put((slots, torch.tensor(self.own_tokens)), torch.tensor(False))
            assert torch.equal(cache.isnan(), written)
        assert torch.equal(own_v[slots, self.own_tokens], self.v[last])
        exact = self.to(torch.float64)
        exact_k = rotate(exact.k.unflatten(-1, (-1, self.head_dim)), exact.cos, exact.sin).flatten(1)
        assert_no_worse([own_k[slots, self.own_tokens]], [rotated[last]], [exact_k[last]])
        return out


def _problem(head_dim: int, heads: int, key_heads: int, own_tokens: int, rotated: bool) -> Problem:
    tokens = sum(PROMPTS) + len(ROWS) * (own_tokens + 1)
    q, k, v = (torch.randn(tokens, n * head_dim, dtype=torch.float64) for n in (heads, key_heads, key_heads))
    cos, sin = (torch.randn(tokens, head_dim, dtype=torch.float64) if rotated else None for _ in range(2))
    return Problem(q, k, v, cos, sin, head_dim, own_tokens)


WINDOWS = [None, 1, 2, 4, 7, 37, 100]
"""None; inside the own tokens; into the prompts; behind the longest."""


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("own_tokens", [0, 3, CAPACITY - 1])
@pytest.mark.parametrize(("head_dim", "heads", "key_heads", "rotated"), [(8, 6, 2, True), (32, 3, 1, False), (6, 2, 2, True)], ids=str)
def test_in_fp64(head_dim: int, heads: int, key_heads: int, rotated: bool, own_tokens: int, window: int | None) -> None:
    problem = _problem(head_dim, heads, key_heads, own_tokens, rotated)
    out = problem.decoded(window)
    assert out.dtype == torch.float64 and float((out - problem.packed(window)).abs().max()) < FP64_EXACT * float(problem.v.abs().max())


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("own_tokens", [0, 3, CAPACITY - 1])
@pytest.mark.parametrize(("head_dim", "heads", "key_heads", "rotated"), [(32, 6, 2, True), (64, 3, 1, True), (96, 2, 2, False)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", CPP, ids=str)
def test_cpp(
    variant: Variant, dtype: torch.dtype, head_dim: int, heads: int, key_heads: int, rotated: bool, own_tokens: int, window: int | None
) -> None:
    """No further from fp64 than torch's attention in the same dtype."""
    problem = _problem(head_dim, heads, key_heads, own_tokens, rotated).to(dtype)
    truth = problem.to(torch.float64).packed(window)
    with running(Variant("reference")):
        plain = problem.packed(window)
    with running(variant), threads(2):
        got = problem.decoded(window)
    assert_no_worse([got], [plain], [truth])


@pytest.mark.parametrize("variant", CPP, ids=str)
def test_cpp_refuses_by_name(variant: Variant) -> None:
    problem = _problem(24, 2, 1, 3, True)
    with running(variant), pytest.raises(ImplementationError, match="multiple of 32 up to 512, not 24"):
        problem.to(torch.float32).decoded(None)
    full = _problem(32, 2, 1, CAPACITY, False).to(torch.float32)
    with running(variant), pytest.raises((RuntimeError, IndexError), match="20 tokens are cached of at most 20"):
        full.decoded(None)
