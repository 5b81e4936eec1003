"""Liger's Triton kernels in our ops' shapes (liger-kernel 0.8.5): RMS norm, SwiGLU and rotary embedding on a GPU.

Two of Liger's habits are undone here, since our ops write to nothing that their schema does not name: its SwiGLU backward overwrites gate
and up, its rotary embedding overwrites q and k. Both get copies. Not run on a GPU.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

CASTING = "gemma"
"""Liger's name for: all in float32, rounded once. (`llama` rounds x r before the gain, as Hugging Face's module does.)"""


def refuses(device: torch.device, *args: Any) -> str | None:
    """Why Liger's kernels cannot run: not installed, no GPU, float64, an empty tensor (an empty grid is an error of the driver)."""
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed (pip install 'fastlora[gpu]')"
    if device.type != "cuda":
        return f"it runs on a GPU, the tensors are on {device.type}"
    for x in args:
        if isinstance(x, Tensor) and x.dtype == torch.float64:
            return "it takes float32, bfloat16 and float16, not torch.float64"
        if isinstance(x, Tensor) and not x.numel():
            return "it takes no empty tensors"
    return None


def rms_norm(x: Tensor, weight_d: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y like x, r [rows] float32)."""
    from liger_kernel.ops.rms_norm import rms_norm_forward

    y, _, rstd_t, *_ = rms_norm_forward(x.contiguous(), weight_d.contiguous(), eps, 0.0, CASTING, None)
    return y, rstd_t


def rms_norm_backward(dy: Tensor, x: Tensor, weight_d: Tensor, rstd_t: Tensor, need_dw: bool) -> tuple[Tensor, Tensor]:
    """(dx like x, dw [d]; empty [0] when not needed)."""
    from liger_kernel.ops.rms_norm import _str_to_casting_mode
    from liger_kernel.ops.rms_norm import rms_norm_backward as backward
    from liger_kernel.ops.utils import calculate_settings

    d = x.shape[-1]
    block, warps = calculate_settings(d)
    rows = (dy.contiguous(), x.contiguous().view(-1, d), weight_d.contiguous(), rstd_t)
    dx, dw = backward(*rows, 0.0, _str_to_casting_mode[CASTING], block, warps, in_place=False, row_mode=None, needs_dw=need_dw)
    return dx, dw if need_dw else weight_d.new_empty(0)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """y like gate; Liger rounds silu(gate) to the dtype before the product."""
    from liger_kernel.ops.swiglu import swiglu_forward

    return swiglu_forward(gate.contiguous(), up.contiguous())[2]


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(d gate, d up)."""
    from liger_kernel.ops.swiglu import swiglu_backward as backward

    copies = (x.clone(memory_format=torch.contiguous_format) for x in (gate, up))  # which it overwrites with their gradients
    return backward(*copies, dy.contiguous())


def rotate(q_the: Tensor, k_the: Tensor, cos_te: Tensor, sin_te: Tensor, *, back: bool = False) -> tuple[Tensor, Tensor]:
    """Rotary embedding of query and key heads by tables [t, e] of two equal halves; back: by the opposite angle, as gradients are."""
    from liger_kernel.ops.rope import rope_backward, rope_forward

    heads = (x.clone(memory_format=torch.contiguous_format)[None].transpose(1, 2) for x in (q_the, k_the))  # [1, H, t, e] over [t, H, e]
    q, k = (rope_backward if back else rope_forward)(*heads, cos_te, sin_te)[:2]
    return q[0].transpose(0, 1), k[0].transpose(0, 1)
