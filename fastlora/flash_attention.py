"""Attention over packed segments, of which some continue a root, by FlashAttention's kernels for sequences of uneven lengths.

Two calls, joined by their log-sum-exps (ops/packed_attention.py has the notation; e^l = Σ_j e^S over the keys of a call):

    own     every segment, causally, on itself                                     o₁, l₁ of all tokens
    root    the tokens that continue a root, on all of its tokens: one sequence    o₂, l₂ of those tokens
            of queries a root, whatever completions they belong to

    l = log(e^l₁ + e^l₂)        o = e^(l₁ − l) o₁ + e^(l₂ − l) o₂

So a group's prompt is computed once as queries and read once as keys. Backward: with the joint o and l in the place of each call's own,
FlashAttention's kernels compute p_ij = e^(S_ij − l) and dS_ij = p_ij (dout_i · v_j − dout_i · o_i), which are the terms of the whole
softmax; dq, dk and dv of the two calls add up (Liu et al. 2023, Ring Attention, arXiv 2310.01889, joins blocks in the same way).

The kernels are those of the package flash-attn where it is installed (flash-attn 2.8), else torch's own build of FlashAttention-2
(`aten::_flash_attention_forward`). Not run on a GPU: tests/test_flash_attention.py computes the join with a stand-in for the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_HEAD_DIM = 256


@dataclass(frozen=True, slots=True)
class Sequences:
    """One call's queries and keys: consecutive sequences, the i-th of the queries attends to the i-th of the keys."""

    cu_q: Tensor
    """int32 [sequences + 1], on the device; cu_k alike."""
    cu_k: Tensor
    max_q: int
    max_k: int
    causal: bool


