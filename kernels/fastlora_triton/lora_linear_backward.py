"""lora_linear on a GPU, backward: four launches for a group, whatever its ranks.

    dH_m = s_m dy_m B_m                     rank_gradient_kernel      [t, n_m] [r_m, n_m] -> [t, P]
    dx = Σ_m dy_m W_m + dH A_cat            input_gradient_kernel     one accumulator
    dA = dHᵀ x,  dB_mᵀ = s_m H_mᵀ dy_m      weight_gradient_kernel    split over t; tiles of B in which nothing trains are not computed
    g = mask · Σ over splits                finish_gradients_kernel   in a fixed order; Σ g² and the scores of study S3 leave it

The last adds to the gradient that is there already, if asked: what leaves it is of the accumulated gradient, before any clip. Σ g² is of
every rank component (a row of dB_mᵀ or dA_m); the scores are Σ g, Σ sign g, Σ |g|, Σ g² of every entry of B over the calls so far. A faster
split adds by atomics instead of to `splits` buffers; its last bits depend on the order of programs.

| sm_90, bf16 | registers | CTAs/SM | bytes from memory / compulsory, 25 MB of L2: qkv, o, gate_up, down of Qwen2.5-1.5B, 8,192 tokens |
|---|---|---|---|
| rank_gradient_kernel | 80 | 4 | 1.00, 1.00, 1.00, 1.00 |
| input_gradient_kernel | 90 | 2 | 1.19, 1.00, 1.29, 1.24 |
| weight_gradient_kernel | 146 (atomics 208) | 3 (2) | 1.00, 1.00, 1.00, 1.00 |
| finish_gradients_kernel | 64 (all statistics 92) | 8 (5) | 1.00, 1.00, 1.00, 1.00 |

Operands, tables and `do_not_specialize` as in lora_linear.py. Not run on a GPU: compiled for sm_80, sm_90 and sm_100 and run on a CPU
(tests/ops/test_triton_lora_linear.py); docs/kernels.md has all machine codes, docs/bytes.md the model behind the last column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora_triton.group_layout import RANK_STEP, GroupLayout, WeightJobs, weight_jobs
from fastlora_triton.launch import launch
from fastlora_triton.lora_linear import descriptor, layout_of, module_row, row_group, tile_of_program
from fastlora_triton.tiles import Tiles, programs_of_two_waves, tiles_for

FINISH_BLOCK = 1024
"""Entries of a program that sums splits: 4 warps, 8 each a thread, two 16-byte loads a split."""


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
    first_column, padded_rank, rank, n, b0 = module_row(modules_ptr, m)
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
    row_tile, column_tile = tile_of_program(tl.cdiv(T, BLOCK_T), tl.cdiv(d, BLOCK_N), ROW_GROUP)
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
    partial_ptr,  # [SPLITS, size of dB, then of dA], float32; with ATOMIC [size], zeros
    mask_ptr,  # uint8 [size of dB]: entries of B that train
    jobs_ptr,  # [·, 7]: which rank side, which wide side, first column of P, first wide column, width, rows, first element of the output
    factors_ptr,  # [·] s_m for dB, 1 for dA
    T,
    P,
    size,
    t_of_a_split,
    HAS_MASK: tl.constexpr,
    ATOMIC: tl.constexpr,
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
    wanted = (r < rows)[:, None] & (c < width)[None, :]
    at = out + r[:, None] * width + c[None, :]
    if HAS_MASK:  # looked at once and not kept: an entry's own bit would cost 64 registers through the loop
        trains = tl.load(mask_ptr + at, mask=wanted & (side == 0), other=0)
        alive = (side == 1) | (tl.max(tl.max(trains.to(tl.int32), 1), 0) > 0)
        end = tl.where(alive, end, first)  # nothing trains here: no products
        wanted = wanted & alive
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
    if ATOMIC:
        tl.atomic_add(partial_ptr + at, acc, mask=wanted, sem="relaxed")
    else:
        tl.store(partial_ptr + tl.program_id(1).to(tl.int64) * size + at, acc, mask=wanted)


@triton.jit(do_not_specialize=["size_b", "size", "splits"])
def finish_gradients_kernel(
    partial_ptr,  # [splits, size], float32
    mask_ptr,
    db_ptr,
    da_ptr,
    components_ptr,  # [·, 2]: first element and width of every rank component
    squares_ptr,  # float32 [components, chunks]
    scores_ptr,  # float32 [4, size of dB]: Σ g, Σ sign g, Σ |g|, Σ g²
    size_b,
    size,
    splits,
    HAS_MASK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    WITH_SQUARES: tl.constexpr,
    WITH_SCORES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """g = mask · Σ over splits (+ what the buffer holds), in the order of the splits: the same bits at every run.

    A program has one chunk of one rank component.
    """
    first, width = tl.load(components_ptr + 2 * tl.program_id(0)), tl.load(components_ptr + 2 * tl.program_id(0) + 1)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    i = first + column
    there, in_b = column < width, first < size_b
    trains = there
    if HAS_MASK:
        trains = there & (tl.load(mask_ptr + i, mask=there & in_b, other=1) != 0)
    g = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        g += tl.load(partial_ptr + split.to(tl.int64) * size + i, mask=trains, other=0.0)
    to_b, to_a = there & in_b, there & (first >= size_b)
    if ACCUMULATE:
        g += tl.load(db_ptr + i, mask=to_b, other=0.0).to(tl.float32) + tl.load(da_ptr + i - size_b, mask=to_a, other=0.0).to(tl.float32)
    tl.store(db_ptr + i, g.to(db_ptr.dtype.element_ty), mask=to_b)
    tl.store(da_ptr + i - size_b, g.to(da_ptr.dtype.element_ty), mask=to_a)
    if WITH_SQUARES:
        tl.store(squares_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(g * g, 0))
    if WITH_SCORES:
        sign = tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, 0.0))
        _add_to(scores_ptr + i, g, to_b)
        _add_to(scores_ptr + size_b + i, sign, to_b)
        _add_to(scores_ptr + 2 * size_b + i, tl.abs(g), to_b)
        _add_to(scores_ptr + 3 * size_b + i, g * g, to_b)


@triton.jit
def _add_to(ptrs, values, mask):
    tl.store(ptrs, tl.load(ptrs, mask=mask, other=0.0) + values, mask=mask)


@dataclass(frozen=True, slots=True)
class Group:
    """Outputs, rank and scale of every module."""

    outs: tuple[int, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]


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
    """(dx [t, d] or empty, dA [R, d] or empty, dB flat). h_tp: as `lora_linear.forward` returned it; w_nd: [Σ n_m, d]."""
    tiles = tiles_for(x_td)
    layout = layout_of(outs, ranks, scales, tiles, x_td.device)
    t, d = x_td.shape
    dh_tp = torch.empty_like(h_tp)
    if t and (need_dx or need_da):
        rank_gradient(dys, b_flat, dh_tp, layout, tiles)
    dx_td = x_td.new_empty(t, d) if need_dx else x_td.new_empty(0)
    if need_dx and t:
        input_gradient(dys, w_nd, dh_tp, a_rd, dx_td, layout, tiles)
    db_flat, da_rd = torch.empty_like(b_flat), torch.empty_like(a_rd) if need_da else a_rd.new_empty(0)
    weight_gradients(dys, x_td, h_tp, dh_tp, b_mask, db_flat, da_rd, Group(tuple(outs), tuple(ranks), tuple(scales)))
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
        tuple(descriptor(dy, tiles.t, tiles.k) for dy in dys),
        descriptor(w_nd, tiles.k, tiles.n),
        descriptor(dh_tp if layout.columns else dx_td, tiles.t, RANK_STEP),
        a_rd,
        descriptor(dx_td, tiles.t, tiles.n),
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
    group: Group,
    *,
    ordered: bool = True,
    accumulate: bool = False,
    squares_c: Tensor | None = None,
    scores_4b: Tensor | None = None,
) -> None:
    """Fills db_flat and da_rd (empty: not wanted): all products of the group in one launch, then the sum over splits.

    ordered: False = splits meet in atomics. accumulate: adds to what db_flat and da_rd hold. squares_c: float32 [components], the rows of
    every dB_mᵀ, then of dA; filled with Σ g² of each. scores_4b: float32 [4, numel of B], added to.
    """
    tiles, (t, d), device = tiles_for(x_td), x_td.shape, x_td.device
    size = db_flat.numel() + da_rd.numel()
    if size == 0:
        return
    jobs = weight_jobs(*(group.outs, group.ranks, group.scales), d if da_rd.numel() else 0, tiles.r, tiles.n, device)
    most = triton.cdiv(programs_of_two_waves(device), len(jobs.table)) if t else 0
    splits = min(most, triton.cdiv(t, tiles.k))
    mask = None if b_mask is None else b_mask.view(torch.uint8)
    partial = torch.empty(splits, size, dtype=torch.float32, device=device) if ordered else torch.zeros(1, size, device=device)
    launch(
        weight_gradient_kernel,
        (len(jobs.table), splits),
        (h_tp, dh_tp),
        (x_td, *dys),
        partial,
        partial if mask is None else mask,  # without a mask it is not read
        jobs.table,
        jobs.factors,
        t,
        h_tp.shape[1],
        size,
        triton.cdiv(triton.cdiv(t, max(splits, 1)), tiles.k) * tiles.k,
        HAS_MASK=mask is not None,
        ATOMIC=not ordered,
        BLOCK_R=tiles.r,
        BLOCK_N=tiles.n,
        BLOCK_T=tiles.k,
        PRECISION=tiles.precision,
        num_warps=4,
        num_stages=tiles.stages,
    )
    _finish(partial, mask, db_flat, da_rd, jobs, accumulate, squares_c, scores_4b)


def _finish(
    partial: Tensor,
    mask: Tensor | None,
    db_flat: Tensor,
    da_rd: Tensor,
    jobs: WeightJobs,
    accumulate: bool,
    squares_c: Tensor | None,
    scores_4b: Tensor | None,
) -> None:
    """See `finish_gradients_kernel`."""
    chunks = triton.cdiv(jobs.widest, FINISH_BLOCK)
    squares = None if squares_c is None else torch.empty(len(jobs.components), chunks, dtype=torch.float32, device=partial.device)
    launch(
        finish_gradients_kernel,
        (len(jobs.components), chunks),
        partial,
        partial if mask is None else mask,
        db_flat,
        da_rd if da_rd.numel() else db_flat,  # nothing of dA is written then
        jobs.components,
        partial if squares is None else squares,
        partial if scores_4b is None else scores_4b,
        db_flat.numel(),
        partial.shape[1],
        partial.shape[0],
        HAS_MASK=mask is not None,
        ACCUMULATE=accumulate,
        WITH_SQUARES=squares is not None,
        WITH_SCORES=scores_4b is not None,
        BLOCK=FINISH_BLOCK,
        num_warps=4,
    )
    if squares is not None:
        torch.sum(squares, dim=1, out=squares_c)
