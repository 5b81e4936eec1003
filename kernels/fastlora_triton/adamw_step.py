"""adamw_step and gradient_norms on a GPU: one launch over the trained entries of all matrices; formulas in fastlora/ops/adamw_step.py.

Entries are walked in chunks of at most BLOCK that never cross a matrix, so that gaps of the buffer are not touched and a norm has chunks of
its own. With an index only k entries are read and written: 4 reads, 3 writes and the index an entry, 32 bytes (28 without): 3.35 TB/s of an
H100 take 84 µs for 10 M entries.

sm_90: adamw_kernel 64 registers, 8 CTAs an SM (106 and 4 with an index); every byte moves once. Not run on a GPU: compiled for sm_80, sm_90
and sm_100 and run on a CPU (tests/ops/test_triton_adamw_step.py).
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora_triton.launch import launch

BLOCK = 1024
"""Entries of a program: 4 warps, two 16-byte loads of every buffer a thread."""


@triton.jit
def _update(
    at, entry, there, param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, clip, lr, beta1, beta2, eps, weight_decay, correction1, root2
):
    """One step of the entries that are `there` (None: all): param and grad `at`, moments `entry`. What is masked is computed with and
    dropped."""
    g = tl.load(grad_ptr + at, mask=there) * clip
    theta = tl.load(param_ptr + at, mask=there)
    m = tl.load(exp_avg_ptr + entry, mask=there)
    v = tl.load(exp_avg_sq_ptr + entry, mask=there)
    m += (1.0 - beta1) * (g - m)
    v = beta2 * v + (1.0 - beta2) * g * g
    theta *= 1.0 - lr * weight_decay
    theta -= lr / correction1 * m / (tl.sqrt_rn(v) / root2 + eps)
    tl.store(param_ptr + at, theta, mask=there)
    tl.store(exp_avg_ptr + entry, m, mask=there)
    tl.store(exp_avg_sq_ptr + entry, v, mask=there)


@triton.jit
def adamw_kernel(
    param_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    clip_ptr,
    index_ptr,
    chunks_ptr,  # int64 [·, 3]: first entry, entries, position of the first entry in the buffer
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    correction1,  # 1 − β1^t
    root_of_correction2,  # √(1 − β2^t)
    INDEXED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = chunks_ptr + 3 * tl.program_id(0)
    first, count, position = tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 2)
    clip = tl.load(clip_ptr)
    i = tl.arange(0, BLOCK)
    there = i < count
    # fmt: off
    if INDEXED:
        at = tl.load(index_ptr + first + i, mask=there, other=0).to(tl.int64)
        _update(at, first + i, there, param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, clip,
                lr, beta1, beta2, eps, weight_decay, correction1, root_of_correction2)
    elif count == BLOCK:  # all but a matrix's ends: without a mask, and aligned, loads are 16 bytes wide
        at = tl.multiple_of(position, BLOCK) + i
        _update(at, at, None, param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, clip,
                lr, beta1, beta2, eps, weight_decay, correction1, root_of_correction2)
    else:
        _update(position + i, position + i, there, param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, clip,
                lr, beta1, beta2, eps, weight_decay, correction1, root_of_correction2)
    # fmt: on


@triton.jit
def chunk_squares_kernel(grad_ptr, index_ptr, chunks_ptr, squares_ptr, INDEXED: tl.constexpr, BLOCK: tl.constexpr):
    """squares [chunks] = Σ g² of each chunk."""
    chunk = chunks_ptr + 3 * tl.program_id(0)
    first, count, position = tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 2)
    i = tl.arange(0, BLOCK)
    there = i < count
    if INDEXED:
        at = tl.load(index_ptr + first + i, mask=there, other=0).to(tl.int64)
        g = tl.load(grad_ptr + at, mask=there, other=0.0)
    elif count == BLOCK:
        g = tl.load(grad_ptr + tl.multiple_of(position, BLOCK) + i)
    else:
        g = tl.load(grad_ptr + position + i, mask=there, other=0.0)
    tl.store(squares_ptr + tl.program_id(0), tl.sum(g * g, axis=0))


@triton.jit
def norms_kernel(squares_ptr, first_chunk_ptr, norms_ptr, BLOCK: tl.constexpr):
    """norms [M] = √Σ over a matrix's chunks, in a fixed order."""
    m = tl.program_id(0)
    first, end = tl.load(first_chunk_ptr + m), tl.load(first_chunk_ptr + m + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for c in range(first, end, BLOCK):
        i = c + tl.arange(0, BLOCK)
        total += tl.load(squares_ptr + i, mask=i < end, other=0.0)
    tl.store(norms_ptr + m, tl.sqrt_rn(tl.sum(total, axis=0)))


def adamw_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    clip_coef: Tensor,
    table_m6: Tensor,
    index_k: Tensor | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """In place; arguments as the op's. float32."""
    chunks, _ = _chunks(table_m6, param.device)
    launch(
        adamw_kernel,
        (len(chunks),),
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        clip_coef,
        chunks if index_k is None else index_k,  # without an index it is not read
        chunks,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        1.0 - beta1**step,
        (1.0 - beta2**step) ** 0.5,
        INDEXED=index_k is not None,
        BLOCK=BLOCK,
        num_warps=4,
    )


def gradient_norms(grad: Tensor, table_m6: Tensor, index_k: Tensor | None) -> Tensor:
    """norms_m [M] of the matrices of the table, float32; the same bits at every run."""
    chunks, first_chunk = _chunks(table_m6, grad.device)
    squares = torch.empty(len(chunks), dtype=torch.float32, device=grad.device)
    norms_m = torch.empty(len(table_m6), dtype=torch.float32, device=grad.device)
    indexed = index_k is not None
    launch(
        chunk_squares_kernel,
        (len(chunks),),
        grad,
        index_k if indexed else chunks,
        chunks,
        squares,
        INDEXED=indexed,
        BLOCK=BLOCK,
        num_warps=4,
    )
    launch(norms_kernel, (len(norms_m),), squares, first_chunk, norms_m, BLOCK=256, num_warps=4)
    return norms_m


def _chunks(table_m6: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    return _chunks_of(tuple(map(tuple, table_m6.tolist())), device)


@lru_cache(maxsize=8)
def _chunks_of(rows: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """(int64 [·, 3], int64 [M + 1]: first chunk of every matrix, and their number)."""
    chunks, first_chunk = [], [0]
    for offset, _, _, _, begin, end in rows:
        shift, entry = offset - begin, begin
        while entry < end:
            # Full chunks start at multiples of BLOCK in the buffer, wherever the matrix does.
            count = min(BLOCK - (entry + shift) % BLOCK, end - entry)
            chunks.append((entry, count, entry + shift))
            entry += count
        first_chunk.append(len(chunks))
    return (
        torch.tensor(chunks, dtype=torch.int64, device=device).reshape(-1, 3),
        torch.tensor(first_chunk, dtype=torch.int64, device=device),
    )
