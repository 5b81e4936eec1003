"""Attention over packed tokens, under Hugging Face's attention interface.

A model loaded with `attn_implementation = ATTENTION` runs torch's SDPA exactly as transformers does, until it is called with
`cu_seqlens`: then the batch is one row of concatenated sequences, and each attends causally to itself alone. Work is
Σ length², not (Σ length)², and no mask is built.
"""

from __future__ import annotations

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
    """query [1, H, T, e], key and value [1, K, T, e] -> [1, T, H, e]; sequence i is tokens cu_seqlens[i] to cu_seqlens[i + 1]."""
    lengths = [end - start for start, end in zip(cu_seqlens, cu_seqlens[1:], strict=False)]
    outputs = [
        F.scaled_dot_product_attention(q, k, v, attn_mask=_band(q, window), is_causal=_band(q, window) is None, scale=scaling, enable_gqa=True)
        for q, k, v in zip(query.split(lengths, dim=2), key.split(lengths, dim=2), value.split(lengths, dim=2), strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _band(query: Tensor, window: int | None) -> Tensor | None:
    """bool [q, k] of a sliding window, or None where it does not bite and plain causal attention is the same."""
    length = query.shape[2]
    if window is None or length <= window:
        return None
    return torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - window)


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
