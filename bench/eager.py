"""What torch's own operations would launch, for counting: PEFT's layers run unchanged and every operation of theirs becomes launches of
traced kernels, one for each operation as eager torch does it.

    with counting(memory) as launches, EagerOps():
        y = layer(x)                    # nothing is computed; results are empty tensors of the right shape

A matrix product is our base kernel for its layout without ranks, the tile order included; anything elementwise reads its operands and
writes its result once. Views and empty tensors cost nothing. An operation that is not known raises NotImplementedError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fastlora_triton import lora_linear
from fastlora_triton.group_layout import group_layout
from fastlora_triton.launch import launch
from fastlora_triton.tiles import tiles_for

aten = torch.ops.aten
PRODUCTS = {aten.mm.default}
ELEMENTWISE = {
    *(aten.add.Tensor, aten.add_.Tensor, aten.mul.Tensor, aten.mul_.Tensor, aten.div.Tensor, aten.div.Scalar, aten._to_copy.default),
    *(aten.clone.default, aten.mul.Scalar, aten.copy_.default, aten.zeros.default, aten.zero_.default),
}
WRITES_ONLY = {aten.copy_.default, aten.zeros.default, aten.zero_.default}
"""Of their first argument."""
FREE = {
    *(aten.empty.memory_format, aten.new_empty.default, aten.empty_like.default, aten.empty_strided.default),
    *(aten.new_empty_strided.default, aten.detach.default),
}
"""Beside views."""
BLOCK = 1024


@triton.jit
def elementwise_kernel(inputs, out_ptr, n, BLOCK: tl.constexpr):
    """As much as any elementwise operation moves: all inputs once, the result once."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(len(inputs)):
        total += tl.load(inputs[k] + i, mask=i < n).to(tl.float32)
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=i < n)


class EagerOps(TorchDispatchMode):
    """Inside, operations of torch on the CPU are launches of traced kernels, and their results are not computed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func.is_view or func in FREE:
            return func(*args, **kwargs)
        if func in PRODUCTS:
            return product(*args)
        if func not in ELEMENTWISE:
            raise NotImplementedError(f"{func}: say in bench/eager.py what it moves")
        out = _result(func, args, kwargs)
        read = args[1:] if func in WRITES_ONLY else args
        elementwise([a for a in read if isinstance(a, Tensor) and a.numel() == out.numel()], out)
        return out


def _result(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What the operation returns, uncomputed: its first argument if it works in place."""
    if func._schema.is_mutable:
        return args[0]
    meta = func(*tree_map_only(Tensor, lambda t: t.to("meta"), args), **({**kwargs, "device": "meta"} if "device" in kwargs else kwargs))
    return torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype)


def elementwise(inputs: Sequence[Tensor], out: Tensor) -> None:
    """One launch over contiguous tensors of one shape."""
    n = out.numel()
    launch(elementwise_kernel, (triton.cdiv(n, BLOCK),), tuple(inputs), out, n, BLOCK=BLOCK, num_warps=4)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b by the kernel for the operands' layout: x Wᵀ, dy W or dyᵀ x. Raises NotImplementedError for another layout."""
    left, right = a.stride(1) == 1, b.stride(1) == 1
    if left and not right:
        return _forward(a, b.t())
    if left:
        return _input_gradient(a, b)
    if right:
        return _weight_gradient(a.t(), b)
    raise NotImplementedError(f"a product of strides {a.stride()} and {b.stride()}")


def _forward(x_td: Tensor, w_nd: Tensor) -> Tensor:
    """x Wᵀ: the base GEMM of a module of rank 0."""
    (y_tn,), _ = lora_linear.forward(x_td, w_nd, None, x_td.new_empty(0, x_td.shape[1]), x_td.new_empty(0), (len(w_nd),), (0,), (1.0,))
    return y_tn


def _input_gradient(dy_tn: Tensor, w_nd: Tensor) -> Tensor:
    """dy W: the input's gradient of a module of rank 0."""
    dx_td, no_rank, tiles = dy_tn.new_empty(len(dy_tn), w_nd.shape[1]), dy_tn.new_empty(len(dy_tn), 0), tiles_for(dy_tn)
    layout = group_layout((len(w_nd),), (0,), (1.0,), tiles.n, tiles.r, dy_tn.device)
    lora_linear.input_gradient((dy_tn,), w_nd, no_rank, w_nd.new_empty(0, w_nd.shape[1]), dx_td, layout, tiles)
    return dx_td


def _weight_gradient(dy_tn: Tensor, x_td: Tensor) -> Tensor:
    """dyᵀ x: our kernel for it, the narrower operand as the rank's side."""
    narrow, wide = sorted((dy_tn, x_td), key=lambda side: side.shape[1])
    dw_nd = dy_tn.new_empty(dy_tn.shape[1], x_td.shape[1])
    outs, ranks = (wide.shape[1],), (narrow.shape[1],)
    lora_linear.weight_gradients(
        (wide,), wide, narrow, narrow, None, dw_nd.view(-1), dw_nd.new_empty(0), outs, ranks, (1.0,), tiles_for(wide)
    )
    return dw_nd
