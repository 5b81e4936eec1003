"""Where the ranks and columns of a group's modules lie in a launch: small tables on the device, made once for a group.

H and dH [t, P] hold every module's ranks in columns of their own, rounded up to 16 (one step of a tensor core), so that no tile has two
modules and every load starts on 16 bytes: P = Σ ⌈r_m / 16⌉ 16. Ranks 3, 0, 17 take 16, 0, 32 columns. The tables are

    row_of_column [P]        row of a_rd behind a column; −1 where the column is padding
    modules [M, 6]           first column, rank rounded up, rank, n, first row of W, first element of B
    scales [M]
    column_tiles [·, 2]      (module, first output) of every tile of outputs
    adapted_tiles [·, 2]     those of modules that have ranks
    rank_tiles [·, 2]        (module, first rank) of every tile of ranks
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

RANK_STEP = 16


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def rank_columns(ranks: Sequence[int]) -> int:
    """P: columns of H."""
    return sum(_round_up(r, RANK_STEP) for r in ranks)


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """The tables of one group; int32, on the device, but for the scales."""

    columns: int
    """P."""
    row_of_column: Tensor
    modules: Tensor
    scales: Tensor
    column_tiles: Tensor
    adapted_tiles: Tensor
    rank_tiles: Tensor


@lru_cache(maxsize=1024)
def group_layout(
    outs: tuple[int, ...], ranks: tuple[int, ...], scales: tuple[float, ...], column_block: int, rank_block: int, device: torch.device
) -> GroupLayout:
    """Tables for modules of `outs` outputs. column_block, rank_block: sizes of the tiles."""
    padded = [_round_up(r, RANK_STEP) for r in ranks]
    first_column, first_row = _starts(padded), _starts(ranks)
    first_w, first_b = _starts(outs), _starts([n * r for n, r in zip(outs, ranks, strict=True)])
    row_of_column = [first_row[m] + i if i < r else -1 for m, r in enumerate(ranks) for i in range(padded[m])]
    column_tiles = [(m, c) for m, n in enumerate(outs) for c in range(0, n, column_block)]
    modules = list(zip(first_column, padded, ranks, outs, first_w, first_b, strict=True))

    def table(values: object, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return GroupLayout(
        rank_columns(ranks),
        table(row_of_column),
        table(modules),
        table(scales, torch.float32),
        table(column_tiles),
        table([(m, c) for m, c in column_tiles if ranks[m]]).reshape(-1, 2),
        table([(m, r) for m, p in enumerate(padded) for r in range(0, p, rank_block)]).reshape(-1, 2),
    )


def _starts(sizes: Sequence[int]) -> list[int]:
    return [0, *accumulate(sizes)][:-1]


@dataclass(frozen=True, slots=True)
class WeightJobs:
    """The tiles of dB and dA of a group."""

    table: Tensor
    """int32 [·, 7]: see `weight_gradient_kernel`."""
    factors: Tensor
    """float32 [·]: s_m for dB (s dyᵀ H), 1 for dA (dH has s already)."""
    components: Tensor
    """int32 [·, 2]: first element and width of every rank component, the rows of dB_mᵀ, then those of dA."""
    widest: int
    """Width of the widest component."""


@lru_cache(maxsize=1024)
def weight_jobs(
    outs: tuple[int, ...],
    ranks: tuple[int, ...],
    scales: tuple[float, ...],
    d: int,
    rank_block: int,
    column_block: int,
    device: torch.device,
) -> WeightJobs:
    """dB_m first, then dA (d = 0: none), in the order of b_flat and a_rd."""
    columns = _starts([_round_up(r, RANK_STEP) for r in ranks])
    sizes = [n * r for n, r in zip(outs, ranks, strict=True)]
    size_of_b = sum(sizes)
    products = [(0, 1 + m, columns[m], outs[m], first, scales[m], ranks[m]) for m, first in enumerate(_starts(sizes))]
    if d:
        products += [(1, 0, columns[m], d, size_of_b + d * row, 1.0, ranks[m]) for m, row in enumerate(_starts(ranks))]
    table, factors, components = [], [], []
    for side, wide, column, width, first, factor, rank in products:
        components += [(first + r * width, width) for r in range(rank)]
        for r in range(0, rank, rank_block):
            for c in range(0, width, column_block):
                table.append((side, wide, column + r, c, width, min(rank - r, rank_block), first + r * width))
                factors.append(factor)
    return WeightJobs(
        torch.tensor(table, dtype=torch.int32, device=device).reshape(-1, 7),
        torch.tensor(factors, dtype=torch.float32, device=device),
        torch.tensor(components, dtype=torch.int32, device=device).reshape(-1, 2),
        max((width for _, width in components), default=0),
    )
