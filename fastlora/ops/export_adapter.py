"""export_adapter: the packed adapter in the layout of a sampler, with the scale folded into B.

    out_a   for every module A_m [r', d_m], rows from r_m on 0            out_b   s_m B_m [n_m, r'], columns from r_m on 0

one module after another, flat, in the wanted dtype. In the packed buffer A is [r_m, d_m] and B lies transposed, B_mᵀ [r_m, n_m]. r' is one
number for all modules (vLLM's max_lora_rank, what its LoRA slots are padded to) or each module's own rank. With s_m inside B a sampler
that applies one α/r to everything, or forgets a rank_pattern, is right with r = α: vLLM up to 0.31 did both silently. The product is
rounded to float32, then to the dtype: every implementation has the same bits.

No FLOPs but one product an entry of B. Bytes: 4 Σ r_m (d_m + n_m) read, Σ r' (d_m + n_m) elements written; the 36.9 M parameters of
Qwen2.5-1.5B at r 32 in bfloat16: 221 MB.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora.ops.registry import Cost, Dispatch, OpSpec, call, cuda_refuses, triton_refuses
from fastlora_triton.export_layout import ExportTiles, export_tiles


def export_adapter(
    flat: Tensor,
    a_offsets: Sequence[int],
    b_offsets: Sequence[int],
    ranks: Sequence[int],
    ins: Sequence[int],
    outs: Sequence[int],
    scales: Sequence[float],
    out_rank: int | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(out_a [Σ r' d_m], out_b [Σ n_m r']), both flat and of `dtype`.

    flat: the packed buffer [N] (lora.packed), float32; the offsets are a module's first element of A and of Bᵀ in it; ins, outs: d_m, n_m.
    out_rank: r' of all modules, or None for each its own. Raises ValueError when a module does not fit into out_rank or the buffer.
    """
    lists = [list(x) for x in (a_offsets, b_offsets, ranks, ins, outs)]
    for m, (a, b, r, d, n) in enumerate(zip(*lists, strict=True)):
        if out_rank is not None and r > out_rank:
            raise ValueError(f"export_adapter: module {m} has rank {r}, more than out_rank {out_rank}")
        if r and (min(a, b) < 0 or max(a + r * d, b + r * n) > len(flat)):
            raise ValueError(f"export_adapter: module {m} of rank {r} leads outside of the buffer of {len(flat)} elements")
    return call(export_adapter_op, _dispatch, flat, *lists, list(scales), out_rank, dtype)


def _out_ranks(ranks: Sequence[int], out_rank: int | None) -> list[int]:
    return list(ranks) if out_rank is None else [out_rank] * len(ranks)


def _empty_outputs(flat: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Of the op's arguments."""
    _, _, ranks, ins, outs, _, out_rank, dtype = arguments
    sizes = [sum(r * w for r, w in zip(_out_ranks(ranks, out_rank), widths, strict=True)) for widths in (ins, outs)]
    return flat.new_empty(sizes[0], dtype=dtype), flat.new_empty(sizes[1], dtype=dtype)


def _reference(
    flat: Tensor,
    a_offsets: Sequence[int],
    b_offsets: Sequence[int],
    ranks: Sequence[int],
    ins: Sequence[int],
    outs: Sequence[int],
    scales: Sequence[float],
    out_rank: int | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Module by module."""
    a_parts, b_parts = [flat.new_empty(0, dtype=dtype)], [flat.new_empty(0, dtype=dtype)]
    modules = zip(a_offsets, b_offsets, ranks, ins, outs, scales, _out_ranks(ranks, out_rank), strict=True)
    for a_offset, b_offset, r, d, n, scale, padded in modules:
        a_rd = flat[a_offset:][: r * d].view(r, d)
        b_nr = (flat[b_offset:][: r * n].view(r, n) * scale).t()
        a_parts.append(torch.nn.functional.pad(a_rd.to(dtype), (0, 0, 0, padded - r)).reshape(-1))
        b_parts.append(torch.nn.functional.pad(b_nr.to(dtype), (0, padded - r)).reshape(-1))
    return torch.cat(a_parts), torch.cat(b_parts)


_dispatch = Dispatch("export_adapter", _reference)


def _tiles(flat: Tensor, *arguments: Any) -> ExportTiles:
    """Of the op's arguments."""
    *modules, out_rank, _ = arguments
    return export_tiles(*map(tuple, modules), tuple(_out_ranks(modules[2], out_rank)), flat.device)


@_dispatch.add("triton", triton_refuses)
def _triton(flat: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    from fastlora_triton import export_adapter as kernels

    out_a, out_b = _empty_outputs(flat, *arguments)
    kernels.export_adapter(flat, _tiles(flat, *arguments), out_a, out_b)
    return out_a, out_b


@_dispatch.add("cuda", cuda_refuses)
def _cuda(flat: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    out_a, out_b = _empty_outputs(flat, *arguments)
    tiles = _tiles(flat, *arguments)
    torch.ops.fastlora_cuda.export_adapter(flat, tiles.table, tiles.scales, out_a, out_b)
    return out_a, out_b


export_adapter_op = _dispatch.torch_op()
export_adapter_op.register_fake(_empty_outputs)


def sample_inputs(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Any, ...]]:
    """No module, rank 0 only, uneven ranks with gaps between the matrices; own ranks and padded ones, every dtype of the output."""
    generator = torch.Generator().manual_seed(0)
    modules = [(3, 5, 7), (0, 8, 9), (1, 16, 1), (17, 33, 130)]  # r, d, n
    for chosen, out_rank, out_dtype in (
        ([], 16, torch.bfloat16),
        (modules[1:2], 8, torch.bfloat16),
        (modules, None, torch.float32),
        (modules, 17, torch.float16),
        (modules, 64, torch.bfloat16),
    ):
        places, end = [], 3
        for r, d, n in chosen:
            places.append((end, end + r * d + 2, r, d, n, 0.3 + r))
            end += r * (d + n) + 7
        flat = torch.randn(end, generator=generator, dtype=torch.float64).to(dtype).to(device)
        columns = [list(column) for column in zip(*places, strict=True)] if places else [[] for _ in range(6)]
        yield flat, *columns, out_rank, out_dtype


def cost(flat: Tensor, *arguments: Any) -> Cost:
    """Every entry read once, every place of the output written once."""
    _, _, ranks, ins, outs, _, out_rank, dtype = arguments
    read = sum(r * (d + n) for r, d, n in zip(ranks, ins, outs, strict=True))
    written = sum(r * (d + n) for r, d, n in zip(_out_ranks(ranks, out_rank), ins, outs, strict=True))
    return Cost(flops=sum(r * n for r, n in zip(ranks, outs, strict=True)), bytes=read * flat.element_size() + written * dtype.itemsize)


SPEC = OpSpec("export_adapter", export_adapter_op, sample_inputs, cost)
