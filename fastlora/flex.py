"""Attention over packed segments by torch's flex_attention: the packing as a BlockMask, of which empty blocks of 128 × 128 are skipped.

    visible(i, j)  =  segment(j) = segment(i) and j ≤ i    or    segment(j) = root(segment(i)) ≠ segment(i)
                      and, under a sliding window,  position(i) − position(j) < window

On a GPU torch.compile makes a Triton kernel of it (not run on a GPU); elsewhere it is plain torch on all T × T scores: for tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

MIN_HEAD_DIM = 16
"""One step of a tensor core."""


def refuses(device: torch.device, q_td: Tensor | None = None, head_dim: int = MIN_HEAD_DIM) -> str | None:
    """Why it cannot run: no GPU, float64, narrow heads, no token."""
    if device.type != "cuda":
        return f"it runs on a GPU, the tensors are on {device.type}"
    if q_td is None:
        return None
    if q_td.dtype == torch.float64:
        return "it takes float32, bfloat16 and float16, not torch.float64"
    if head_dim < MIN_HEAD_DIM:
        return f"it needs heads of at least {MIN_HEAD_DIM}, not {head_dim}"
    return None if len(q_td) else "it takes no empty tensors"


@lru_cache(maxsize=8)
def block_mask(cu_seqlens: tuple[int, ...], roots: tuple[int, ...], window: int, device: torch.device) -> BlockMask:
    """Once for a packing: all layers and both passes take the same."""
    from torch.nn.attention.flex_attention import create_block_mask

    lengths = torch.tensor(cu_seqlens, device=device).diff()
    root_of = torch.tensor(roots, dtype=torch.long, device=device)
    continues = root_of != torch.arange(len(roots), device=device)
    before = torch.where(continues, lengths[root_of], 0)  # tokens of its root in front of a segment
    segment_t = torch.repeat_interleave(torch.arange(len(roots), device=device), lengths)
    t = torch.arange(cu_seqlens[-1], device=device)
    position_t = t - torch.tensor(cu_seqlens[:-1], device=device)[segment_t] + before[segment_t]
    root_t = root_of[segment_t]

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        own = (segment_t[j] == segment_t[i]) & (j <= i)
        of_root = (segment_t[j] == root_t[i]) & (root_t[i] != segment_t[i])
        inside = (position_t[i] - position_t[j] < window) if window else torch.ones_like(own)
        return (own | of_root) & inside

    # Compiled, or the mask of T × T would be in memory for a moment: 4 GB at 65,536 tokens.
    return create_block_mask(visible, None, None, len(t), len(t), device=device, _compile=device.type == "cuda")


@cache
def _attention(device_type: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    run: Callable[..., Any] = flex_attention
    return torch.compile(run) if device_type == "cuda" else run


def attend(
    q_the: Tensor, k_the: Tensor, v_the: Tensor, cu_seqlens: Sequence[int], roots: Sequence[int], scaling: float, window: int
) -> Tensor:
    """out [t, H, e] of rotated heads. Differentiable."""
    mask = block_mask(tuple(cu_seqlens), tuple(roots), window, q_the.device)
    q, k, v = (x.transpose(0, 1)[None] for x in (q_the, k_the, v_the))
    out = _attention(q_the.device.type)(q, k, v, block_mask=mask, scale=scaling, enable_gqa=q_the.shape[1] != k_the.shape[1])
    return out[0].transpose(0, 1)
