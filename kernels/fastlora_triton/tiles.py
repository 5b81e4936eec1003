"""Tile shapes, a row for each architecture and width of an element, each with its reason. No tuning at run time: the same numbers every
run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

SMS = 132
"""Of an H100."""
PROGRAMS_OF_TWO_WAVES = 2 * SMS
"""Weight gradients are split over tokens until there are so many programs: two for every SM of an H100. Each split writes its float32 sums
once and they are read once, so that more than needed cost bytes."""

Precision = Literal["ieee", "tf32"]


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rows t, outputs n, inputs k, ranks r."""

    t: int
    n: int
    k: int
    r: int
    shrink_t: int
    v: int
    """Vocabulary entries of a tile of logits, t rows."""
    warps: int
    stages: int
    precision: Precision


SM90_HALF = Tiles(t=128, n=128, k=64, r=64, shrink_t=64, v=256, warps=8, stages=3, precision="ieee")
"""128 × 128 accumulators over two warp groups: 64 registers of sums a thread, two 64 × 128 wgmma; k 64 = one 128-byte swizzle row; 3 stages
of 32 KB leave room for two CTAs on an SM. shrink_t 64: 8,192 tokens make 128 programs, about one for every SM; it reads x once. v 256: 128
× 256 logits in 255 registers without a spill, 85 FLOP for a byte from L2 where 128 × 128 has 64."""

SM90_FLOAT = Tiles(t=128, n=64, k=32, r=64, shrink_t=64, v=64, warps=4, stages=3, precision="tf32")
"""Twice the bytes an element: half of n and k for the same shared memory."""


def tiles_for(x: Tensor) -> Tiles:
    """float32 runs as TF32 where torch is allowed to (torch.backends.cuda.matmul.allow_tf32), else in IEEE on the CUDA cores."""
    if x.dtype != torch.float32:
        return SM90_HALF
    if torch.backends.cuda.matmul.allow_tf32:
        return SM90_FLOAT
    return Tiles(
        t=64, n=64, k=32, r=32, shrink_t=64, v=64, warps=4, stages=2, precision="ieee"
    )  # FMA: registers bound it, not shared memory
