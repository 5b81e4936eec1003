"""The CUDA kernels on the CPU against fp64: odd sizes, uneven ranks, any order of blocks and threads, buffers between guards."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlora_triton.export_layout import export_tiles
from fastlora_triton.group_layout import RANK_STEP
from tests.cuda_cpu.build import library, needs_gxx
from tests.cuda_cpu.memory import Memory, pointer
from tests.ops.implementations import relative_error
from tests.ops.test_adamw_step import adamw_fp64
from tests.tolerances import FP32_ADAMW, FP32_ONE_ROUNDING, SAME_IN_FLOAT32

pytestmark = needs_gxx
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The harness's numbers."""
OUTS, RANKS = (40, 16, 136, 9, 8), (3, 0, 17, 1, 70)
"""Two strips, two chunks of ranks, a width that is no multiple of 8, a module without ranks."""
SIZE_OF_B = sum(n * r for n, r in zip(OUTS, RANKS, strict=True))
DENSITIES = {"none": 0, "one": SIZE_OF_B, "few": 97, "many": 3, "all": 1}
"""Every so many-th entry is chosen."""


def launched(harness: Any, status: int) -> int:
    """The status, unless the emulation found something."""
    assert status >= 0, harness.emulation_error().decode()
    return status


def sparse_db(
    dys: Sequence[Tensor], h: Tensor, index_k: Tensor, ranks: Sequence[int], scales: Sequence[float], sums: Tensor | None, offset: int = 0
) -> tuple[Tensor, Tensor | None, int]:
    """(db_k, the sums after it, splits)."""
    memory, harness, k = Memory(), library("sparse_db"), len(index_k)
    placed = [memory.place(dy, offset) for dy in dys]
    h, index_k = memory.place(h, offset), memory.place(index_k)
    sums = None if sums is None else memory.place(sums)
    db, partial, arrivals = memory.output(k), memory.output(8 * k), memory.place(torch.zeros(16, dtype=torch.int32))
    count = len(dys)
    splits = harness.sparse_db(
        DTYPES[h.dtype],
        count,
        (ctypes.c_void_p * count)(*(dy.data_ptr() for dy in placed)),
        (ctypes.c_int * count)(*(dy.shape[1] for dy in dys)),
        (ctypes.c_int * count)(*ranks),
        (ctypes.c_float * count)(*scales),
        pointer(h),
        ctypes.c_int64(h.shape[1]),
        int(h.shape[1] != sum(ranks)),
        ctypes.c_int64(h.shape[0]),
        pointer(index_k),
        int(index_k.dtype == torch.int64),
        k,
        pointer(partial),
        ctypes.c_int64(partial.numel()),
        pointer(arrivals),
        pointer(db),
        pointer(sums),
    )
    memory.assert_guards_hold()
    return db, sums, launched(harness, splits)


