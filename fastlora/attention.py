"""Attention over packed tokens, under Hugging Face's attention interface.

A model loaded with `attn_implementation = ATTENTION` runs torch's SDPA exactly as transformers does, until it is called with
`cu_seqlens` and `roots`: then the batch is one row of segments of which some continue another (`ops.packed_attention`), and no mask
is built.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fastlora.ops.packed_attention import packed_attention

ATTENTION = "fastlora"

PREPARED_MASK = torch.zeros(1, 1, 1, 1)
"""transformers passes a 4-d mask through unchanged: this one says "build none", and is never read."""


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """query [1, H, t, e], key and value [1, K, t, e] -> [1, t, H, e]."""
    cu_seqlens, roots = kwargs.pop("cu_seqlens", None), kwargs.pop("roots", None)
    if cu_seqlens is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    head_dim, scaling = query.shape[-1], kwargs.get("scaling")
    q_td, k_td, v_td = (x[0].transpose(0, 1).flatten(1) for x in (query, key, value))
    out_td = packed_attention(
        q_td,
        k_td,
        v_td,
        cu_seqlens,
        roots,
        head_dim=head_dim,
        scaling=head_dim**-0.5 if scaling is None else scaling,
        window=kwargs.get("sliding_window"),
    )
    return out_td.view(1, len(out_td), -1, head_dim), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
