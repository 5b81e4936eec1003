"""flash_attention without a GPU: the join of two calls and its backward pass in fp64, with a stand-in for FlashAttention's kernels.

The stand-in is plain torch with the kernels' contract: uneven sequences, heads that share keys, an lse out; and a backward pass that takes
out and lse as they are given and computes p = e^(S − lse), dS = p (dout · v − dout · out) from them. The kernels themselves: tests/gpu.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fastlora import flash_attention
from fastlora.flash_attention import Sequences
from fastlora.ops import packed_attention as op
from fastlora.ops.registry import use_implementation
from tests.attention_reference import assert_is_the_reference, let_run_here
from tests.tolerances import FP64_EXACT

CPU = torch.device("cpu")
SAMPLES = [arguments for arguments in op.sample_inputs(torch.float64, CPU) if len(arguments[0]) and not arguments[-1]]
"""With tokens and without a window."""


class StandIn:
    """`Kernels` in torch."""

    def _each(self, tensors_q: Sequence[Tensor], tensors_k: Sequence[Tensor], s: Sequences) -> Iterator[tuple[slice, slice, Tensor]]:
        """(queries, keys, visible [q, k]) of every sequence."""
        assert s.cu_q.dtype == s.cu_k.dtype == torch.int32 and len(s.cu_q) == len(s.cu_k)
        assert int(s.cu_q[-1]) == len(tensors_q[0]) and int(s.cu_k[-1]) == len(tensors_k[0])
        for (q0, q1), (k0, k1) in zip(pairwise(s.cu_q.tolist()), pairwise(s.cu_k.tolist()), strict=True):
            assert q1 - q0 <= s.max_q and k1 - k0 <= s.max_k
            visible = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool)
            yield slice(q0, q1), slice(k0, k1), visible.tril() if s.causal else visible

    def _scores(self, q_the: Tensor, k_ske: Tensor, visible: Tensor, scaling: float) -> Tensor:
        """S [H, q, k]."""
        k_ske = k_ske.repeat_interleave(q_the.shape[1] // k_ske.shape[1], 1)
        return (scaling * torch.einsum("qhe,khe->hqk", q_the, k_ske)).masked_fill(~visible, -torch.inf)

    def forward(self, q_the: Tensor, k_ske: Tensor, v_ske: Tensor, sequences: Sequences, scaling: float) -> tuple[Tensor, Tensor]:
        out, lse_ht = torch.empty_like(q_the), q_the.new_empty(q_the.shape[1], len(q_the))
        for q, k, visible in self._each([q_the], [k_ske, v_ske], sequences):
            scores = self._scores(q_the[q], k_ske[k], visible, scaling)
            wide_v = v_ske[k].repeat_interleave(q_the.shape[1] // v_ske.shape[1], 1)
            out[q] = torch.einsum("hqk,khe->qhe", scores.softmax(-1), wide_v)
            lse_ht[:, q] = scores.logsumexp(-1)
        return out, lse_ht

    def backward(
        self, dout: Tensor, q_the: Tensor, k_ske: Tensor, v_ske: Tensor, out: Tensor, lse_ht: Tensor, sequences: Sequences, scaling: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.zeros_like(x) for x in (q_the, k_ske, v_ske))
        share = q_the.shape[1] // k_ske.shape[1]
        for q, k, visible in self._each([dout, q_the, out], [k_ske, v_ske], sequences):
            p = (self._scores(q_the[q], k_ske[k], visible, scaling) - lse_ht[:, q, None]).exp()
            dp = torch.einsum("qhe,khe->hqk", dout[q], v_ske[k].repeat_interleave(share, 1))
            ds = scaling * p * (dp - (dout[q] * out[q]).sum(-1).t()[..., None])
            dq[q] = torch.einsum("hqk,khe->qhe", ds, k_ske[k].repeat_interleave(share, 1))
            for whole, parts in ((dk, torch.einsum("hqk,qhe->khe", ds, q_the[q])), (dv, torch.einsum("hqk,qhe->khe", p, dout[q]))):
                whole[k] = parts.unflatten(1, (-1, share)).sum(2)
        return dq, dk, dv


@pytest.fixture
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op's `flash` runs here, on the stand-in."""
    monkeypatch.setattr(flash_attention, "kernels", StandIn)
    let_run_here(monkeypatch, "flash")


