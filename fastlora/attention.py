"""Attention over packed tokens, under Hugging Face's attention interface.

A model loaded with `attn_implementation = ATTENTION` runs torch's SDPA exactly as transformers does, until it is called with
`cu_seqlens`: then the batch is one row of concatenated sequences, and each attends causally to itself alone. Work is
Σ length², not (Σ length)², and no mask is built.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "fastlora"

PREPARED_MASK = torch.zeros(1, 1, 1, 1)
"""transformers passes a 4-d mask through unchanged: this one says "build none", and is never read."""


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    cu_seqlens = kwargs.pop("cu_seqlens", None)
    if cu_seqlens is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return _packed(query, key, value, cu_seqlens, kwargs.get("scaling"), kwargs.get("sliding_window")), None


def _packed(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: tuple[int, ...], scaling: float | None, window: int | None) -> Tensor:
    """query [1, H, T, e], key and value [1, K, T, e] -> [1, T, H, e]; sequence i is tokens cu_seqlens[i] to cu_seqlens[i + 1].

    Neighbours of equal length run as one batch, which costs no copy: 64 sums are 10 calls a layer instead of 64.
    """
    outputs = []
    for start, count, length in equal_runs(cu_seqlens):
        q, k, v = (
            tensor[0, :, start : start + count * length].unflatten(1, (count, length)).transpose(0, 1) for tensor in (query, key, value)
        )
        mask = _band(length, window, query.device)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None]


def equal_runs(cu_seqlens: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """(first token, sequences, length) of every run of neighbours of equal length."""
    runs: list[tuple[int, int, int]] = []
    for start, end in pairwise(cu_seqlens):
        if runs and runs[-1][2] == end - start:
            first, count, length = runs.pop()
            runs.append((first, count + 1, length))
        else:
            runs.append((start, 1, end - start))
    return runs


def _band(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """bool [q, k] of a sliding window, or None where it does not bite and plain causal attention is the same."""
    if window is None or length <= window:
        return None
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
