"""decode_attention: one new token per row attends to its prompt, to what its row has sampled before, and to itself.

With R the rotation at the token's position (Su et al. 2021), keys in the caches rotated already, and h a query head that shares key
head k(h):

    own_k[slot, c] = R k        own_v[slot, c] = v        out_h = Σ_j softmax_j(scaling · R q_h · k_jk(h)) v_jk(h)

over j in the row's prompt and its own tokens 0..c (with a window, the last `window` of them). All completions of a prompt read one copy of
its keys and values. Bytes: every key and value in sight once a row. No gradient: it is for sampling.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.ops.packed_attention import rotate
from fastlora.ops.registry import Cost, Dispatch, OpSpec, cpp_refuses


def _reference(
    q_td: Tensor,
    k_td: Tensor,
    v_td: Tensor,
    cos_te: Tensor | None,
    sin_te: Tensor | None,
    prompt_k_pd: Tensor,
    prompt_v_pd: Tensor,
    cu_prompts: Tensor,
    prompts_t: Tensor,
    own_k_scd: Tensor,
    own_v_scd: Tensor,
    slots_t: Tensor,
    own_tokens: int,
    head_dim: int,
    scaling: float,
    window: int,
) -> Tensor:
    """out like q."""
    q_the, k_the = (rotate(x.unflatten(-1, (-1, head_dim)), cos_te, sin_te) for x in (q_td, k_td))
    own_k_scd[slots_t, own_tokens], own_v_scd[slots_t, own_tokens] = k_the.flatten(1), v_td
    starts, lengths = cu_prompts[prompts_t], cu_prompts.diff()[prompts_t]
    width, count = int(lengths.max()) if len(lengths) else 0, own_tokens + 1
    columns = torch.arange(width, device=q_td.device)
    # Prompts end where the own tokens begin: rows are padded on the left, so that a window counts back from the same column.
    index = (starts + lengths - width)[:, None] + columns
    k, v = (
        torch.cat([prompt[index.clamp(min=0)], own[slots_t, :count]], dim=1).unflatten(-1, (-1, head_dim)).transpose(1, 2)
        for prompt, own in ((prompt_k_pd, own_k_scd), (prompt_v_pd, own_v_scd))
    )
    visible = torch.cat([columns >= (width - lengths)[:, None], columns.new_ones(len(q_td), count, dtype=torch.bool)], dim=1)
    if window:
        visible[:, : max(0, width + count - window)] = False
    out = F.scaled_dot_product_attention(q_the[:, :, None], k, v, attn_mask=visible[:, None, None], scale=scaling, enable_gqa=True)
    return out.reshape(q_td.shape)


_attend = Dispatch("decode_attention", _reference)


def _cpp_refuses_attention(device: torch.device, *args: Any) -> str | None:
    if (reason := cpp_refuses(device, *args)) or not args:
        return reason
    head_dim = args[13]
    return None if head_dim % 32 == 0 and head_dim <= 512 else f"it needs a head width that is a multiple of 32 up to 512, not {head_dim}"


@_attend.add("cpp", _cpp_refuses_attention)
def _cpp(*args: Any) -> Tensor:
    return torch.ops.fastlora_cpu.decode_attention(*args)


decode_attention_op = _attend.torch_op(mutates_args=("own_k_scd", "own_v_scd"))


@decode_attention_op.register_fake
def _(q_td, *rest):  # type: ignore[no-untyped-def]
    return q_td.new_empty(q_td.shape)


def decode_attention(
    q_td: Tensor,
    k_td: Tensor,
    v_td: Tensor,
    prompt_k_pd: Tensor,
    prompt_v_pd: Tensor,
    cu_prompts: Tensor,
    prompts_t: Tensor,
    own_k_scd: Tensor,
    own_v_scd: Tensor,
    slots_t: Tensor,
    own_tokens: int,
    *,
    head_dim: int,
    scaling: float,
    cos_te: Tensor | None = None,
    sin_te: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """out [t, H e] of t rows, one new token each: q [t, H e], k and v [t, K e].

    prompt_k_pd, prompt_v_pd: [p, K e], all prompts one after another, prompt i from cu_prompts[i] (int64 [prompts + 1]), keys rotated.
    prompts_t: int64 [t], each row's prompt. own_k_scd, own_v_scd: [slots, capacity, K e], written at [slots_t, own_tokens]; slots_t:
    int64 [t], no slot twice. own_tokens: tokens that every row has there already. cos_te, sin_te: [t, e] or None for no rotation.
    """
    places = (cu_prompts, prompts_t, own_k_scd, own_v_scd, slots_t, own_tokens)
    q_td, k_td, v_td = (x.contiguous() for x in (q_td, k_td, v_td))
    return _attend(q_td, k_td, v_td, cos_te, sin_te, prompt_k_pd, prompt_v_pd, *places, head_dim, scaling, window or 0)


def cost(
    q_td: Tensor, k_td: Tensor, v_td: Tensor, cos: Any, sin: Any, prompt_k: Tensor, prompt_v: Any, cu: Tensor, prompts_t: Tensor, *rest: Any
) -> Cost:
    """Two products a query head and key in sight; keys and values in sight once a row, q and out once."""
    keys = int(cu.diff()[prompts_t].sum()) + len(q_td) * (rest[3] + 1)
    return Cost(4 * q_td.shape[1] * keys, (2 * keys * k_td.shape[1] + 2 * q_td.numel()) * q_td.element_size())


def sample_inputs(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Any, ...]]:
    """No row; one; prompts of several lengths, rows out of order and not of every slot; no rotation; a window."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    for lengths, prompts, slots, own_tokens, heads, key_heads, rotated, window in (
        ((3,), (), (), 0, 1, 1, True, 0),
        ((1,), (0,), (0,), 0, 2, 1, True, 0),
        ((5, 17, 2), (2, 0, 1, 1, 0), (4, 0, 3, 2, 6), 3, 6, 2, True, 0),
        ((33, 1), (1, 0, 0), (1, 2, 0), 17, 3, 1, False, 9),
    ):
        e, t = 32, len(prompts)
        starts = torch.tensor([0, *lengths]).cumsum(0).to(device)
        angles = torch.rand(t, e // 2, generator=generator, dtype=torch.float64).repeat(1, 2).to(device) * 6
        tables = (angles.cos().to(dtype), angles.sin().to(dtype)) if rotated else (None, None)
        caches = randn(sum(lengths), key_heads * e), randn(sum(lengths), key_heads * e)
        own = randn(7, 20, key_heads * e), randn(7, 20, key_heads * e)
        rows = [torch.tensor(x, dtype=torch.long, device=device) for x in (prompts, slots)]
        inputs = randn(t, heads * e), randn(t, key_heads * e), randn(t, key_heads * e)
        yield *inputs, *tables, *caches, starts, rows[0], *own, rows[1], own_tokens, e, e**-0.5, window


SPEC = OpSpec("decode_attention", decode_attention_op, sample_inputs, cost)
