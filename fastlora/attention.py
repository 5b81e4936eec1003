"""Attention over packed tokens, under Hugging Face's attention interface.

A model loaded with `attn_implementation = ATTENTION` runs torch's SDPA exactly as transformers does, until it is called with
`cu_seqlens` and `roots` or with a `cache`: then the batch is one row of tokens, of segments of which some continue another
(`ops.packed_attention`) or of completions being sampled (`kv_cache.GroupCache`), and no mask is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fastlora.ops.packed_attention import packed_attention

ATTENTION = "fastlora"

PREPARED_MASK = torch.full((1, 1, 1, 1), torch.nan)
"""transformers passes a 4-d mask through unchanged: this one says "build none", and is never read. NaN: where a model's layers keep the
arguments of a packed call from attention, it is, and tokens would silently see each other."""


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """query [1, H, t, e], key and value [1, K, t, e] -> [1, t, H, e]."""
    layout = {name: kwargs.pop(name) for name in LAYOUT if name in kwargs}
    if not layout:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    head_dim, scaling = query.shape[-1], kwargs.get("scaling")
    q_td, k_td, v_td = (x[0].transpose(0, 1).flatten(1) for x in (query, key, value))
    out_td = attend_packed(
        module,
        q_td,
        k_td,
        v_td,
        layout,
        head_dim=head_dim,
        scaling=head_dim**-0.5 if scaling is None else scaling,
        window=kwargs.get("sliding_window"),
    )
    return out_td.view(1, len(out_td), -1, head_dim), None


LAYOUT = ("cache", "cu_seqlens", "roots")
"""Arguments of a packed call of the model: `cache`, or `cu_seqlens` and `roots`."""


def attend_packed(module: Any, q_td: Tensor, k_td: Tensor, v_td: Tensor, layout: Mapping[str, Any], **options: Any) -> Tensor:
    """Attention of one layer in a packed call: q [t, H e], k and v [t, K e] -> [t, H e]; options as `ops.packed_attention`'s."""
    if "cache" in layout:
        return layout["cache"].attend(module.layer_idx, q_td, k_td, v_td, **options)
    return packed_attention(q_td, k_td, v_td, layout["cu_seqlens"], layout["roots"], **options)


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
