"""NF4: frozen weights in 4 bits (Dettmers et al. 2023, QLoRA, section 3), by bitsandbytes.

    w ≈ absmax_block · code[4 bits]        blocks of 64 consecutive weights; code: 16 quantiles of a standard normal, scaled to [−1, 1]

Shapes: W [n, d] -> packed uint8 [n, d / 2], absmax float32 [n d / 64]: 4.5 bits a weight. absmax is not quantised a second time.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from fastlora.errors import FastloraError

BLOCK = 64
BYTES_PER_WEIGHT = 0.5 + 4 / BLOCK


class QuantizationError(FastloraError):
    """A weight that cannot be held in 4 bits, or no bitsandbytes to do it."""


@cache
def _load_bitsandbytes() -> None:
    """Registers torch.ops.bitsandbytes. Raises QuantizationError when it is missing or broken."""
    # On a CPU it warns that a kernel from the hub is missing, for products that we do not ask of it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import_module("bitsandbytes")
    except (ImportError, OSError, RuntimeError) as error:
        raise QuantizationError(
            f"4-bit weights need bitsandbytes, which does not import ({error}): `pip install bitsandbytes`, or model.quantization = 'none'"
        ) from error


def quantize(weight_nd: Tensor) -> tuple[Tensor, Tensor]:
    """(packed uint8 [n, d / 2], absmax float32 [n d / 64]) of W [n, d], float32 or bfloat16. d must be even, n d a multiple of 64."""
    _load_bitsandbytes()
    n, d = weight_nd.shape
    if d % 2 or n * d % BLOCK:
        raise QuantizationError(f"a weight [{n}, {d}] does not fill whole blocks of {BLOCK} with an even row")
    packed, absmax = torch.ops.bitsandbytes.quantize_4bit(weight_nd.contiguous(), BLOCK, "nf4", torch.uint8)
    return packed.view(n, d // 2), absmax


def dequantize(packed: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """W [n, d] in `dtype` (through float32 where bitsandbytes has no kernel for it: float64)."""
    _load_bitsandbytes()
    offered = dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32
    # A row for each block: on a CPU bitsandbytes 0.50 takes the wrong absmax when a row ends inside a block (d = 96: 15 % error).
    blocks = torch.ops.bitsandbytes.dequantize_4bit(packed.view(-1, 1), absmax, BLOCK, "nf4", [absmax.numel(), BLOCK], offered)
    return blocks.view(packed.shape[0], -1).to(dtype)


def dense(weights: Sequence[Tensor], absmaxes: Sequence[Tensor], index: int, dtype: torch.dtype) -> Tensor:
    """W [n, d] of one of a group's projections: as it is, or unpacked when the group came with absmaxes."""
    return dequantize(weights[index], absmaxes[index], dtype) if absmaxes else weights[index]