class Kernels(Protocol):
    """FlashAttention over sequences: q [t, H, e], k and v [s, K, e] -> out like q, lse float32 [H, t]."""

    def forward(self, q_the: Tensor, k_ske: Tensor, v_ske: Tensor, sequences: Sequences, scaling: float) -> tuple[Tensor, Tensor]:
        """(out, lse)."""
        ...

    def backward(
        self, dout: Tensor, q_the: Tensor, k_ske: Tensor, v_ske: Tensor, out: Tensor, lse_ht: Tensor, sequences: Sequences, scaling: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv), the same bits every time."""
        ...


class TorchKernels:
    """torch's own FlashAttention-2."""

    def forward(self, q_the: Tensor, k_ske: Tensor, v_ske: Tensor, sequences: Sequences, scaling: float) -> tuple[Tensor, Tensor]:
        """See Kernels."""
        s = sequences
        places = (s.cu_q, s.cu_k, s.max_q, s.max_k, 0.0, s.causal, False)
        out, lse_ht, *_ = torch.ops.aten._flash_attention_forward(q_the, k_ske, v_ske, *places, scale=scaling)
        return out, lse_ht

    def backward(
        self, dout: Tensor, q_the: Tensor, k_ske: Tensor, v_ske: Tensor, out: Tensor, lse_ht: Tensor, sequences: Sequences, scaling: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Kernels."""
        s = sequences
        no_dropout = (torch.zeros(2, dtype=torch.uint64, device=q_the.device), q_the.new_empty(0))
        places = (s.cu_q, s.cu_k, s.max_q, s.max_k, 0.0, s.causal, *no_dropout)
        with _deterministic():
            return torch.ops.aten._flash_attention_backward(dout, q_the, k_ske, v_ske, out, lse_ht, *places, scale=scaling)


class PackageKernels:
    """Those of the package flash-attn."""

    def forward(self, q_the: Tensor, k_ske: Tensor, v_ske: Tensor, sequences: Sequences, scaling: float) -> tuple[Tensor, Tensor]:
        """See Kernels."""
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        out, lse_ht, *_ = _flash_attn_varlen_forward(
            q_the, k_ske, v_ske, dropout_p=0.0, softmax_scale=scaling, return_softmax=False, **_package_places(sequences)
        )
        return out, lse_ht

    def backward(
        self, dout: Tensor, q_the: Tensor, k_ske: Tensor, v_ske: Tensor, out: Tensor, lse_ht: Tensor, sequences: Sequences, scaling: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Kernels."""
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

        dq, dk, dv = (torch.empty_like(x) for x in (q_the, k_ske, v_ske))
        options = {"window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None, "deterministic": True}
        places = {**_package_places(sequences), **options, "dropout_p": 0.0, "softmax_scale": scaling}
        _flash_attn_varlen_backward(dout, q_the, k_ske, v_ske, out, lse_ht, dq, dk, dv, **places)
        return dq, dk, dv


def _package_places(s: Sequences) -> dict[str, Any]:
    return {"cu_seqlens_q": s.cu_q, "cu_seqlens_k": s.cu_k, "max_seqlen_q": s.max_q, "max_seqlen_k": s.max_k, "causal": s.causal}


@contextmanager
def _deterministic() -> Iterator[None]:
    """torch's kernel sums dq in a fixed order inside: a resumed run must have the bits of an unbroken one."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def kernels() -> Kernels:
    """The package's where it is installed, else torch's."""
    return TorchKernels() if find_spec("flash_attn") is None else PackageKernels()


def refuses(device: torch.device, q_td: Tensor | None = None, head_dim: int = 8, window: int = 0) -> str | None:
    """Why it cannot run: no GPU, a dtype besides bfloat16 and float16, head widths, a sliding window, no token."""
    if device.type != "cuda":
        return f"it runs on a GPU, the tensors are on {device.type}"
    if find_spec("flash_attn") is None and not torch.backends.cuda.is_flash_attention_available():
        return "flash-attn is not installed, and this torch was built without FlashAttention"
    if q_td is None:
        return None
    if q_td.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {q_td.dtype}"
    if head_dim % 8 or head_dim > MAX_HEAD_DIM:
        return f"it needs a head width that is a multiple of 8 up to {MAX_HEAD_DIM}, not {head_dim}"
    if window:
        return "a window of a completion's own tokens and its prompt's is none that FlashAttention has"
    return None if len(q_td) else "it takes no empty tensors"


@dataclass(frozen=True, slots=True)
class Calls:
    """The two calls of a packing."""

    own: Sequences
    root: Sequences | None
    """None: no segment continues another."""
    queries: Tensor
    """int64, the tokens that continue a root, in the order of the packing."""
    keys: Tensor
    """int64, the tokens of the roots that they continue."""


@lru_cache(maxsize=8)
def calls(cu_seqlens: tuple[int, ...], roots: tuple[int, ...], device: torch.device) -> Calls:
    """Once for a packing: all layers and both passes take the same."""
    spans = list(pairwise(cu_seqlens))
    own = _sequences([end - start for start, end in spans], None, device)
    queries: list[int] = []
    keys: list[int] = []
    lengths_q, lengths_k = [], []
    for root in sorted(set(roots)):
        members = [s for s, r in enumerate(roots) if r == root != s]
        tokens = range(spans[members[0]][0], spans[members[-1]][1]) if members else range(0)
        if tokens and spans[root][1] > spans[root][0]:
            queries += tokens
            keys += range(*spans[root])
            lengths_q.append(len(tokens))
            lengths_k.append(spans[root][1] - spans[root][0])
    root_call = _sequences(lengths_q, lengths_k, device) if queries else None
    queries_and_keys = (torch.tensor(tokens, dtype=torch.long, device=device) for tokens in (queries, keys))
    return Calls(own, root_call, *queries_and_keys)


def _sequences(lengths_q: Sequence[int], lengths_k: Sequence[int] | None, device: torch.device) -> Sequences:
    """Causal on themselves without lengths of keys."""
    cu = [torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32) for lengths in (lengths_q, lengths_k or lengths_q)]
    return Sequences(cu[0], cu[1], max(lengths_q), max(lengths_k or lengths_q), causal=lengths_k is None)


def forward(
    run: Kernels, q_the: Tensor, k_the: Tensor, v_the: Tensor, cu_seqlens: Sequence[int], roots: Sequence[int], scaling: float
) -> tuple[Tensor, Tensor]:
    """(out [t, H, e], lse [H, t]) of rotated heads."""
    c = calls(tuple(cu_seqlens), tuple(roots), q_the.device)
    out, lse_ht = run.forward(q_the, k_the, v_the, c.own, scaling)
    if c.root is None:
        return out, lse_ht
    out_root, lse_root = run.forward(q_the[c.queries], k_the[c.keys], v_the[c.keys], c.root, scaling)
    lse_own = lse_ht[:, c.queries]
    lse = torch.logaddexp(lse_own, lse_root)
    shares = [(part - lse).exp().t()[..., None] for part in (lse_own, lse_root)]  # [t, H, 1]
    joined = shares[0] * out[c.queries] + shares[1] * out_root
    return out.index_copy(0, c.queries, joined.to(out.dtype)), lse_ht.index_copy(1, c.queries, lse)


def backward(
    run: Kernels,
    dout: Tensor,
    q_the: Tensor,
    k_the: Tensor,
    v_the: Tensor,
    out: Tensor,
    lse_ht: Tensor,
    cu_seqlens: Sequence[int],
    roots: Sequence[int],
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of rotated heads; out and lse as `forward` returned them."""
    c = calls(tuple(cu_seqlens), tuple(roots), q_the.device)
    dq, dk, dv = run.backward(dout, q_the, k_the, v_the, out, lse_ht, c.own, scaling)
    if c.root is None:
        return dq, dk, dv
    of_queries = [x[c.queries] for x in (dout, q_the, out)]
    lse_root = lse_ht[:, c.queries].contiguous()
    parts = run.backward(of_queries[0], of_queries[1], k_the[c.keys], v_the[c.keys], of_queries[2], lse_root, c.root, scaling)
    places = (c.queries, c.keys, c.keys)
    sums = [whole.index_copy(0, at, whole[at] + part) for whole, at, part in zip((dq, dk, dv), places, parts, strict=True)]
    return sums[0], sums[1], sums[2]
