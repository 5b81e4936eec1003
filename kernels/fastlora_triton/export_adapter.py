"""export_adapter on a GPU: all A and B of an adapter into the sampler's layout in one launch; formulas in fastlora/ops/export_adapter.py.

A program moves one tile of 32 ranks × 128 columns (export_layout.py). It is read as it lies in the buffer, rows of 512 bytes, times s_m in
float32. A's tile is written as it was read, B's transposed: Triton passes it through shared memory, so that a column's ranks are written
beside each other. Tiles of B and of A are told apart by a branch: which one it is stands in the table.

Bytes: 4 Σ r_m (d_m + n_m) read, Σ r' (d_m + n_m) elements written: 37 M parameters into bfloat16 are 221 MB, 66 µs at 3.35 TB/s.

Not run on a GPU: compiled for sm_90 and run on a CPU (tests/ops/test_triton_export_adapter.py).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastlora_triton.export_layout import TILE_COLUMNS, TILE_RANKS, ExportTiles
from fastlora_triton.launch import launch


@triton.jit
def _move(flat_ptr, out_a_ptr, out_b_ptr, side, source, target, rank, width, out_rank, r, c, scale):
    x_rc = tl.load(flat_ptr + source + r[:, None] * width + c[None, :], mask=(r < rank)[:, None] & (c < width)[None, :], other=0.0)
    x_rc = (x_rc * scale).to(out_a_ptr.dtype.element_ty)
    if side == 0:
        tl.store(out_a_ptr + target + r[:, None] * width + c[None, :], x_rc, mask=(r < out_rank)[:, None] & (c < width)[None, :])
    else:
        at_cr = target + c[:, None] * out_rank + r[None, :]
        tl.store(out_b_ptr + at_cr, x_rc.T, mask=(c < width)[:, None] & (r < out_rank)[None, :])


@triton.jit
def export_kernel(
    flat_ptr,
    out_a_ptr,
    out_b_ptr,
    tiles_ptr,  # int64 [·, 8]: see export_layout.py
    scales_ptr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tile = tiles_ptr + 8 * tl.program_id(0)
    side, source, target = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    rank, width, out_rank = tl.load(tile + 3), tl.load(tile + 4), tl.load(tile + 5)
    r = tl.multiple_of(tl.load(tile + 6), BLOCK_R) + tl.arange(0, BLOCK_R)
    c = tl.multiple_of(tl.load(tile + 7), BLOCK_C) + tl.arange(0, BLOCK_C)
    scale = tl.load(scales_ptr + tl.program_id(0))
    # fmt: off
    if (source | target | width | out_rank) % 8 == 0:  # products show the compiler that accesses of 16 bytes are aligned; in here only:
        # tl.multiple_of would say so of the other branch too
        _move(flat_ptr, out_a_ptr, out_b_ptr, side, source // 8 * 8, target // 8 * 8, rank, width // 8 * 8, out_rank // 8 * 8, r, c, scale)
    else:
        _move(flat_ptr, out_a_ptr, out_b_ptr, side, source, target, rank, width, out_rank, r, c, scale)
    # fmt: on


def export_adapter(flat: Tensor, tiles: ExportTiles, out_a: Tensor, out_b: Tensor) -> None:
    """Fills out_a and out_b, of one dtype, from the float32 buffer."""
    grid = (len(tiles.table),)
    launch(export_kernel, grid, flat, out_a, out_b, tiles.table, tiles.scales, BLOCK_R=TILE_RANKS, BLOCK_C=TILE_COLUMNS, num_warps=4)
