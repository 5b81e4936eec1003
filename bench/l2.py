"""What a launch moves between L2 and the SMs, and between memory and L2: the accesses of the compiled kernel through a model of the cache.

    with counting(Memory()) as launches:
        lora_linear.forward(...)        # nothing is computed; `launches` grows by a Traffic for every launch

L2 to SM: the 32-byte sectors that each load or store of a tile covers, addresses from the TTIR of the sm_90 build (bench/triton_cpu/
trace.py). Memory to L2: programs in launch order, 132 × the CTAs that fit an SM of them at once (bench/cubin.py), one access each a turn;
a slot that ends takes the next program. Their accesses go through a cache of lines of 128 bytes with four sectors, least recently used out
first. H100's 50 MB are two partitions, and a line may stand in both: 25 MB is the cautious number, 50 MB the hopeful one. The third size
has no end: what it moves is compulsory, every byte of a tensor that the launch touches once.

Simplified: the cache is fully associative; a store fetches nothing and its sectors are dirty whole; dirty lines are written when they
leave and at the end of a launch; every launch begins with an empty cache; L1, TMA multicast, page tables and instructions move nothing;
warps of one CTA that ask for the same sector ask once; programs never drift apart. Tensors stand in memory of their own, each on a page.

A model, not run on a GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from bench.cubin import read
from bench.triton_cpu.launch import LaunchError, build, c_values, compiled, extent, grid_sizes, label, named_arguments, tensors_of
from bench.triton_cpu.trace import translate_trace
from fastlora_triton.front_end import compile_for
from fastlora_triton.launch import use_launcher
from fastlora_triton.tiles import SMS as OF_CHIPS

SMS = OF_CHIPS[90]
LINE, SECTOR = 128, 32
MB = 2**20
SIZES = (25 * MB, 50 * MB, 2**62)
"""Bytes of the caches; the largest last. H100: 50 MB (NVIDIA H100 whitepaper)."""
PAGE = 2 * MB


class _Buffers(ctypes.Structure):
    _fields_ = [
        ("count", ctypes.c_int),
        *((name, ctypes.POINTER(ctypes.c_int64)) for name in ("first", "end", "real")),
        ("names", ctypes.POINTER(ctypes.c_char_p)),
    ]


class _Order(ctypes.Structure):
    _fields_ = [("slots", ctypes.c_int), ("programs", ctypes.POINTER(ctypes.c_int64))]


class _Counts(ctypes.Structure):
    _fields_ = [("loads", ctypes.c_int64), ("stores", ctypes.c_int64), ("flops", ctypes.c_double)]


class _Listing(ctypes.Structure):
    _fields_ = [("rows", ctypes.POINTER(ctypes.c_int64)), ("count", ctypes.c_int64)]


@dataclass(frozen=True, slots=True)
class Traffic:
    """One launch; bytes."""

    kernel: str
    programs: int
    slots: int
    """Programs at once."""
    l2_bytes: int
    """Between L2 and the SMs, loads and stores."""
    dram_25: int
    dram_50: int
    compulsory: int
    flops: float
    """Of the products, as executed: tiles that stick out count whole."""


@dataclass(slots=True)
class Memory:
    """Addresses on an imagined GPU. Tensors on the CPU that are never written take no memory here: torch.empty of any size will do."""

    warm: bool = False
    """The cache is kept from launch to launch; `flush` in the end. False: every launch begins and ends with an empty one."""
    order: Callable[[Sequence[int]], Sequence[int]] | None = None
    """From a grid to the order in which its programs start (x + gx y); None: ascending, as a GPU does."""
    next_address: int = PAGE
    places: dict[int, int] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)
    """So that no two tensors of a sequence have one storage."""
    cache: Cache = field(default_factory=lambda: Cache(SIZES))

    def address(self, tensor: Tensor) -> int:
        """Of its first element."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.places:
            self.places[storage.data_ptr()] = self.next_address
            self.next_address += -(-storage.nbytes() // PAGE) * PAGE + PAGE
            self.kept.append(tensor)
        return self.places[storage.data_ptr()] + tensor.data_ptr() - storage.data_ptr()

    def launch(self, kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> Traffic:
        """Counts one launch. Raises LaunchError where it leaves its tensors."""
        ttir, slots = _compiled(kernel, grid, args, options)
        given = named_arguments(kernel, args, options)
        key = (ttir, slots, self.cache.sizes, tuple(grid), tuple(self.order(grid) if self.order else ()), *_identity(given))
        if self.warm or key not in _COUNTED:
            counted = self._launch(ttir, slots, grid, given)
            if self.warm:
                return counted
            _COUNTED[key] = counted
        return _COUNTED[key]

    def _launch(self, ttir: str, slots: int, grid: Sequence[int], given: dict[str, Any]) -> Traffic:
        translation, library = build(ttir, translate_trace)
        counts, programs, before = _Counts(), prod(grid), self.cache.moved_bytes()
        order = None if self.order is None else (ctypes.c_int64 * programs)(*self.order(grid))
        message = library.launch(
            self.cache.pointer,
            ctypes.byref(self._buffers(given)),
            _Order(slots, order),
            ctypes.byref(counts),
            *grid_sizes(grid),
            *c_values(translation, given, self.address),
        )
        if message:
            raise LaunchError(f"{translation.name}: {message.decode()}")
        if not self.warm:
            self.cache.flush()
        dram_25, dram_50, compulsory = (now - then for now, then in zip(self.cache.moved_bytes(), before, strict=True))
        l2_bytes = SECTOR * (counts.loads + counts.stores)
        return Traffic(translation.name, programs, slots, l2_bytes, dram_25, dram_50, compulsory, counts.flops)

    def accesses(self, kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> list[tuple[int, ...]]:
        """(program, 1 load | 2 store, first byte, stride, rows, bytes of a row) of every access, program by program."""
        ttir, _ = _compiled(kernel, grid, args, options)
        translation, library = build(ttir, translate_trace)
        library.list_accesses.restype = ctypes.c_char_p
        given, listing = named_arguments(kernel, args, options), _Listing()
        message = library.list_accesses(
            ctypes.byref(self._buffers(given)), ctypes.byref(listing), *grid_sizes(grid), *c_values(translation, given, self.address)
        )
        if message:
            raise LaunchError(f"{translation.name}: {message.decode()}")
        return [tuple(listing.rows[6 * row : 6 * row + 6]) for row in range(listing.count)]

    def _buffers(self, given: dict[str, Any]) -> _Buffers:
        buffers = {name: tensor for name, tensor in tensors_of(given).items() if tensor.numel()}
        first = [self.address(tensor) for tensor in buffers.values()]
        end = [a + extent(tensor) for a, tensor in zip(first, buffers.values(), strict=True)]
        real = [tensor.data_ptr() for tensor in buffers.values()]
        numbers = ctypes.c_int64 * len(buffers)
        names = (ctypes.c_char_p * len(buffers))(*(label(name, tensor) for name, tensor in buffers.items()))
        return _Buffers(len(buffers), numbers(*first), numbers(*end), numbers(*real), names)


class Cache:
    """One cache of each of three sizes (bytes, ascending), all empty, through which the same accesses go."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.library, self.sizes = _cache_library(), tuple(sizes)
        self.pointer = ctypes.c_void_p(self.library.cache_new((ctypes.c_int64 * len(SIZES))(*(size // LINE for size in sizes))))

    def touch(self, line: int, sectors: int, load: bool, store: bool) -> None:
        """One access to sectors (a bit for each) of a line."""
        self.library.cache_touch(self.pointer, ctypes.c_int64(line), sectors, load + 2 * store)

    def moved_bytes(self) -> tuple[int, ...]:
        """Read and written so far, at each size."""
        fills, write_backs = (ctypes.c_int64 * len(SIZES))(), (ctypes.c_int64 * len(SIZES))()
        self.library.cache_counts(self.pointer, fills, write_backs)
        return tuple(SECTOR * (f + w) for f, w in zip(fills, write_backs, strict=True))

    def flush(self) -> None:
        """Writes everything dirty; nothing stays."""
        self.library.cache_flush(self.pointer)

    def __del__(self) -> None:
        self.library.cache_delete(self.pointer)


@cache
def _cache_library() -> ctypes.CDLL:
    library = compiled("cache", '#include "lockstep.h"\n')
    library.cache_new.restype = ctypes.c_void_p
    return library


def _compiled(kernel: Any, grid: Sequence[int], args: Sequence[Any], options: dict[str, Any]) -> tuple[str, int]:
    """(TTIR, programs at once) of the sm_90 build."""
    built = compile_for(90, kernel, grid, *args, **options)
    return built.asm["ttir"], SMS * _ctas_on_an_sm(built.hash, built)


_COUNTED: dict[tuple[Any, ...], Traffic] = {}
"""From an empty cache, equal launches move equally: a layer's base product on every side, the slabs of a head."""


def _identity(given: dict[str, Any]) -> list[Any]:
    """What tells two launches of one kernel apart, wherever their tensors stand: shapes, which share a storage, numbers, tables."""
    storages: dict[int, int] = {}
    found: list[Any] = [value if isinstance(value, int | float) else None for value in given.values()]
    for name, tensor in tensors_of(given).items():
        storage = tensor.untyped_storage()
        number = storages.setdefault(storage.data_ptr(), len(storages))
        table = tensor.numpy().tobytes() if tensor.dtype in (torch.int32, torch.int64) else b""
        found.append((name, tensor.dtype, tensor.shape, tensor.stride(), number, tensor.data_ptr() - storage.data_ptr(), table))
    return found


_OCCUPANCY: dict[str, int] = {}


def _ctas_on_an_sm(key: str, built: Any) -> int:
    if key not in _OCCUPANCY:
        _OCCUPANCY[key] = read(built).ctas_on_an_sm(90)
    return _OCCUPANCY[key]


@contextmanager
def counting(memory: Memory) -> Iterator[list[Traffic]]:
    """Inside, fastlora_triton's launchers count instead of launching."""
    launches: list[Traffic] = []

    def count(kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
        launches.append(memory.launch(kernel, grid, *args, **options))

    with use_launcher(count):
        yield launches
