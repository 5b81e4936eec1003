"""Tile shapes, a row for each architecture and kind of operand, each with its reason. No tuning at run time: the same numbers every run.

`python -m bench.tune` proposes rows from measurements on a GPU; none has been taken yet, these follow from the chips' limits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastlora_triton.launch import capability_of

Precision = Literal["ieee", "tf32"]
Operands = Literal["half", "tf32", "ieee"]
"""bfloat16 and float16; float32 on tensor cores; float32 on CUDA cores."""


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
    precision: Precision = "ieee"


FMA = Tiles(t=64, n=64, k=32, r=32, shrink_t=64, v=64, warps=4, stages=2)
"""Products on the CUDA cores, on every architecture: registers bound them, not shared memory."""

TABLE: dict[int, dict[Operands, Tiles]] = {
    80: {
        # mma.sync. Without a TMA a descriptor becomes pointers, computed in registers, of whose alignment nothing is known: 128 × 128 sums
        # took 255 registers and spilled, loads are narrow. These compile without spills; lora_linear and linear_logprob refuse to run.
        "half": Tiles(t=64, n=64, k=32, r=32, shrink_t=64, v=64, warps=4, stages=3),
        "tf32": Tiles(t=64, n=64, k=32, r=32, shrink_t=64, v=64, warps=4, stages=2, precision="tf32"),
        "ieee": FMA,
    },
    90: {
        # 128 × 128 sums over two warp groups: 64 registers a thread, two 64 × 128 wgmma; k 64 = one 128-byte swizzle row; 3 stages of 32 KB
        # leave room for two CTAs on an SM, which hide each other's prologue and epilogue, so that no kernel is persistent. shrink_t 64:
        # 8,192 tokens make 128 programs, about one for every SM; it reads x once. v 256: 128 × 256 logits in 255 registers without a spill,
        # 85 FLOP for a byte from L2 where 128 × 128 has 64.
        "half": Tiles(t=128, n=128, k=64, r=64, shrink_t=64, v=256, warps=8, stages=3),
        # Twice the bytes an element: half of n and k for the same shared memory.
        "tf32": Tiles(t=128, n=64, k=32, r=64, shrink_t=64, v=64, warps=4, stages=3, precision="tf32"),
        "ieee": FMA,
    },
    100: {
        # Sums live in tensor memory (512 columns × 128 lanes), not in registers; as much shared memory as Hopper has: its shapes fit. But
        # logits come back to registers for the softmax, beside what reads them: 256 columns spilled 352 bytes.
        "half": Tiles(t=128, n=128, k=64, r=64, shrink_t=128, v=128, warps=8, stages=3),
        "tf32": Tiles(t=128, n=64, k=32, r=64, shrink_t=128, v=64, warps=4, stages=3, precision="tf32"),
        "ieee": FMA,
    },
}
SMS = {80: 108, 90: 132, 100: 148}
"""Streaming multiprocessors of an A100, an H100 or H200, a B200."""


def tiles_for(x: Tensor) -> Tiles:
    """float32 runs as TF32 where torch is allowed to (torch.backends.cuda.matmul.allow_tf32), else in IEEE on the CUDA cores."""
    operands: Operands = "half"
    if x.dtype == torch.float32:
        operands = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    return TABLE[capability_of(x.device)][operands]


def multiprocessors(device: torch.device) -> int:
    """SMs that a launch is laid out for."""
    return SMS[capability_of(device)]


def programs_of_two_waves(device: torch.device) -> int:
    """Work is split over tokens until there are so many programs: two for every SM. A split writes its float32 sums once and they are read
    once, so that more than needed cost bytes."""
    return 2 * multiprocessors(device)
