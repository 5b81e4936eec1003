"""The model of L2: traces with known answers, a plain LRU beside it, and programs in lock-step."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch

pytest.importorskip("triton", reason="bytes are counted from compiled Triton kernels")

from bench import l2
from bench.l2 import LINE, SECTOR, Cache, Memory, counting
from fastlora_triton.launch import launch
from tests.triton_cpu import kernels

ALL = 0b1111


def moved(lines: list[int], sizes: tuple[int, int, int], sectors: int = ALL, store: bool = False) -> tuple[int, ...]:
    """Bytes for a trace of loads or stores, at each size (in lines)."""
    cache = Cache([LINE * size for size in sizes])
    for line in lines:
        cache.touch(line, sectors, not store, store)
    cache.flush()
    return cache.moved_bytes()


def test_a_ring_that_is_one_line_too_long_misses_always() -> None:
    """Least recently used leaves first: of lines 0 to 4 again and again, four never hold the next one."""
    assert moved(3 * [0, 1, 2, 3, 4], (4, 5, 100)) == (15 * LINE, 5 * LINE, 5 * LINE)


def test_a_line_that_is_used_stays() -> None:
    """0 is used between all others: two lines are enough to keep it."""
    assert moved([0, 1, 0, 2, 0, 3, 0, 4], (1, 2, 100)) == (8 * LINE, 5 * LINE, 5 * LINE)


def test_sectors_are_fetched_one_by_one() -> None:
    assert moved([0, 0, 1], (4, 5, 100), sectors=0b0101) == (4 * SECTOR,) * 3


def test_stores_fetch_nothing_and_are_written_when_they_leave_or_in_the_end() -> None:
    """Twice the same four lines: a cache of 2 writes each twice, one of 4 once."""
    assert moved(2 * [0, 1, 2, 3], (2, 4, 100), store=True) == (8 * LINE, 4 * LINE, 4 * LINE)


def test_what_was_stored_is_not_fetched() -> None:
    cache = Cache([LINE, 2 * LINE, 100 * LINE])
    cache.touch(7, ALL, load=False, store=True)
    cache.touch(7, ALL, load=True, store=False)
    assert cache.moved_bytes() == (0, 0, 0)
    cache.flush()
    assert cache.moved_bytes() == (LINE,) * 3


def test_random_traces_as_in_a_plain_lru() -> None:
    """Long enough for the queue to be made compact several times (65,536 touches)."""
    sizes, generator = (40, 300, 10**6), torch.Generator().manual_seed(0)
    count = 250_000
    lines = (torch.randn(count, generator=generator) * 200).int().abs().tolist()
    sectors = torch.randint(1, 16, (count,), generator=generator).tolist()
    stores = (torch.rand(count, generator=generator) < 0.3).tolist()
    cache = Cache([LINE * size for size in sizes])
    for line, mask, store in zip(lines, sectors, stores, strict=True):
        cache.touch(line, mask, not store, store)
    cache.flush()
    assert cache.moved_bytes() == tuple(SECTOR * plain_lru(lines, sectors, stores, size) for size in sizes)


def plain_lru(lines: list[int], sectors: list[int], stores: list[bool], capacity: int) -> int:
    """Sectors read and written."""
    held: OrderedDict[int, list[int]] = OrderedDict()
    total = 0
    for line, mask, store in zip(lines, sectors, stores, strict=True):
        valid_and_dirty = held.setdefault(line, [0, 0])
        held.move_to_end(line)
        if store:
            valid_and_dirty[1] |= mask
        else:
            total += (mask & ~valid_and_dirty[0]).bit_count()
        valid_and_dirty[0] |= mask
        if len(held) > capacity:
            total += held.popitem(last=False)[1][1].bit_count()
    return total + sum(dirty.bit_count() for _, dirty in held.values())


@pytest.mark.parametrize(("slots", "expected"), [(1, 4 * 512 + 512), (4, 512 + 512)])
def test_programs_at_once_share_what_they_read_together(slots: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four programs read the same 512 bytes in two steps and write 128 each. One after the other with a cache of two lines, each reads
    them anew; all at once, the first fetches them for the others."""
    compiled = l2._compiled
    monkeypatch.setattr(l2, "_compiled", lambda *arguments: (compiled(*arguments)[0], slots))
    table = torch.tensor(4 * [0, 4], dtype=torch.int32)
    memory = Memory(cache=Cache([2 * LINE, 10**6, 10**9]))
    with counting(memory) as launches:
        launch(kernels.through_table_kernel, (4,), table, torch.ones(1), torch.zeros(128), torch.zeros(128), 32, BLOCK=32)
    (traffic,) = launches
    small = 2 * SECTOR if slots == 4 else 4 * 2 * SECTOR  # the table's and the scale's sectors
    assert traffic.l2_bytes == 4 * (512 + 128 + 3 * SECTOR)
    assert traffic.dram_25 == expected + small
    assert traffic.compulsory == 512 + 512 + 2 * SECTOR


def test_the_compulsory_bytes_are_those_of_the_tensors() -> None:
    """A product of [200, 96] and [80, 96], bfloat16: both once, the result once; its FLOPs are those of whole tiles."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    x, w, y = (torch.empty(*shape, dtype=torch.bfloat16) for shape in ((200, 96), (80, 96), (200, 80)))
    descriptors = [TensorDescriptor.from_tensor(t, block) for t, block in ((x, [64, 32]), (w, [64, 32]), (y, [64, 64]))]
    with counting(Memory()) as launches:
        launch(kernels.product_kernel, (4, 2), *descriptors, 96, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, PRECISION="ieee")
    (traffic,) = launches
    assert traffic.compulsory == 2 * (200 * 96 + 80 * 96 + 200 * 80)
    assert traffic.flops == 2 * 256 * 128 * 96
    assert traffic.l2_bytes == 2 * (2 * 200 * 96 + 4 * 80 * 96 + 200 * 80)


def test_a_warm_cache_keeps_what_the_launch_before_left() -> None:
    x, y, z = (torch.zeros(4096) for _ in range(3))
    memory = Memory(warm=True)
    with counting(memory) as launches:
        launch(kernels.double_kernel, (4,), x, y, 4096, BLOCK=1024)
        launch(kernels.double_kernel, (4,), y, z, 4096, BLOCK=1024)
    assert [traffic.dram_50 for traffic in launches] == [16384, 0]
    memory.cache.flush()
    assert memory.cache.moved_bytes() == (3 * 16384,) * 3
