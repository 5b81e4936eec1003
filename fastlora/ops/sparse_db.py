"""sparse_db: the gradient of k chosen entries of a group's B, without the rest (a sampled dense-dense product).

    db_k[i] = s_m Σ_t dY_m[t, n_i] H_m[t, r_i]              entry i of index_k is B_m[n_i, r_i]

The B of a group is one flat vector, B_mᵀ [r_m, n_m] after B_{m-1}ᵀ, and `index_k` holds ascending positions in it. `h` is what
lora_linear keeps for its backward pass, x A_mᵀ of every module side by side: [*, Σ r_m], or with every module's ranks rounded up to 16
columns, as its Triton kernels keep it (kernels/fastlora_triton/group_layout.py). Sums are float32.

Study S3 (arXiv 2605.12207) scores the entries of B by what their gradients do over many batches. `sums_4k` accumulates it:

    sums_4k += (g, sign g, |g|, g²)                          g = db_k, of this call

FLOPs: 2 t k. Bytes: dY and H once, k indices, k sums; 32 k for the accumulators. lora_linear's dense dB computes t Σ n_m r_m products
on tensor cores for the same reading of dY: this op is for k ≪ Σ n_m r_m (up to some 10 %).

Implementations: `reference` gathers two columns for every entry; `torch` computes all of dB and picks (one GEMM a module; on a CPU always
faster); `cuda` (csrc/cuda/sparse_db.cuh) computes the k entries alone and reads dY once. It is a gradient and has none of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fastlora.ops.registry import Cost, Dispatch, OpSpec, call, cuda_refuses
from fastlora_triton.group_layout import RANK_STEP, rank_columns

MOST_MODULES = 8
"""kMaxModules of the CUDA kernel, whose description of the group travels with the launch. Decoders have groups of three."""


def sparse_db(
    dys: Sequence[Tensor], h: Tensor, index_k: Tensor, ranks: Sequence[int], scales: Sequence[float], sums_4k: Tensor | None = None
) -> Tensor:
    """db_k [k] in float32 (float64 for float64).

    dys: dY_m [*, n_m] of every module; h: [*, Σ r] or rounded up, both of one dtype. index_k: int32 or int64 [k], ascending; a position
    outside of the group's B is not looked for on a GPU, where its entry stays undefined. sums_4k: [4, k] in the dtype of the result, added
    to in place. Not differentiable. Raises ValueError when the shapes do not belong together.
    """
    _check(dys, h, index_k, ranks, scales, sums_4k)
    return call(sparse_db_op, _dispatch, list(dys), h, index_k, list(ranks), list(scales), sums_4k)


def _check(dys: Sequence[Tensor], h: Tensor, index_k: Tensor, ranks: Sequence[int], scales: Sequence[float], sums: Tensor | None) -> None:
    if not len(dys) == len(ranks) == len(scales):
        raise ValueError(f"sparse_db: {len(dys)} gradients, {len(ranks)} ranks and {len(scales)} scales")
    if h.shape[-1] not in (sum(ranks), rank_columns(ranks)):
        raise ValueError(
            f"sparse_db: h has {h.shape[-1]} columns; ranks {list(ranks)} need {sum(ranks)}, or {rank_columns(ranks)} rounded up"
        )
    for m, dy in enumerate(dys):
        if dy.shape[:-1] != h.shape[:-1] or dy.dtype != h.dtype:
            raise ValueError(f"sparse_db: dY of module {m} is {list(dy.shape)} {dy.dtype}, h is {list(h.shape)} {h.dtype}")
    if index_k.dtype not in (torch.int32, torch.int64) or index_k.dim() != 1:
        raise ValueError(f"sparse_db: index_k is {index_k.dtype} {list(index_k.shape)}, it must be int32 or int64 [k]")
    if sums is not None and (sums.shape != (4, len(index_k)) or sums.dtype != _sum_dtype(h)):
        raise ValueError(f"sparse_db: sums_4k is {list(sums.shape)} {sums.dtype}, it must be [4, {len(index_k)}] {_sum_dtype(h)}")


def _sum_dtype(h: Tensor) -> torch.dtype:
    return torch.promote_types(h.dtype, torch.float32)


def _modules(dys: Sequence[Tensor], h: Tensor, index_k: Tensor, ranks: Sequence[int]) -> Iterator[tuple[Tensor, Tensor, slice, Tensor]]:
    """(dY_m [t, n], H_m [t, r], its range in index_k, positions in B_mᵀ) of every module, wide enough to sum in."""
    wide = _sum_dtype(h)
    h_t = h.flatten(0, -2).to(wide)
    padded = h.shape[-1] != sum(ranks)
    column = 0
    sizes = [dy.shape[-1] * rank for dy, rank in zip(dys, ranks, strict=True)]
    starts = [0, *accumulate(sizes)]
    edges = torch.searchsorted(index_k.contiguous(), torch.tensor(starts, dtype=index_k.dtype, device=index_k.device)).tolist()
    for m, (dy, rank) in enumerate(zip(dys, ranks, strict=True)):
        where = slice(edges[m], edges[m + 1])
        yield dy.flatten(0, -2).to(wide), h_t[:, column : column + rank], where, index_k[where].long() - starts[m]
        column += -(-rank // RANK_STEP) * RANK_STEP if padded else rank


def _accumulate(db_k: Tensor, sums_4k: Tensor | None) -> Tensor:
    """db_k, after its part in the sums."""
    if sums_4k is not None:
        sums_4k += torch.stack([db_k, db_k.sign(), db_k.abs(), db_k.square()])
    return db_k


def _reference(
    dys: Sequence[Tensor], h: Tensor, index_k: Tensor, ranks: Sequence[int], scales: Sequence[float], sums_4k: Tensor | None
) -> Tensor:
    """Two gathered columns an entry: 2 t k numbers in memory."""
    db_k = h.new_empty(len(index_k), dtype=_sum_dtype(h))
    for (dy_tn, h_tr, where, positions), scale in zip(_modules(dys, h, index_k, ranks), scales, strict=True):
        n = dy_tn.shape[1]
        db_k[where] = scale * (dy_tn[:, positions % n] * h_tr[:, positions // n]).sum(0)
    return _accumulate(db_k, sums_4k)


_dispatch = Dispatch("sparse_db", _reference)


@_dispatch.add("torch")
def _dense(
    dys: Sequence[Tensor], h: Tensor, index_k: Tensor, ranks: Sequence[int], scales: Sequence[float], sums_4k: Tensor | None
) -> Tensor:
    db_k = h.new_empty(len(index_k), dtype=_sum_dtype(h))
    for (dy_tn, h_tr, where, positions), scale in zip(_modules(dys, h, index_k, ranks), scales, strict=True):
        db_k[where] = scale * (h_tr.t() @ dy_tn).reshape(-1)[positions]
    return _accumulate(db_k, sums_4k)


def _cuda_refuses(device: torch.device, *args: Any) -> str | None:
    if (reason := cuda_refuses(device, *args)) or not args:
        return reason
    return f"it takes groups of at most {MOST_MODULES} modules, not {len(args[0])}" if len(args[0]) > MOST_MODULES else None


@_dispatch.add("cuda", _cuda_refuses)
def _cuda(
    dys: Sequence[Tensor], h: Tensor, index_k: Tensor, ranks: Sequence[int], scales: Sequence[float], sums_4k: Tensor | None
) -> Tensor:
    dys_tn = [dy.flatten(0, -2).contiguous() for dy in dys]
    h_t = h.flatten(0, -2).contiguous()
    return torch.ops.fastlora_cuda.sparse_db(dys_tn, h_t, index_k.contiguous(), ranks, scales, sums_4k)


sparse_db_op = _dispatch.torch_op(mutates_args=("sums_4k",))


@sparse_db_op.register_fake
def _(dys: Sequence[Tensor], h: Tensor, index_k: Tensor, ranks: Sequence[int], scales: Sequence[float], sums_4k: Tensor | None) -> Tensor:
    return h.new_empty(len(index_k), dtype=_sum_dtype(h))


def sample_inputs(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Any, ...]]:
    """No tokens, no entries, one entry, some and all; uneven ranks in both layouts of h, with and without the sums."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    outs, ranks, scales = [5, 16, 24], [3, 0, 17], [0.5, 1.0, 2.0]
    total = sum(n * r for n, r in zip(outs, ranks, strict=True))
    everything = torch.arange(total)
    for t, index, integers, columns in (
        (0, everything[::5], torch.int32, sum(ranks)),
        (1, everything[:0], torch.int64, sum(ranks)),
        (63, everything[total - 1 :], torch.int32, sum(ranks)),
        (63, everything[everything % 7 > 4], torch.int64, rank_columns(ranks)),
        (300, everything, torch.int32, sum(ranks)),
    ):
        dys, h, index_k = [normal(t, n) for n in outs], normal(t, columns), index.to(device, integers)
        sums = None if t == 1 else normal(4, len(index)).to(_sum_dtype(h))
        yield dys, h, index_k, ranks, scales, sums


def cost(dys: Sequence[Tensor], h: Tensor, index_k: Tensor, ranks: Sequence[int], scales: Sequence[float], sums_4k: Tensor | None) -> Cost:
    """A product and a sum for every token and entry; dY and H read once, the sums read and written."""
    t, k = h.shape[:-1].numel(), len(index_k)
    read = sum(x.numel() * x.element_size() for x in (*dys, h, index_k))
    sums = 0 if sums_4k is None else 2 * sums_4k.numel() * sums_4k.element_size()
    return Cost(flops=2 * t * k, bytes=read + k * _sum_dtype(h).itemsize + sums)


SPEC = OpSpec("sparse_db", sparse_db_op, sample_inputs, cost)
