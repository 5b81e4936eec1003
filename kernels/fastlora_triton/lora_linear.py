"""lora_linear on a GPU: a group's projections with a rank for each, in two launches forward and four backward.

    H  = x A_catᵀ                                    shrink_kernel           [t, d] [P, d] -> [t, P]
    y_m = s_m H_m B_mᵀ + x W_mᵀ + b_m                expand_base_kernel      ranks first, scaled in float32, then K: y is written once
    dH_m = s_m dy_m B_m                              rank_gradient_kernel    [t, n_m] [r_m, n_m] -> [t, P]
    dx = Σ_m dy_m W_m + dH A_cat                     input_gradient_kernel
    dA = dHᵀ x,  dB_mᵀ = s_m H_mᵀ dy_m               weight_gradient_kernel  split over t, then summed in a fixed order

W is the matrix [Σ n_m, d] of all members; P and the tables: group_layout.py. Operands are float32 (as TF32 or IEEE), bfloat16 or float16,
sums float32. d and n_m are multiples of 8 and all tensors start on 16 bytes: the op refuses others by name.

Numbers that follow from t are not specialised on (do_not_specialize): packed batches have a new t at every step, and Triton would compile
anew for t = 1 and for multiples of 16.

Not run on a GPU: compiled for sm_90 and run on a CPU (tests/ops/test_triton_lora_linear.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora_triton.group_layout import RANK_STEP, GroupLayout, group_layout, weight_jobs
from fastlora_triton.launch import launch
from fastlora_triton.tiles import PROGRAMS_OF_TWO_WAVES, Tiles, tiles_for


def row_group(column_tiles: int, k: int) -> int:
    """Row tiles that run together, so that their x (or dy) and W tiles meet in L2: the best or nearly so of the orders in docs/bytes.md,
    for the 264 programs that an H100 runs at once. 1 where all columns of 16 rows run at once anyway; 32 where their rows of x (12 MB at
    k = 1,536) stay in half of L2 while W passes; else 22, with 12 columns at once: near a square, which reads least."""
    if column_tiles <= 16:
        return 1
    return 32 if k <= 1536 else 22


@triton.jit
def _tile_of_program(row_tiles, column_tiles, ROW_GROUP: tl.constexpr):
    """(row tile, column tile) of this program: ROW_GROUP rows of tiles column by column, then the next ones, columns backwards: the W tiles
    of the turn are still in L2."""
    together = ROW_GROUP * column_tiles
    group = tl.program_id(0) // together
    first_row_tile = group * ROW_GROUP
    rows_here = min(row_tiles - first_row_tile, ROW_GROUP)
    within = tl.program_id(0) % together
    column = within // rows_here
    return first_row_tile + within % rows_here, tl.where(group % 2 == 1, column_tiles - 1 - column, column)


@triton.jit
def _module(modules_ptr, m):
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
    row_tile, tile = _tile_of_program(tl.cdiv(T, BLOCK_T), column_tiles, ROW_GROUP)
    t0 = row_tile * BLOCK_T
    m = tl.load(column_tiles_ptr + 2 * tile)
    n0 = tl.multiple_of(tl.load(column_tiles_ptr + 2 * tile + 1), 16)
    first_column, padded_rank, rank, n, b0 = _module(modules_ptr, m)
    w0 = tl.load(modules_ptr + 6 * m + 4) + n0
    columns = n0 + tl.arange(0, BLOCK_N)
    r = tl.arange(0, RANK_STEP)
    b_rows = b_ptr + b0 + r[:, None] * n + columns[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for r0 in range(0, padded_rank, RANK_STEP):
        h_tr = h_desc.load([t0, first_column + r0])
        b_rn = tl.load(b_rows + r0 * n, mask=(r0 + r < rank)[:, None] & (columns < n)[None, :], other=0.0)
        acc = tl.dot(h_tr, b_rn, acc, input_precision=PRECISION)
    acc *= tl.load(scales_ptr + m)
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


def forward(
    x_td: Tensor,
    w_nd: Tensor,
    bias_n: Tensor | None,
    a_rd: Tensor,
    b_flat: Tensor,
    outs: Sequence[int],
    ranks: Sequence[int],
    scales: Sequence[float],
) -> tuple[list[Tensor], Tensor]:
    """(y_m [t, n_m] of every module, H [t, P]). w_nd: [Σ n_m, d]; the rest as in fastlora/ops/lora_linear.py."""
    tiles = tiles_for(x_td)
    layout = _layout(outs, ranks, scales, tiles, x_td.device)
    t, d = x_td.shape
    h_tp = x_td.new_empty(t, layout.columns)
    ys = [x_td.new_empty(t, n) for n in outs]
    if t and layout.columns:
        shrink(x_td, a_rd, h_tp, layout, tiles)
    if t == 0:
        return ys, h_tp
    column_tiles = len(layout.column_tiles)
    launch(
        expand_base_kernel,
        (triton.cdiv(t, tiles.t) * column_tiles,),
        _descriptor(x_td, tiles.t, tiles.k),
        _descriptor(w_nd, tiles.n, tiles.k),
        _descriptor(h_tp if layout.columns else x_td, tiles.t, RANK_STEP),  # without ranks it is not read
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
    return ys, h_tp


def shrink(x_td: Tensor, a_rd: Tensor, h_tp: Tensor, layout: GroupLayout, tiles: Tiles) -> None:
    """h_tp = x A_catᵀ, columns in the order of `layout`."""
    t, d = x_td.shape
    launch(
        shrink_kernel,
        (triton.cdiv(t, tiles.shrink_t), triton.cdiv(layout.columns, tiles.r)),
        _descriptor(x_td, tiles.shrink_t, tiles.k),
        a_rd,
        _descriptor(h_tp, tiles.shrink_t, tiles.r),
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


def _layout(outs: Sequence[int], ranks: Sequence[int], scales: Sequence[float], tiles: Tiles, device: torch.device) -> GroupLayout:
    return group_layout(tuple(outs), tuple(ranks), tuple(scales), tiles.n, tiles.r, device)


def _descriptor(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tensor, [rows, columns])


@triton.jit(do_not_specialize=["T"])
def rank_gradient_kernel(
    dy_ptrs,  # dy_m [T, n_m]
    b_ptr,
    dh_ptr,  # [T, P]
    modules_ptr,
    scales_ptr,
    rank_tiles_ptr,
    T,
    P,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    m = tl.load(rank_tiles_ptr + 2 * tl.program_id(1))
    r0 = tl.multiple_of(tl.load(rank_tiles_ptr + 2 * tl.program_id(1) + 1), 16)
    first_column, padded_rank, rank, n, b0 = _module(modules_ptr, m)
    r, k = r0 + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    b_rows = b_ptr + b0 + r[:, None] * n + k[None, :]
    dy_at = t.to(tl.int64)[:, None] * n + k[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for i in tl.static_range(len(dy_ptrs)):
        if m == i:
            for k0 in range(0, n, BLOCK_K):
                in_row = (k0 + k < n)[None, :]
                dy_tk = tl.load(dy_ptrs[i] + dy_at + k0, mask=(t < T)[:, None] & in_row, other=0.0)
                b_rk = tl.load(b_rows + k0, mask=(r < rank)[:, None] & in_row, other=0.0)
                acc = tl.dot(dy_tk, b_rk.T, acc, input_precision=PRECISION)
    acc *= tl.load(scales_ptr + m)
    inside = (t < T)[:, None] & (r < padded_rank)[None, :]
    tl.store(dh_ptr + t.to(tl.int64)[:, None] * P + (first_column + r)[None, :], acc.to(dh_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T"])
def input_gradient_kernel(
    dy_descs,  # dy_m [T, n_m], blocks [BLOCK_T, BLOCK_K]
    w_desc,  # [Σ n, d], blocks [BLOCK_K, BLOCK_N]
    dh_desc,  # [T, P], blocks [BLOCK_T, RANK_STEP]
    a_ptr,  # [R, d]
    dx_desc,  # [T, d], blocks [BLOCK_T, BLOCK_N]
    row_of_column_ptr,
    modules_ptr,
    T,
    P,
    d,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RANK_STEP: tl.constexpr,
    ROW_GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_tile, column_tile = _tile_of_program(tl.cdiv(T, BLOCK_T), tl.cdiv(d, BLOCK_N), ROW_GROUP)
    t0, c0 = row_tile * BLOCK_T, column_tile * BLOCK_N
    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for i in tl.static_range(len(dy_descs)):
        n = tl.load(modules_ptr + 6 * i + 3)
        w0 = tl.load(modules_ptr + 6 * i + 4)
        for n0 in range(0, n, BLOCK_K):
            # Behind the last output of a module dy's block is 0; W's holds the next module's rows.
            acc = tl.dot(dy_descs[i].load([t0, n0]), w_desc.load([w0 + n0, c0]), acc, input_precision=PRECISION)
    c, r = c0 + tl.arange(0, BLOCK_N), tl.arange(0, RANK_STEP)
    for p0 in range(0, P, RANK_STEP):
        row = tl.load(row_of_column_ptr + p0 + r)
        a_rn = tl.load(a_ptr + row.to(tl.int64)[:, None] * d + c[None, :], mask=(row >= 0)[:, None] & (c < d)[None, :], other=0.0)
        acc = tl.dot(dh_desc.load([t0, p0]), a_rn, acc, input_precision=PRECISION)
    dx_desc.store([t0, c0], acc.to(dx_desc.dtype))


@triton.jit(do_not_specialize=["T", "size", "t_of_a_split"])
def weight_gradient_kernel(
    rank_sides,  # (H, dH) [T, P]
    wide_sides,  # (x [T, d], dy_m [T, n_m] for every module)
    partial_ptr,  # [SPLITS, size of dB, then of dA], float32
    jobs_ptr,  # [·, 7]: which rank side, which wide side, first column of P, first wide column, width, rows, first element of the output
    factors_ptr,  # [·] s_m for dB, 1 for dA
    T,
    P,
    size,
    t_of_a_split,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    job = jobs_ptr + 7 * tl.program_id(0)
    side, wide = tl.load(job), tl.load(job + 1)
    p0, c0 = tl.multiple_of(tl.load(job + 2), 16), tl.multiple_of(tl.load(job + 3), 16)
    width, rows, out = tl.multiple_of(tl.load(job + 4), 8), tl.load(job + 5), tl.load(job + 6)
    first = tl.program_id(1) * t_of_a_split
    end = min(first + t_of_a_split, T)
    r, c, t = tl.arange(0, BLOCK_R), c0 + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_T)
    rank_at = (p0 + r)[None, :]
    acc = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for s in tl.static_range(len(rank_sides)):
        for i in tl.static_range(len(wide_sides)):
            if (side == s) & (wide == i):
                for t0 in range(first, end, BLOCK_T):
                    token = (t0 + t).to(tl.int64)[:, None]
                    there = token < end
                    left_tr = tl.load(rank_sides[s] + token * P + rank_at, mask=there & (r < rows)[None, :], other=0.0)
                    right_tn = tl.load(wide_sides[i] + token * width + c[None, :], mask=there & (c < width)[None, :], other=0.0)
                    acc = tl.dot(left_tr.T, right_tn, acc, input_precision=PRECISION)
    acc *= tl.load(factors_ptr + tl.program_id(0))
    inside = (r < rows)[:, None] & (c < width)[None, :]
    to = partial_ptr + tl.program_id(1).to(tl.int64) * size + out + r[:, None] * width + c[None, :]
    tl.store(to, acc, mask=inside)


@triton.jit(do_not_specialize=["size_b", "size", "splits"])
def sum_splits_kernel(partial_ptr, mask_ptr, db_ptr, da_ptr, size_b, size, splits, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    """dB = mask · Σ over splits, dA = Σ over splits, in the order of the splits: the same bits at every run."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        total += tl.load(partial_ptr + i, mask=i < size, other=0.0)
        partial_ptr += size
    in_b = i < size_b
    if HAS_MASK:
        total = tl.where(tl.load(mask_ptr + i, mask=in_b, other=1) != 0, total, 0.0)
    tl.store(db_ptr + i, total.to(db_ptr.dtype.element_ty), mask=in_b)
    tl.store(da_ptr + i - size_b, total.to(da_ptr.dtype.element_ty), mask=(i >= size_b) & (i < size))


