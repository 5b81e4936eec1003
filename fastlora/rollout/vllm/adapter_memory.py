"""An adapter in memory that two processes share: one flat file on tmpfs, which the engine maps, and the list of what is where.

    adapter.bin     A [r, d] and s B [n, r] of module after module, in the engine's dtype
    adapter.json    [[module, r, d, n, checksum of A, checksum of B], ...], dtype

The checksums are CRC-32 of the bytes, made from what the trainer folded. The worker makes them again from the slots that its kernels read.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastlora.lora.folded import FoldedAdapter
from fastlora.rollout.sampler import SamplerError

DATA_FILE, INDEX_FILE = "adapter.bin", "adapter.json"


@dataclass(frozen=True, slots=True)
class SharedModule:
    """One module of a shared adapter."""

    name: str
    a_rd: Tensor
    b_nr: Tensor


@contextmanager
def one_thread() -> Iterator[None]:
    """For many small operations on the CPU beside an engine that has just answered: a vLLM worker that is not ours spins on a core for a
    second (ours sleeps: cpu_idle.py), and every parallel region would wait for a thread that has none. Folding and writing SmolLM2's 210
    modules beside one that spins: 35 ms instead of 450 with two.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def checksum(tensor: Tensor) -> int:
    """CRC-32 of the elements' bytes in row-major order, on any device."""
    return zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def checksums(adapter: FoldedAdapter) -> dict[str, tuple[int, int]]:
    """Module -> (checksum of A, checksum of s B)."""
    return {name: (checksum(a), checksum(adapter.b_nr[name])) for name, a in adapter.a_rd.items()}


def allocate(path: Path, size: int) -> None:
    """A file of `size` bytes that are really there: a write into a mapped file on a full tmpfs is a SIGBUS, which nobody can catch.

    Raises SamplerError when there is no room.
    """
    with path.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise SamplerError(
                f"{path.parent} has no room for an adapter of {size / 2**20:.0f} MiB ({error.strerror}); make a container's /dev/shm "
                "larger (docker run --shm-size), or set vllm.adapter_folder"
            ) from error


def write_shared(adapter: FoldedAdapter, folder: Path) -> None:
    """Writes the adapter for `read_shared`. The folder must be new: an engine may still have an older one mapped."""
    folder.mkdir(parents=True)
    matrices = [matrix for name, a in adapter.a_rd.items() for matrix in (a, adapter.b_nr[name])]
    dtype = matrices[0].dtype
    size = sum(matrix.numel() for matrix in matrices)
    allocate(folder / DATA_FILE, size * dtype.itemsize)
    flat = torch.from_file(str(folder / DATA_FILE), shared=True, size=size, dtype=dtype)
    torch.cat([matrix.reshape(-1).cpu() for matrix in matrices], out=flat)
    modules = [[name, a.shape[0], a.shape[1], adapter.b_nr[name].shape[0]] for name, a in adapter.a_rd.items()]
    (folder / INDEX_FILE).write_text(json.dumps({"dtype": str(dtype).removeprefix("torch."), "modules": modules}))


def read_shared(folder: Path) -> list[SharedModule]:
    """Views of the mapped file; they live on when the file is removed. Raises ValueError when the file is shorter than its index says."""
    index = json.loads((folder / INDEX_FILE).read_text())
    dtype = getattr(torch, index["dtype"])
    size = sum(r * (d + n) for _, r, d, n in index["modules"])
    found = (folder / DATA_FILE).stat().st_size
    if found != size * dtype.itemsize:
        raise ValueError(f"{folder / DATA_FILE} has {found} bytes; its index needs {size * dtype.itemsize}: half-written, or cut off")
    flat = torch.from_file(str(folder / DATA_FILE), shared=False, size=size, dtype=dtype)
    modules, first = [], 0
    for name, r, d, n in index["modules"]:
        a, b = flat[first : first + r * (d + n)].split([r * d, n * r])
        modules.append(SharedModule(name, a.view(r, d), b.view(n, r)))
        first += r * (d + n)
    return modules