def problem(t: int, density: str, dtype: torch.dtype, padded: bool) -> dict[str, Any]:
    """Arguments of sparse_db; columns of h that belong to no rank are NaN."""
    step = DENSITIES[density]
    index = torch.arange(SIZE_OF_B)[step - 1 :: step] if step else torch.arange(0)
    h = torch.randn(t, sum(-(-r // RANK_STEP) * RANK_STEP for r in RANKS) if padded else sum(RANKS)).to(dtype)
    column = 0
    for r in RANKS if padded else ():
        h[:, column + r : (column := column + -(-r // RANK_STEP) * RANK_STEP)] = float("nan")
    return {
        "dys": [torch.randn(t, n).to(dtype) for n in OUTS],
        "h": h,
        "index_k": index.to(torch.int64 if padded else torch.int32),
        "ranks": RANKS,
        "scales": [0.5 + m for m in range(len(OUTS))],
    }


def dense_db(p: dict[str, Any]) -> Tensor:
    """All of dB_m ᵀ in fp64, one after another."""
    h = p["h"].double()
    h = h[:, ~h.isnan().any(0)] if len(h) else h.new_zeros(0, sum(RANKS))
    return torch.cat([(s * h_m.T @ dy.double()).flatten() for s, h_m, dy in zip(p["scales"], h.split(RANKS, 1), p["dys"], strict=True)])


@pytest.mark.parametrize("padded", [False, True], ids=["ranks as they are", "ranks rounded up"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("t", [0, 1, 63, 1000])
def test_sparse_db(t: int, density: str, dtype: torch.dtype, padded: bool) -> None:
    p = problem(t, density, dtype, padded)
    truth = dense_db(p)[p["index_k"].long()]
    before = torch.randn(4, len(truth)) if padded else None
    db, sums, splits = sparse_db(**p, sums=before)
    assert splits == max(1, -(-t // 256))
    if t == 0 or not len(truth):
        assert torch.equal(db, torch.zeros(len(truth)))
    else:
        size = max(float(truth.norm()), (t * len(truth)) ** 0.5)  # one sum alone may cancel
        assert float((db - truth).norm()) < SAME_IN_FLOAT32 * size
    if before is not None and sums is not None:
        expected = before + torch.stack([db, db.sign(), db.abs(), db.square()])
        torch.testing.assert_close(sums, expected, rtol=FP32_ONE_ROUNDING * 2, atol=FP32_ONE_ROUNDING)


def test_sparse_db_has_the_same_bits_in_any_order() -> None:
    p, harness, results = problem(1000, "many", torch.bfloat16, True), library("sparse_db"), []
    for workers, seed in ((1, 0), (2, 3), (3, 4)):
        harness.emulation_settings(workers, seed)
        results.append(sparse_db(**p, sums=None)[0])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_sparse_db_of_rows_that_lie_on_no_16_bytes() -> None:
    p = problem(63, "many", torch.bfloat16, True)
    assert relative_error(sparse_db(**p, sums=None, offset=2)[0], dense_db(p)[p["index_k"]]) < SAME_IN_FLOAT32


INDICES = {
    "one": torch.tensor([41]),
    "all": torch.arange(5000),
    "runs": torch.arange(5000)[torch.arange(5000) % 40 < 13],
    "alone": torch.arange(5000)[::3],
    "odd start": torch.arange(5, 4999),
}


@pytest.mark.parametrize("offset", [0, 4])
@pytest.mark.parametrize("index", INDICES)
def test_adamw_step(index: str, offset: int) -> None:
    """What the index leaves out keeps its bits; it is NaN here."""
    memory, harness, index_k = Memory(), library("adamw_step"), INDICES[index]
    trains = torch.zeros(5000, dtype=torch.bool).index_fill(0, index_k, True)
    param, grad = (torch.randn(5000).masked_fill(~trains, float("nan")) for _ in range(2))
    m, v = torch.randn(len(index_k)), torch.rand(len(index_k))
    settings = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    expected = adamw_fp64(param[index_k], grad[index_k], m, v, step=3, clip=0.25, settings=settings)
    placed = [memory.place(x, offset) for x in (param, grad, m, v)]
    clip, index_32 = memory.place(torch.tensor([0.25])), memory.place(index_k.int(), offset)
    numbers = [ctypes.c_double(x) for x in (0.01, 0.8, 0.95, 1e-6, 0.1)]
    status = harness.adamw_step(*map(pointer, (*placed, clip, index_32)), ctypes.c_int64(len(index_k)), ctypes.c_int64(3), *numbers)
    launched(harness, status)
    memory.assert_guards_hold()
    for ours, truth in zip((placed[0][index_k], placed[2], placed[3]), expected, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=FP32_ADAMW, atol=FP32_ADAMW)
    assert torch.equal(placed[0][~trains].view(torch.int32), param[~trains].view(torch.int32))
    assert torch.equal(placed[1].view(torch.int32), grad.view(torch.int32))


@pytest.mark.parametrize("offset", [0, 4])
def test_gradient_norms(offset: int) -> None:
    """Matrices of no, one, few and many entries, of which the largest takes several slices; from 1e-30 to 1e30."""
    sizes = [0, 1, 40_001, 3, 0, 1024]
    ends = torch.tensor(sizes).cumsum(0)
    ranges = torch.stack([ends - torch.tensor(sizes), ends], 1)
    index_k = torch.arange(3 * sum(sizes))[torch.arange(3 * sum(sizes)) % 12 < 4].int()[: sum(sizes)]
    grad = torch.full((int(index_k[-1]) + 1,), float("nan"))
    grad[index_k.long()] = torch.randn(sum(sizes)) * 10 ** torch.empty(sum(sizes)).uniform_(-6, 6)
    grad[index_k[1].long()] = 1e30
    truth = torch.stack([torch.linalg.vector_norm(grad[index_k[a:b].long()].double()) for a, b in ranges.tolist()])
    results = []
    for seed in (0, 3):
        memory, harness = Memory(), library("adamw_step")
        harness.emulation_settings(2, seed)
        grad_g, index_g, ranges_g = memory.place(grad, offset), memory.place(index_k, offset), memory.place(ranges)
        partial, arrivals = memory.output(64, dtype=torch.float64), memory.place(torch.zeros(len(sizes), dtype=torch.int32))
        norms = memory.output(len(sizes))
        slices = harness.gradient_norms(
            pointer(grad_g), pointer(index_g), pointer(ranges_g), len(sizes), ctypes.c_int64(max(sizes)), pointer(partial),
            ctypes.c_int64(64), pointer(arrivals), pointer(norms),
        )  # fmt: skip
        assert launched(harness, slices) == 3
        memory.assert_guards_hold()
        torch.testing.assert_close(norms.double(), truth, rtol=FP32_ONE_ROUNDING, atol=0)
        results.append(norms)
    assert torch.equal(*results)


ADAPTERS = {
    "no module": [],
    "rank 0": [(0, 16, 8)],
    "aligned": [(8, 256, 128), (32, 64, 264)],
    "uneven": [(3, 5, 7), (0, 8, 9), (1, 16, 1), (17, 33, 130), (64, 8, 24)],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_rank", [None, 64, 65])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_export_adapter_has_torchs_bits(adapter: str, out_rank: int | None, dtype: torch.dtype) -> None:
    modules, memory, harness = ADAPTERS[adapter], Memory(), library("export_adapter")
    ranks, ins, outs = ([m[i] for m in modules] for i in range(3))
    gap = 0 if adapter == "aligned" else 3
    a_offsets, b_offsets, end = [], [], gap
    for r, d, n in modules:
        a_offsets.append(end)
        b_offsets.append(end + r * d + gap)
        end += r * (d + n) + 2 * gap
    flat = memory.place(torch.randn(end))
    out_ranks = ranks if out_rank is None else [out_rank] * len(ranks)
    scales = [0.3 + r for r in ranks]
    tiles = export_tiles(*map(tuple, (a_offsets, b_offsets, ranks, ins, outs, scales, out_ranks)), torch.device("cpu"))
    out_a, out_b = (memory.output(sum(r * w for r, w in zip(out_ranks, widths, strict=True)), dtype=dtype) for widths in (ins, outs))
    table, factors = memory.place(tiles.table), memory.place(tiles.scales)
    status = harness.export_adapter(
        DTYPES[dtype], pointer(flat), pointer(table), pointer(factors), len(table), pointer(out_a), pointer(out_b)
    )
    launched(harness, status)
    memory.assert_guards_hold()
    expected_a, expected_b = [], []
    for a, b, r, d, n, scale, padded in zip(a_offsets, b_offsets, ranks, ins, outs, scales, out_ranks, strict=True):
        expected_a += [*(flat[a : a + r * d] + 0).tolist(), *[0.0] * ((padded - r) * d)]
        matrix = torch.zeros(n, padded)
        matrix[:, :r] = flat[b : b + r * n].view(r, n).T * torch.tensor(scale)
        expected_b += matrix.flatten().tolist()
    assert torch.equal(out_a, torch.tensor(expected_a).to(dtype)) and torch.equal(out_b, torch.tensor(expected_b).to(dtype))
