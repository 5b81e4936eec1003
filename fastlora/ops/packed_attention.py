"""packed_attention: causal attention over packed segments of which some continue another, with the rotary embedding folded in.

Tokens of all segments lie in one row; segment s is tokens cu_seqlens[s] to cu_seqlens[s + 1]. A root segment (a prompt, or a whole
sequence) has roots[s] = s; the segments that continue it (its completions) follow it directly and have roots[s] = the root. With
R the rotation of Su et al. 2021 (arXiv 2104.09864, eq. 34), h a query head and k(h) the key-value head it shares:

    S_ij = scaling · (R_i q_ih) · (R_j k_jk(h))        p_ij = softmax over j of S_ij        out_ih = Σ_j p_ij v_jk(h)

over j ≤ i of i's own segment, and over all j of its root if that is another segment (with a sliding window, the last `window` of these, i
included). So a group's prompt costs P tokens, not G · P, and
everything after it sees exactly what it would see in a sequence of its own.

Backward, with lse_ih = log Σ_j e^S_ij kept and δ_ih = dout_ih · out_ih:

    dv_j = Σ p_ij dout_i        dS_ij = p_ij (dout_i · v_j − δ_i)        dq_i = scaling R_iᵀ Σ_j dS_ij R_j k_j        dk_j likewise

FLOPs: 4 e per query head and visible pair forward, 10 e backward. Implementations: `reference` is one torch SDPA call per segment (or per
run of equal segments) over root and own keys, whose mask is lower-right causal and never built on a GPU; `cpp` packs the
keys of a family once for all its segments and heads; on a GPU `flash` is two calls of FlashAttention's kernels joined by their
log-sum-exps (fastlora/flash_attention.py, with Liger's rotary embedding), and `flex`, for what those refuse, one call of flex_attention
(fastlora/flex.py; its backward pass computes the forward pass again).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from fastlora import flash_attention, flex, liger
from fastlora.ops.registry import Cost, Dispatch, OpSpec, call, cpp_refuses


def rotate(x_the: Tensor, cos_te: Tensor | None, sin_te: Tensor | None) -> Tensor:
    """The rotary embedding of heads [t, H, e] by tables [t, e]; None: unchanged."""
    if cos_te is None or sin_te is None:
        return x_the
    first, second = x_the.chunk(2, dim=-1)
    return x_the * cos_te[:, None] + torch.cat([-second, first], dim=-1) * sin_te[:, None]


def _rotate_back(x_the: Tensor, cos_te: Tensor, sin_te: Tensor) -> Tensor:
    """The transpose of `rotate`: what a gradient of rotated heads is to the heads."""
    first, second = (x_the * sin_te[:, None]).chunk(2, dim=-1)
    return x_the * cos_te[:, None] - torch.cat([-second, first], dim=-1)


def _rotate_both(
    q_the: Tensor, k_the: Tensor, cos_te: Tensor | None, sin_te: Tensor | None, *, back: bool = False
) -> tuple[Tensor, Tensor]:
    """Queries and keys turned, or gradients turned back; by Liger's kernel where it runs. Not differentiable."""
    if cos_te is None or sin_te is None:
        return q_the, k_the
    if liger.refuses(q_the.device, q_the) is None:
        return liger.rotate(q_the, k_the, cos_te, sin_te, back=back)
    turn = _rotate_back if back else rotate
    return turn(q_the, cos_te, sin_te), turn(k_the, cos_te, sin_te)


def _runs(cu_seqlens: Sequence[int], roots: Sequence[int]) -> Iterator[tuple[int, int, int, tuple[int, int]]]:
    """(first token, segments, length, (first, last) token of the root's keys) of neighbours of one length that have the same root."""
    lengths = [end - start for start, end in pairwise(cu_seqlens)]
    segments = range(len(roots))
    for (root, is_root, length), group in groupby(segments, lambda s: (roots[s], roots[s] == s, lengths[s])):
        first, *others = group
        shared = (cu_seqlens[first], cu_seqlens[first]) if is_root else (cu_seqlens[root], cu_seqlens[root + 1])
        yield cu_seqlens[first], 1 + len(others), length, shared


