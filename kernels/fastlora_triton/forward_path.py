"""Which way a group's forward pass takes: one fused product, or the library's product and the adapter added to it.

    fused     2 t d Σn / (peak · TRITON_SHARE)
    cublas    2 t d Σn / (peak · CUBLAS_SHARE) + 2 t Σ_{r_m > 0} n_m · bytes of an element / bandwidth

The second reads and writes y once more. With the numbers below a group whose modules all have ranks is faster fused up to d = 2,900 in
bfloat16 on an H100 (Qwen2.5-1.5B: all groups but down_proj's). The ranks' own work is the same in both. Predicted from published peaks; the
two shares are assumed, not measured: `python -m bench.gpu` measures both paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastlora_triton.launch import capability_of

Path = Literal["fused", "cublas"]

TRITON_SHARE, CUBLAS_SHARE = 0.65, 0.75
"""Of the tensor cores' peak, products of these sizes. Assumed."""
FMA_SHARE = 0.5
"""Of the CUDA cores' peak, a Triton product in IEEE float32. Assumed; cuBLAS has CUBLAS_SHARE there too."""


@dataclass(frozen=True, slots=True)
class Chip:
    """Published peaks of a data sheet, dense: FLOP/s and bytes/s."""

    half: float
    tf32: float
    float32: float
    bandwidth: float


CHIPS = {
    80: Chip(312e12, 156e12, 19.5e12, 2.04e12),  # A100 SXM 80 GB
    90: Chip(989e12, 494e12, 67e12, 3.35e12),  # H100 SXM
    100: Chip(2250e12, 1125e12, 75e12, 8e12),  # B200
}


def select_path(x_td: Tensor, outs: Sequence[int], ranks: Sequence[int]) -> Path:
    """The one with the smaller predicted time."""
    chip, (t, d) = CHIPS[capability_of(x_td.device)], x_td.shape
    peak, share = chip.half, TRITON_SHARE
    if x_td.dtype == torch.float32:
        tensor_cores = torch.backends.cuda.matmul.allow_tf32
        peak, share = (chip.tf32, TRITON_SHARE) if tensor_cores else (chip.float32, FMA_SHARE)
    flops, again = 2 * t * d * sum(outs), 2 * t * sum(n for n, r in zip(outs, ranks, strict=True) if r) * x_td.element_size()
    return "fused" if flops / (peak * share) <= flops / (peak * CUBLAS_SHARE) + again / chip.bandwidth else "cublas"