@pytest.mark.usefixtures("_stand_in")
@pytest.mark.parametrize("index", range(len(SAMPLES)))
def test_two_joined_calls_are_the_reference(index: int) -> None:
    assert_is_the_reference("flash", SAMPLES[index])


@pytest.mark.usefixtures("_stand_in")
def test_opcheck() -> None:
    """The fake of the kept lse, too."""
    with use_implementation("flash"):
        for arguments in SAMPLES:
            torch.library.opcheck(op.packed_attention_op, arguments)


@pytest.mark.usefixtures("_stand_in")
def test_lse_is_that_of_all_visible_keys() -> None:
    """Of a family: a prompt of 2 tokens, completions of 1 and 2."""
    q, k, v = (torch.randn(5, 4, dtype=torch.float64) for _ in range(3))
    with use_implementation("flash"):
        _, lse_ht = op.packed_attention_op(q, k, v, None, None, [0, 2, 3, 5], [0, 0, 0], 4, 0.5, 0)
    scores = 0.5 * q @ k.t()
    seen = [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 3, 4]]
    expected = torch.stack([scores[i, keys].logsumexp(0) for i, keys in enumerate(seen)])
    assert float((lse_ht[0] - expected).abs().max()) <= FP64_EXACT


def test_the_calls_of_a_packing() -> None:
    """Two families (the second without completions) and a prompt of no token; segments of no token in between."""
    found = flash_attention.calls((0, 3, 5, 5, 9, 13, 13, 14), (0, 0, 0, 0, 4, 5, 5), CPU)
    assert found.own.cu_q.tolist() == found.own.cu_k.tolist() == [0, 3, 5, 5, 9, 13, 13, 14] and found.own.causal
    assert found.queries.tolist() == [3, 4, 5, 6, 7, 8] and found.keys.tolist() == [0, 1, 2]
    assert found.root is not None and not found.root.causal
    assert (found.root.cu_q.tolist(), found.root.cu_k.tolist(), found.root.max_q, found.root.max_k) == ([0, 6], [0, 3], 6, 3)
    assert flash_attention.calls((0, 3, 5), (0, 1), CPU).root is None


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, None),
        ({"q_td": torch.empty(3, 64)}, "it takes bfloat16 and float16, not torch.float32"),
        ({"q_td": torch.empty(3, 64, dtype=torch.bfloat16), "head_dim": 12}, "multiple of 8 up to 256, not 12"),
        ({"q_td": torch.empty(3, 64, dtype=torch.bfloat16), "head_dim": 512}, "multiple of 8 up to 256, not 512"),
        ({"q_td": torch.empty(3, 64, dtype=torch.bfloat16), "window": 4}, "a window of a completion's own tokens"),
        ({"q_td": torch.empty(0, 64, dtype=torch.bfloat16)}, "no empty tensors"),
        ({"q_td": torch.empty(3, 64, dtype=torch.bfloat16), "head_dim": 128}, None),
    ],
)
def test_reasons(arguments: dict[str, object], reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert flash_attention.refuses(CPU) == "it runs on a GPU, the tensors are on cpu"
    found = flash_attention.refuses(torch.device("cuda"), **arguments)
    assert found is None if reason is None else reason in (found or "")


def test_without_kernels_the_reason_names_both_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    monkeypatch.setattr(flash_attention, "find_spec", lambda name: None)
    assert "flash-attn is not installed, and this torch was built without" in (flash_attention.refuses(torch.device("cuda")) or "")