def _attend(
    q_the: Tensor, k_the: Tensor, v_the: Tensor, cu_seqlens: Sequence[int], roots: Sequence[int], scaling: float, window: int
) -> Tensor:
    outputs = []
    for first, count, length, (root_first, root_last) in _runs(cu_seqlens, roots):
        own = slice(first, first + count * length)
        q = q_the[own].unflatten(0, (count, length)).transpose(1, 2)
        k, v = (
            torch.cat([x[root_first:root_last].expand(count, -1, -1, -1), x[own].unflatten(0, (count, length))], dim=1).transpose(1, 2)
            for x in (k_the, v_the)
        )
        mask = _visible(length, k.shape[2], window, q.device)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=True)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat([q_the[:0], *outputs])


def _visible(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """Lower-right causal: query i sees the keys up to i + keys − queries, of which `window` (0 = all). On a GPU no mask is built."""
    bias = causal_lower_right(queries, keys)
    if device.type == "cuda" and not window:
        return bias
    mask = bias._materialize(device)
    return mask.triu(keys - queries - window + 1) if window else mask


Attend = Callable[[Tensor, Tensor, Tensor, Sequence[int], Sequence[int], float, int], Tensor]
"""(rotated q [t, H, e], rotated k, v [t, K, e], cu_seqlens, roots, scaling, window) -> out [t, H, e], differentiable."""


def _heads(head_dim: int, *tensors: Tensor) -> list[Tensor]:
    return [x.reshape(len(x), x.shape[1] // head_dim, head_dim) for x in tensors]


def _rotated_attention(
    attend: Attend,
    q_td: Tensor,
    k_td: Tensor,
    v_td: Tensor,
    cos_te: Tensor | None,
    sin_te: Tensor | None,
    cu_seqlens: Sequence[int],
    roots: Sequence[int],
    head_dim: int,
    scaling: float,
    window: int,
) -> Tensor:
    q_the, k_the, v_the = _heads(head_dim, q_td, k_td, v_td)
    q_the, k_the = rotate(q_the, cos_te, sin_te), rotate(k_the, cos_te, sin_te)
    return attend(q_the, k_the, v_the, cu_seqlens, roots, scaling, window).reshape(q_td.shape)


def _reference(
    q_td: Tensor,
    k_td: Tensor,
    v_td: Tensor,
    cos_te: Tensor | None,
    sin_te: Tensor | None,
    cu_seqlens: Sequence[int],
    roots: Sequence[int],
    head_dim: int,
    scaling: float,
    window: int = 0,
) -> tuple[Tensor, Tensor]:
    """(out like q, lse [H, t] or empty [0] where the implementation recomputes it)."""
    out_td = _rotated_attention(_attend, q_td, k_td, v_td, cos_te, sin_te, cu_seqlens, roots, head_dim, scaling, window)
    return out_td, q_td.new_empty(0, dtype=torch.promote_types(q_td.dtype, torch.float32))  # SDPA keeps its lse to itself


_forward = Dispatch("packed_attention", _reference)


def _flex_refuses(device: torch.device, *args: Any) -> str | None:
    """Of either pass: (q_td, k_td, ...) or (dout_td, q_td, ...)."""
    return flex.refuses(device, args[0], _layout_of(args)[2]) if args else flex.refuses(device)


def _layout_of(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """(cu_seqlens, roots, head_dim, scaling, window) of the arguments of either pass; torch leaves out a window of 0."""
    first = next(index for index, arg in enumerate(args) if isinstance(arg, list | tuple))
    layout = args[first:]
    return layout if len(layout) == 5 else (*layout, 0)


@_forward.add("flex", _flex_refuses)
def _flex(*args: Any) -> tuple[Tensor, Tensor]:
    out_td = _rotated_attention(flex.attend, *args[:5], *_layout_of(args))
    return out_td, out_td.new_empty(0, dtype=torch.promote_types(out_td.dtype, torch.float32))


def _cpp_refuses_attention(device: torch.device, *args: Any) -> str | None:
    if (reason := cpp_refuses(device, *args)) or not args:
        return reason
    head_dim = next(arg for arg in args if isinstance(arg, int))  # the first of the numbers
    return None if head_dim % 32 == 0 else f"it needs a head width that is a multiple of 32, not {head_dim}"


def _places(cu_seqlens: Sequence[int], roots: Sequence[int]) -> tuple[Tensor, Tensor]:
    return torch.tensor(cu_seqlens), torch.tensor(roots, dtype=torch.long)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


@_forward.add("cpp", _cpp_refuses_attention)
def _cpp(
    q_td: Tensor, k_td: Tensor, v_td: Tensor, cos_te: Any, sin_te: Any, cu_seqlens: Any, roots: Any, *options: Any
) -> tuple[Tensor, Tensor]:
    inputs = _contiguous(q_td, k_td, v_td, cos_te, sin_te)
    return torch.ops.fastlora_cpu.packed_attention_forward(*inputs, *_places(cu_seqlens, roots), *options)


def _flash_refuses(device: torch.device, *args: Any) -> str | None:
    """Of either pass."""
    if not args:
        return flash_attention.refuses(device)
    _, _, head_dim, _, window = _layout_of(args)
    return flash_attention.refuses(device, args[0], head_dim, window)


@_forward.add("flash", _flash_refuses)
def _flash(
    q_td: Tensor, k_td: Tensor, v_td: Tensor, cos_te: Any, sin_te: Any, cu_seqlens: Any, roots: Any, head_dim: int, scaling: float, *_: Any
) -> tuple[Tensor, Tensor]:
    q_the, k_the, v_the = _heads(head_dim, q_td, k_td, v_td)
    q_the, k_the = _rotate_both(q_the, k_the, cos_te, sin_te)
    out, lse_ht = flash_attention.forward(flash_attention.kernels(), q_the, k_the, v_the, cu_seqlens, roots, scaling)
    return out.reshape(q_td.shape), lse_ht


packed_attention_op = _forward.torch_op()


@packed_attention_op.register_fake
def _(q_td, k_td, v_td, cos_te, sin_te, cu_seqlens, roots, head_dim, scaling, window=0):  # type: ignore[no-untyped-def]
    args = (q_td, k_td, v_td, cos_te, sin_te, cu_seqlens, roots, head_dim, scaling, window)
    kept = _forward.select(q_td.device, *args).name in ("cpp", "flash")
    wide = torch.promote_types(q_td.dtype, torch.float32)
    return q_td.new_empty(q_td.shape), q_td.new_empty((q_td.shape[1] // head_dim, len(q_td)) if kept else 0, dtype=wide)


def _reference_backward(
    dout_td: Tensor,
    q_td: Tensor,
    k_td: Tensor,
    v_td: Tensor,
    cos_te: Tensor | None,
    sin_te: Tensor | None,
    out_td: Tensor,
    lse: Tensor,
    cu_seqlens: Sequence[int],
    roots: Sequence[int],
    head_dim: int,
    scaling: float,
    window: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), with respect to the vectors before their rotation."""
    return _gradients(_attend, dout_td, q_td, k_td, v_td, cos_te, sin_te, cu_seqlens, roots, head_dim, scaling, window)


def _gradients(
    attend: Attend, dout_td: Tensor, q_td: Tensor, k_td: Tensor, v_td: Tensor, *tables_and_layout: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) by autograd, through the forward pass again."""
    # The body of an op runs below autograd, where enable_grad alone records nothing: its dispatch key has to be let in again.
    with torch._C._PreserveDispatchKeyGuard(), torch.enable_grad():
        torch._C._dispatch_tls_set_dispatch_key_excluded(torch._C.DispatchKey.AutogradFunctionality, False)
        leaves = [x.detach().requires_grad_() for x in (q_td, k_td, v_td)]
        out = _rotated_attention(attend, leaves[0], leaves[1], leaves[2], *tables_and_layout)
        dq, dk, dv = torch.autograd.grad(out, leaves, dout_td, materialize_grads=True)
    return dq, dk, dv


_backward = Dispatch("packed_attention_backward", _reference_backward)


@_backward.add("flex", _flex_refuses)
def _flex_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(flex.attend, *args[:6], *_layout_of(args))


def _with_lse(refuses: Callable[..., str | None]) -> Callable[..., str | None]:
    """`refuses`, and a forward pass that kept no log-sum-exp."""

    def stricter(device: torch.device, *args: Any) -> str | None:
        if (reason := refuses(device, *args)) or not args:
            return reason
        out_td, lse = args[6:8]
        kept = lse.numel() or not out_td.numel()
        return None if kept else "it needs the log-sum-exp, which the implementation that ran the forward pass did not keep"

    return stricter


@_backward.add("cpp", _with_lse(_cpp_refuses_attention))
def _cpp_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, out_td, lse = args[:8]
    cu_seqlens, roots, *options = args[8:]
    out_td = out_td.contiguous()
    return torch.ops.fastlora_cpu.packed_attention_backward(*_contiguous(*inputs), *_places(cu_seqlens, roots), out_td, lse, *options)


@_backward.add("flash", _with_lse(_flash_refuses))
def _flash_backward(
    dout_td: Tensor, q_td: Tensor, k_td: Tensor, v_td: Tensor, cos_te: Any, sin_te: Any, out_td: Tensor, lse: Tensor, *layout: Any
) -> tuple[Tensor, Tensor, Tensor]:
    cu_seqlens, roots, head_dim, scaling, *_ = layout
    dout, q_the, k_the, v_the, out = _heads(head_dim, dout_td, q_td, k_td, v_td, out_td)
    q_the, k_the = _rotate_both(q_the, k_the, cos_te, sin_te)
    dq, dk, dv = flash_attention.backward(
        flash_attention.kernels(), dout.contiguous(), q_the, k_the, v_the, out.contiguous(), lse, cu_seqlens, roots, scaling
    )
    dq, dk = _rotate_both(dq, dk, cos_te, sin_te, back=True)
    return dq.reshape(q_td.shape), dk.reshape(k_td.shape), dv.reshape(v_td.shape)


packed_attention_backward_op = _backward.torch_op()


@packed_attention_backward_op.register_fake
def _(dout_td, q_td, k_td, v_td, *rest):  # type: ignore[no-untyped-def]
    return q_td.new_empty(q_td.shape), k_td.new_empty(k_td.shape), v_td.new_empty(v_td.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, cu_seqlens, roots, head_dim, scaling, window = inputs
    ctx.layout = (list(cu_seqlens), list(roots), head_dim, scaling, window)
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, dout_td: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    return *packed_attention_backward_op(dout_td, *ctx.saved_tensors, *ctx.layout), *(None,) * 7


packed_attention_op.register_autograd(_autograd, setup_context=_setup_context)


def packed_attention(
    q_td: Tensor,
    k_td: Tensor,
    v_td: Tensor,
    cu_seqlens: Sequence[int],
    roots: Sequence[int],
    *,
    head_dim: int,
    scaling: float,
    cos_te: Tensor | None = None,
    sin_te: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """out [t, H e] of q [t, H e], k and v [t, K e], K dividing H; e = head_dim, t = cu_seqlens[-1]. Differentiable in q, k and v.

    cu_seqlens: ints [segments + 1] from 0; roots: ints [segments], see the head of this file. cos_te, sin_te: [t, e] in the dtype of q,
    frozen, or None for no rotation. window: tokens that a query sees at most, itself included; None = all.

    Raises ValueError when shapes disagree or a family's segments are not adjacent.
    """
    t = len(q_td)
    borders = list(cu_seqlens)
    spans_t = borders[:1] == [0] and borders[-1] == t and borders == sorted(borders)
    if not spans_t or len(roots) != len(borders) - 1 or len(k_td) != t or v_td.shape != k_td.shape:
        raise ValueError(
            f"packed_attention: q {tuple(q_td.shape)}, k {tuple(k_td.shape)}, v {tuple(v_td.shape)}, {len(roots)} roots and "
            f"cu_seqlens {borders} do not fit"
        )
    tables = [None if table is None else tuple(table.shape) for table in (cos_te, sin_te)]
    if tables not in ([None, None], [(t, head_dim)] * 2):
        raise ValueError(f"packed_attention: cos_te and sin_te are {tables[0]} and {tables[1]}; both must be {(t, head_dim)}, or None")
    if q_td.shape[1] % head_dim or k_td.shape[1] % head_dim or q_td.shape[1] % k_td.shape[1]:
        raise ValueError(f"packed_attention: widths {q_td.shape[1]} and {k_td.shape[1]} are not heads of width {head_dim} that share keys")
    if any(root not in (s, roots[s - 1] if s else s) for s, root in enumerate(roots)):
        raise ValueError(f"packed_attention: roots {list(roots)}: segments that share a root must follow it without a gap")
    args = (q_td, k_td, v_td, cos_te, sin_te, borders, list(roots), head_dim, scaling, window or 0)
    return call(packed_attention_op, _forward, *args)[0]


def visible_pairs(cu_seqlens: Sequence[int], roots: Sequence[int]) -> int:
    """Number of (query, key) pairs that attention computes for one head."""
    return sum(
        count * length * (root_last - root_first) + count * length * (length + 1) // 2
        for _, count, length, (root_first, root_last) in _runs(cu_seqlens, roots)
    )


def cost(
    q_td: Tensor,
    k_td: Tensor,
    v_td: Tensor,
    cos_te: Any,
    sin_te: Any,
    cu_seqlens: Any,
    roots: Any,
    head_dim: int,
    scaling: float,
    window: int,
) -> Cost:
    """Forward pass: two products a visible pair; q, k, v and out once."""
    pairs = visible_pairs(cu_seqlens, roots)
    return Cost(4 * q_td.shape[1] * pairs, (2 * q_td.numel() + 2 * k_td.numel()) * q_td.element_size())


def backward_cost(
    dout_td: Tensor, q_td: Tensor, k_td: Tensor, v_td: Tensor, cos_te: Any, sin_te: Any, out_td: Any, lse: Any, *layout: Any
) -> Cost:
    """Backward pass: five products a visible pair; q, k, v, out, dout and the three gradients once."""
    pairs = visible_pairs(layout[0], layout[1])
    return Cost(10 * q_td.shape[1] * pairs, (4 * q_td.numel() + 4 * k_td.numel()) * q_td.element_size())


def sample_inputs(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Any, ...]]:
    """No token; one; ragged families, several heads to a key; lone sequences without a rotation; a block border (48) crossed; a window."""
    generator = torch.Generator().manual_seed(0)
    for lengths, roots, heads, key_heads, rotated, window in (
        ((), (), 1, 1, True, 0),
        ((1,), (0,), 1, 1, True, 0),
        ((5, 3, 3, 1, 17, 2), (0, 0, 0, 0, 4, 4), 3, 1, True, 0),
        ((7, 63), (0, 1), 2, 2, False, 0),
        ((33, 50, 49), (0, 0, 0), 2, 1, True, 0),
        ((33, 50, 49), (0, 0, 0), 2, 1, True, 20),
    ):
        cu_seqlens = [0]
        for length in lengths:
            cu_seqlens.append(cu_seqlens[-1] + length)
        t, e = cu_seqlens[-1], 32
        q, k, v = (
            torch.randn(t, n * e, generator=generator, dtype=torch.float64).to(dtype).to(device) for n in (heads, key_heads, key_heads)
        )
        angles = torch.rand(t, e // 2, generator=generator, dtype=torch.float64).repeat(1, 2).to(device) * 6
        tables = (angles.cos().to(dtype), angles.sin().to(dtype)) if rotated else (None, None)
        yield *(x.requires_grad_() for x in (q, k, v)), *tables, cu_seqlens, list(roots), e, e**-0.5, window


def backward_sample_inputs(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Any, ...]]:
    """The forward samples with a gradient."""
    for q, k, v, *tables, cu_seqlens, roots, head_dim, scaling, window in sample_inputs(dtype, device):
        inputs = (q.detach(), k.detach(), v.detach(), *tables)
        out, lse = packed_attention_op(*inputs, cu_seqlens, roots, head_dim, scaling, window)
        yield out.cos(), *inputs, out, lse, cu_seqlens, roots, head_dim, scaling, window


SPEC = OpSpec("packed_attention", packed_attention_op, sample_inputs, cost)
BACKWARD_SPEC = OpSpec("packed_attention_backward", packed_attention_backward_op, backward_sample_inputs, backward_cost)
