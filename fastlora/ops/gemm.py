"""Matrix products on torch's own GEMMs, the faster of the two that its CPU build has.

float32 goes to oneDNN instead of MKL: 330 to 400 GFLOP/s against 175 on two Zen 5 cores for the shapes of SmolLM2 (MKL does not use AVX512
there), about the same on Intel. torch sends bfloat16 to oneDNN by itself. No gradient passes through these functions: they
are for the bodies of ops.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDE_ENOUGH = 128
"""Inner dimension from which oneDNN's product and a separate sum beat MKL's addmm (r = 32: 112 against 185 GFLOP/s)."""


def _use_onednn(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and torch.backends.mkldnn.is_available()


def linear(x_tk: Tensor, weight_nk: Tensor, bias_n: Tensor | None = None) -> Tensor:
    """x Wᵀ + b: [t, n] from [t, k] and [n, k]; strided operands welcome."""
    if _use_onednn(x_tk) and x_tk.numel() and weight_nk.numel():
        return torch.ops.mkldnn._linear_pointwise(x_tk, weight_nk, bias_n, "none", [], "")
    return torch.nn.functional.linear(x_tk, weight_nk, bias_n)


def product(left_mk: Tensor, right_kn: Tensor) -> Tensor:
    """left · right, [m, n]."""
    return linear(left_mk, right_kn.t())


def add_product(target_mn: Tensor, left_mk: Tensor, right_kn: Tensor, alpha: float = 1.0) -> None:
    """target += alpha · left · right. Where left's dtype is wider than target's, the product is rounded once, with the sum."""
    if left_mk.dtype != target_mn.dtype or (_use_onednn(left_mk) and left_mk.shape[1] >= WIDE_ENOUGH):
        target_mn.add_(product(left_mk, right_kn), alpha=alpha)
    else:
        target_mn.addmm_(left_mk, right_kn, alpha=alpha)


def scaled_product(left_mk: Tensor, right_kn: Tensor, alpha: float, out: Tensor) -> None:
    """out = alpha · left · right, rounded once (bfloat16: twice would cost the gradient 1.5 % of error, LOG.md)."""
    if _use_onednn(left_mk):
        torch.mul(product(left_mk, right_kn), alpha, out=out)
    else:
        torch.addmm(out, left_mk, right_kn, beta=0, alpha=alpha, out=out)
