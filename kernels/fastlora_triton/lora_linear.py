"""lora_linear on a GPU, forward: a group's projections with a rank for each, in two launches.

    H   = x A_catᵀ                        shrink_kernel        [t, d] [P, d] -> [t, P]
    y_m = s_m H_m B_mᵀ + x W_mᵀ + b_m     expand_base_kernel   ranks first, scaled in float32, then K: y is written once

or, where forward_path.py expects the library's product to gain more than y costs to be read and written again,

    y_m = x W_mᵀ + b_m                    cuBLAS
    y_m += s_m H_m B_mᵀ                   expand_add_kernel    the tiles of modules that have ranks

W is the matrix [Σ n_m, d] of all members; P and the tables: group_layout.py. Operands are float32 (as TF32 or IEEE), bfloat16 or float16,
sums float32. d and n_m are multiples of 8 and all tensors start on 16 bytes: the op refuses others by name.

Numbers that follow from t are not specialised on (do_not_specialize): packed batches have a new t at every step, and Triton would compile
anew for t = 1 and for multiples of 16.

| sm_90, bf16 | registers | CTAs/SM | bytes from memory / compulsory, 25 MB of L2: qkv, o, gate_up, down of Qwen2.5-1.5B, 8,192 tokens |
|---|---|---|---|
| shrink_kernel | 60 | 4 | 1.00, 1.00, 1.00, 1.00 |
| expand_base_kernel | 99 | 2 | 1.00, 1.00, 1.18, 1.28 |
| expand_add_kernel | 128 | 2 | |

Not run on a GPU: compiled for sm_80, sm_90 and sm_100 and run on a CPU (tests/ops/test_triton_lora_linear.py); docs/kernels.md has all
machine codes, docs/bytes.md the model behind the last column.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora_triton.forward_path import Path, select_path
from fastlora_triton.group_layout import RANK_STEP, GroupLayout, group_layout
from fastlora_triton.launch import launch
from fastlora_triton.tiles import Tiles, tiles_for


def row_group(column_tiles: int, k: int) -> int:
    """Row tiles that run together, so that their x (or dy) and W tiles meet in L2: of the orders in docs/bytes.md the best or nearly so.

    For the 264 programs that an H100 runs at once: 1 where all columns of 8 rows run at once anyway; 32 where their rows of x (12 MB at
    k = 1,536) stay in half of L2 while W passes; else 22, with 12 columns at once: near a square, which reads least.
    """
    if column_tiles <= 32:
        return 1
    return 32 if k <= 1536 else 22


@triton.jit
def tile_of_program(row_tiles, column_tiles, ROW_GROUP: tl.constexpr):
    """(row tile, column tile) of this program: ROW_GROUP rows of tiles column by column, then the next ones, columns backwards.

    Backwards, since the W tiles of the turn are still in L2.
    """
    together = ROW_GROUP * column_tiles
    group = tl.program_id(0) // together
    first_row_tile = group * ROW_GROUP
    rows_here = min(row_tiles - first_row_tile, ROW_GROUP)
    within = tl.program_id(0) % together
    column = within // rows_here
    return first_row_tile + within % rows_here, tl.where(group % 2 == 1, column_tiles - 1 - column, column)


@triton.jit
def module_row(modules_ptr, m):
    """(first column of P, rank rounded up, rank, n, first element of B) of a module, with what is known of their divisors."""
    row = modules_ptr + 6 * m
    first_column, padded_rank = tl.multiple_of(tl.load(row), 16), tl.multiple_of(tl.load(row + 1), 16)
    n, b0 = tl.multiple_of(tl.load(row + 3), 8), tl.multiple_of(tl.load(row + 5), 8)
    return first_column, padded_rank, tl.load(row + 2), n, b0


@triton.jit
def shrink_kernel(
    x_desc,  # [T, d], blocks [BLOCK_T, BLOCK_K]
    a_ptr,  # [R, d]
    h_desc,  # [T, P], blocks [BLOCK_T, BLOCK_R]
    row_of_column_ptr,
    P,
    d,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T
    p = tl.program_id(1) * BLOCK_R
    column = p + tl.arange(0, BLOCK_R)
    row = tl.load(row_of_column_ptr + column, mask=column < P, other=-1)
    k = tl.arange(0, BLOCK_K)
    a_rows = a_ptr + row.to(tl.int64)[:, None] * d + k[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for k0 in range(0, d, BLOCK_K):
        x_tk = x_desc.load([t, k0])
        a_rk = tl.load(a_rows + k0, mask=(row >= 0)[:, None] & (k0 + k < d)[None, :], other=0.0)
        acc = tl.dot(x_tk, a_rk.T, acc, input_precision=PRECISION)
    h_desc.store([t, p], acc.to(h_desc.dtype))


@triton.jit
def _expanded_tile(
    h_desc,
    b_ptr,
    modules_ptr,
    scales_ptr,
    column_tiles_ptr,
    T,
    column_tiles,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RANK_STEP: tl.constexpr,
    ROW_GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of this program's tile: (s_m H_m B_mᵀ [BLOCK_T, BLOCK_N] in float32, m, n_m, first row, first column)."""
    row_tile, tile = tile_of_program(tl.cdiv(T, BLOCK_T), column_tiles, ROW_GROUP)
    t0 = row_tile * BLOCK_T
    m = tl.load(column_tiles_ptr + 2 * tile)
    n0 = tl.multiple_of(tl.load(column_tiles_ptr + 2 * tile + 1), 16)
    first_column, padded_rank, rank, n, b0 = module_row(modules_ptr, m)
    columns, r = n0 + tl.arange(0, BLOCK_N), tl.arange(0, RANK_STEP)
    b_rows = b_ptr + b0 + r[:, None] * n + columns[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for r0 in range(0, padded_rank, RANK_STEP):
        h_tr = h_desc.load([t0, first_column + r0])
        b_rn = tl.load(b_rows + r0 * n, mask=(r0 + r < rank)[:, None] & (columns < n)[None, :], other=0.0)
        acc = tl.dot(h_tr, b_rn, acc, input_precision=PRECISION)
    return acc * tl.load(scales_ptr + m), m, n, t0, n0


@triton.jit(do_not_specialize=["T", "column_tiles"])
def expand_base_kernel(
    x_desc,  # [T, d], blocks [BLOCK_T, BLOCK_K]
    w_desc,  # [Σ n, d], blocks [BLOCK_N, BLOCK_K]
    h_desc,  # [T, P], blocks [BLOCK_T, RANK_STEP]
    b_ptr,  # B_mᵀ [r_m, n_m] one after another
    bias_ptr,  # [Σ n]
    y_ptrs,  # y_m [T, n_m], one for each module
    modules_ptr,
    scales_ptr,
    column_tiles_ptr,
    T,
    d,
    column_tiles,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RANK_STEP: tl.constexpr,
    ROW_GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    acc, m, n, t0, n0 = _expanded_tile(
        h_desc, b_ptr, modules_ptr, scales_ptr, column_tiles_ptr, T, column_tiles, BLOCK_T, BLOCK_N, RANK_STEP, ROW_GROUP, PRECISION
    )
    columns = n0 + tl.arange(0, BLOCK_N)
    w0 = tl.load(modules_ptr + 6 * m + 4) + n0
    for k0 in range(0, d, BLOCK_K):
        acc = tl.dot(x_desc.load([t0, k0]), w_desc.load([w0, k0]).T, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + w0 + tl.arange(0, BLOCK_N), mask=columns < n, other=0.0).to(tl.float32)[None, :]
    rows = t0 + tl.arange(0, BLOCK_T)
    inside = (rows < T)[:, None] & (columns < n)[None, :]
    at = rows.to(tl.int64)[:, None] * n + columns[None, :]
    for i in tl.static_range(len(y_ptrs)):
        if m == i:
            tl.store(y_ptrs[i] + at, acc.to(y_ptrs[i].dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "column_tiles"])
def expand_add_kernel(
    h_desc,  # [T, P], blocks [BLOCK_T, RANK_STEP]
    b_ptr,  # B_mᵀ [r_m, n_m] one after another
    y_ptrs,  # y_m [T, n_m], one for each module; read, added to, written
    modules_ptr,
    scales_ptr,
    column_tiles_ptr,
    T,
    column_tiles,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RANK_STEP: tl.constexpr,
    ROW_GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    acc, m, n, t0, n0 = _expanded_tile(
        h_desc, b_ptr, modules_ptr, scales_ptr, column_tiles_ptr, T, column_tiles, BLOCK_T, BLOCK_N, RANK_STEP, ROW_GROUP, PRECISION
    )
    columns = n0 + tl.arange(0, BLOCK_N)
    rows = t0 + tl.arange(0, BLOCK_T)
    inside = (rows < T)[:, None] & (columns < n)[None, :]
    at = rows.to(tl.int64)[:, None] * n + columns[None, :]
    for i in tl.static_range(len(y_ptrs)):
        if m == i:
            y = tl.load(y_ptrs[i] + at, mask=inside, other=0.0).to(tl.float32) + acc
            tl.store(y_ptrs[i] + at, y.to(y_ptrs[i].dtype.element_ty), mask=inside)


def forward(
    x_td: Tensor,
    w_nd: Tensor,
    bias_n: Tensor | None,
    a_rd: Tensor,
    b_flat: Tensor,
    outs: Sequence[int],
    ranks: Sequence[int],
    scales: Sequence[float],
    path: Path | None = None,
) -> tuple[list[Tensor], Tensor]:
    """(y_m [t, n_m] of every module, H [t, P]). w_nd: [Σ n_m, d]; path: None = forward_path's choice; the rest as in
    fastlora/ops/lora_linear.py."""
    tiles = tiles_for(x_td)
    layout = layout_of(outs, ranks, scales, tiles, x_td.device)
    t = x_td.shape[0]
    h_tp = x_td.new_empty(t, layout.columns)
    ys = [x_td.new_empty(t, n) for n in outs]
    if t == 0:
        return ys, h_tp
    if layout.columns:
        shrink(x_td, a_rd, h_tp, layout, tiles)
    if (path or select_path(x_td, outs, ranks)) == "fused":
        expand_base(x_td, w_nd, bias_n, h_tp, b_flat, ys, layout, tiles)
        return ys, h_tp
    for m, (y_tn, w_md) in enumerate(zip(ys, w_nd.split(list(outs)), strict=True)):
        if bias_n is None:
            torch.mm(x_td, w_md.t(), out=y_tn)
        else:
            torch.addmm(bias_n.split(list(outs))[m], x_td, w_md.t(), out=y_tn)
    if layout.columns:
        expand_add(h_tp, b_flat, ys, layout, tiles)
    return ys, h_tp


def expand_base(
    x_td: Tensor, w_nd: Tensor, bias_n: Tensor | None, h_tp: Tensor, b_flat: Tensor, ys: Sequence[Tensor], layout: GroupLayout, tiles: Tiles
) -> None:
    """Fills every y_m: base and adapter in one accumulator."""
    (t, d), column_tiles = x_td.shape, len(layout.column_tiles)
    launch(
        expand_base_kernel,
        (triton.cdiv(t, tiles.t) * column_tiles,),
        descriptor(x_td, tiles.t, tiles.k),
        descriptor(w_nd, tiles.n, tiles.k),
        descriptor(h_tp if layout.columns else x_td, tiles.t, RANK_STEP),  # without ranks it is not read
        b_flat,
        w_nd if bias_n is None else bias_n,
        tuple(ys),
        layout.modules,
        layout.scales,
        layout.column_tiles,
        t,
        d,
        column_tiles,
        HAS_BIAS=bias_n is not None,
        BLOCK_T=tiles.t,
        BLOCK_N=tiles.n,
        BLOCK_K=tiles.k,
        RANK_STEP=RANK_STEP,
        ROW_GROUP=row_group(column_tiles, d),
        PRECISION=tiles.precision,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def expand_add(h_tp: Tensor, b_flat: Tensor, ys: Sequence[Tensor], layout: GroupLayout, tiles: Tiles) -> None:
    """Adds the adapter's part to every y_m that has one."""
    t, column_tiles = h_tp.shape[0], len(layout.adapted_tiles)
    launch(
        expand_add_kernel,
        (triton.cdiv(t, tiles.t) * column_tiles,),
        descriptor(h_tp, tiles.t, RANK_STEP),
        b_flat,
        tuple(ys),
        layout.modules,
        layout.scales,
        layout.adapted_tiles,
        t,
        column_tiles,
        BLOCK_T=tiles.t,
        BLOCK_N=tiles.n,
        RANK_STEP=RANK_STEP,
        ROW_GROUP=row_group(column_tiles, h_tp.shape[1]),
        PRECISION=tiles.precision,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def shrink(x_td: Tensor, a_rd: Tensor, h_tp: Tensor, layout: GroupLayout, tiles: Tiles) -> None:
    """h_tp = x A_catᵀ, columns in the order of `layout`."""
    t, d = x_td.shape
    launch(
        shrink_kernel,
        (triton.cdiv(t, tiles.shrink_t), triton.cdiv(layout.columns, tiles.r)),
        descriptor(x_td, tiles.shrink_t, tiles.k),
        a_rd,
        descriptor(h_tp, tiles.shrink_t, tiles.r),
        layout.row_of_column,
        layout.columns,
        d,
        BLOCK_T=tiles.shrink_t,
        BLOCK_R=tiles.r,
        BLOCK_K=tiles.k,
        PRECISION=tiles.precision,
        num_warps=4,
        num_stages=tiles.stages,
    )


def layout_of(outs: Sequence[int], ranks: Sequence[int], scales: Sequence[float], tiles: Tiles, device: torch.device) -> GroupLayout:
    """The group's tables for these tiles."""
    return group_layout(tuple(outs), tuple(ranks), tuple(scales), tiles.n, tiles.r, device)


def descriptor(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Of a matrix, in blocks [rows, columns]: loads of it run through the TMA where there is one."""
    return TensorDescriptor.from_tensor(tensor, [rows, columns])