def backward(
    dys: Sequence[Tensor],
    x_td: Tensor,
    h_tp: Tensor,
    w_nd: Tensor,
    a_rd: Tensor,
    b_flat: Tensor,
    b_mask: Tensor | None,
    outs: Sequence[int],
    ranks: Sequence[int],
    scales: Sequence[float],
    need_dx: bool,
    need_da: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx [t, d] or empty, dA [R, d] or empty, dB flat). h_tp: as `forward` returned it; w_nd: [Σ n_m, d]."""
    tiles = tiles_for(x_td)
    layout = _layout(outs, ranks, scales, tiles, x_td.device)
    t, d = x_td.shape
    dh_tp = torch.empty_like(h_tp)
    if t:
        rank_gradient(dys, b_flat, dh_tp, layout, tiles)
    dx_td = x_td.new_empty(t, d) if need_dx else x_td.new_empty(0)
    if need_dx and t:
        input_gradient(dys, w_nd, dh_tp, a_rd, dx_td, layout, tiles)
    db_flat, da_rd = torch.empty_like(b_flat), torch.empty_like(a_rd) if need_da else a_rd.new_empty(0)
    weight_gradients(dys, x_td, h_tp, dh_tp, b_mask, db_flat, da_rd, outs, ranks, scales, tiles)
    return dx_td, da_rd, db_flat


def rank_gradient(dys: Sequence[Tensor], b_flat: Tensor, dh_tp: Tensor, layout: GroupLayout, tiles: Tiles) -> None:
    """dh_tp = s_m dy_m B_m, a tile of ranks of one module a program."""
    t, columns = dh_tp.shape
    launch(
        rank_gradient_kernel,
        (triton.cdiv(t, tiles.shrink_t), len(layout.rank_tiles)),
        tuple(dys),
        b_flat,
        dh_tp,
        layout.modules,
        layout.scales,
        layout.rank_tiles,
        t,
        columns,
        BLOCK_T=tiles.shrink_t,
        BLOCK_R=tiles.r,
        BLOCK_K=tiles.k,
        PRECISION=tiles.precision,
        num_warps=4,
        num_stages=tiles.stages,
    )


def input_gradient(
    dys: Sequence[Tensor], w_nd: Tensor, dh_tp: Tensor, a_rd: Tensor, dx_td: Tensor, layout: GroupLayout, tiles: Tiles
) -> None:
    """dx_td = Σ_m dy_m W_m + dH A_cat in one accumulator."""
    t, d = dx_td.shape
    launch(
        input_gradient_kernel,
        (triton.cdiv(t, tiles.t) * triton.cdiv(d, tiles.n),),
        tuple(_descriptor(dy, tiles.t, tiles.k) for dy in dys),
        _descriptor(w_nd, tiles.k, tiles.n),
        _descriptor(dh_tp if layout.columns else dx_td, tiles.t, RANK_STEP),
        a_rd,
        _descriptor(dx_td, tiles.t, tiles.n),
        layout.row_of_column,
        layout.modules,
        t,
        layout.columns,
        d,
        BLOCK_T=tiles.t,
        BLOCK_N=tiles.n,
        BLOCK_K=tiles.k,
        RANK_STEP=RANK_STEP,
        ROW_GROUP=row_group(triton.cdiv(d, tiles.n), sum(dy.shape[1] for dy in dys)),
        PRECISION=tiles.precision,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def weight_gradients(
    dys: Sequence[Tensor],
    x_td: Tensor,
    h_tp: Tensor,
    dh_tp: Tensor,
    b_mask: Tensor | None,
    db_flat: Tensor,
    da_rd: Tensor,
    outs: Sequence[int],
    ranks: Sequence[int],
    scales: Sequence[float],
    tiles: Tiles,
) -> None:
    """Fills db_flat and da_rd (empty: not wanted): all products of the group in one launch, then the sum over splits."""
    t, d = x_td.shape
    size = db_flat.numel() + da_rd.numel()
    if t == 0 or size == 0:
        db_flat.zero_(), da_rd.zero_()
        return
    jobs = weight_jobs(tuple(outs), tuple(ranks), tuple(scales), d if da_rd.numel() else 0, tiles.r, tiles.n, x_td.device)
    splits = min(triton.cdiv(PROGRAMS_OF_TWO_WAVES, len(jobs.table)), triton.cdiv(t, tiles.k))
    t_of_a_split = triton.cdiv(triton.cdiv(t, splits), tiles.k) * tiles.k
    partial = torch.empty(splits, size, dtype=torch.float32, device=x_td.device)
    launch(
        weight_gradient_kernel,
        (len(jobs.table), splits),
        (h_tp, dh_tp),
        (x_td, *dys),
        partial,
        jobs.table,
        jobs.factors,
        t,
        h_tp.shape[1],
        size,
        t_of_a_split,
        BLOCK_R=tiles.r,
        BLOCK_N=tiles.n,
        BLOCK_T=tiles.k,
        PRECISION=tiles.precision,
        num_warps=4,
        num_stages=tiles.stages,
    )
    launch(
        sum_splits_kernel,
        (triton.cdiv(size, 1024),),
        partial,
        partial if b_mask is None else b_mask.view(torch.uint8),  # without a mask it is not read
        db_flat,
        da_rd if da_rd.numel() else db_flat,  # nothing of dA is written then
        db_flat.numel(),
        size,
        splits,
        HAS_MASK=b_mask is not None,
        BLOCK=1024,
        num_warps=4,
    )
