"""Which tile of which matrix a program of `export_adapter` moves: a table on the device, made once for an adapter. Triton's and CUDA's.

A tile is TILE_RANKS ranks of TILE_COLUMNS columns of A_m [r, d] or of B_mᵀ [r, n]; ranks from r_m up to what the sampler wants are zeros
and have tiles too. A row of the table, int64 [·, 8]:

    side (0: A, 1: B), first element in the buffer, first element in the output, rank, columns, rank in the output, first rank, first column
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

TILE_RANKS, TILE_COLUMNS = 32, 128
"""16 KB in float32: rows of 512 bytes are read, and of B's 32 ranks a column 64 bytes of bfloat16 are written beside each other."""


@dataclass(frozen=True, slots=True)
class ExportTiles:
    """One adapter's."""

    table: Tensor
    """int64 [tiles, 8]."""
    scales: Tensor
    """float32 [tiles]: s_m for B, 1 for A."""


@lru_cache(maxsize=8)
def export_tiles(
    a_offsets: tuple[int, ...],
    b_offsets: tuple[int, ...],
    ranks: tuple[int, ...],
    ins: tuple[int, ...],
    outs: tuple[int, ...],
    scales: tuple[float, ...],
    out_ranks: tuple[int, ...],
    device: torch.device,
) -> ExportTiles:
    """All tiles of A, then of B. out_ranks: of every module as the sampler wants it."""
    sides: tuple[tuple[Sequence[int], Sequence[int], Sequence[float]], ...] = (
        (a_offsets, ins, [1.0] * len(ranks)),
        (b_offsets, outs, scales),
    )
    table, factors = [], []
    for side, (offsets, widths, side_scales) in enumerate(sides):
        starts = [0, *accumulate(r * w for r, w in zip(out_ranks, widths, strict=True))]
        for offset, start, rank, width, out_rank, scale in zip(offsets, starts, ranks, widths, out_ranks, side_scales, strict=False):
            for r in range(0, out_rank, TILE_RANKS):
                for c in range(0, width, TILE_COLUMNS):
                    table.append((side, offset, start, rank, width, out_rank, r, c))
                    factors.append(scale)
    return ExportTiles(
        torch.tensor(table, dtype=torch.int64, device=device).reshape(-1, 8), torch.tensor(factors, dtype=torch.float32, device=device)
    )
