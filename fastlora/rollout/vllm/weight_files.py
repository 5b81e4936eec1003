"""Weights on their way into the engine: one flat file that trainer and engine share (on tmpfs: memory), and the list of what is where.

    weights.bin     tensor after tensor in the engine's dtype, row by row, each from a multiple of ALIGNMENT bytes on
    weights.json    version, dtype, complete, [[name, shape, offset in bytes, checksum], ...]

Names are Hugging Face's. A checksum is the CRC-32 of a tensor's bytes; the engine makes it before it loads and again from what its kernels
multiply by. No −0 is written, only +0: an engine on a CPU keeps its weights packed and shows them by a product with the identity, which
cannot tell the two apart (and neither can a model's output).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlora.atomic import atomic_write_text, naming_disk_full
from fastlora.errors import FastloraError
from fastlora.rollout.vllm.adapter_memory import checksum

DATA_FILE, INDEX_FILE = "weights.bin", "weights.json"

ALIGNMENT = 64
"""Bytes: a cache line; more than any dtype needs to be viewed in place."""

CHUNK = 1 << 15
"""Elements that are rounded, summed up and written at a time: they stay in the cache, and torch takes no second thread for so few. With
1 << 18 and two threads every chunk waits for both while the engine's hold the cores: 2 to 15 s for SmolLM2 instead of .2."""


class WeightFileError(FastloraError, ValueError):
    """Weights that are incomplete, damaged or not for this engine; the message names the tensor. The engine still holds what it held."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]
    offset: int
    """Bytes."""
    checksum: int


@dataclass(frozen=True, slots=True)
class WeightIndex:
    """What the file holds."""

    version: str
    dtype: torch.dtype
    complete: bool
    """The whole model: an engine that needs one more tensor refuses it. Otherwise the engine keeps what is not named."""
    tensors: tuple[StoredTensor, ...]

    @property
    def checksums(self) -> dict[str, int]:
        """Name -> checksum: what the engine must hold after the update."""
        return {stored.name: stored.checksum for stored in self.tensors}

    @property
    def size(self) -> int:
        """Bytes of the file."""
        ends = [stored.offset + torch.Size(stored.shape).numel() * self.dtype.itemsize for stored in self.tensors]
        return max(ends, default=0)


def write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, *, version: str, complete: bool) -> WeightIndex:
    """Writes (name, tensor) pairs, rounded to `dtype`, in one pass. Raises WeightFileError for a name that comes twice, DiskFullError.

    The next version uses the file's memory again (538 MB: .2 s instead of .4), so no engine may still be reading: the last `send_weights`
    has returned. A writer that is killed leaves no index, and a file without an index is not read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index_file = folder / INDEX_FILE
    index_file.unlink(missing_ok=True)
    stored: dict[str, StoredTensor] = {}
    buffer = torch.empty(CHUNK, dtype=dtype)
    path = folder / DATA_FILE
    path.touch(mode=0o600)
    with naming_disk_full(path, "the engine still holds what it held"), path.open("r+b") as file:
        for name, tensor in tensors:
            if name in stored:
                raise WeightFileError(f"{name} comes twice in the weights of version {version}")
            on_cpu = tensor.detach().to(dtype).cpu() if tensor.is_cuda else tensor.detach()  # one transfer, of the rounded
            offset = file.seek(-(-file.tell() // ALIGNMENT) * ALIGNMENT)
            crc = 0
            for chunk in on_cpu.reshape(-1).split(CHUNK):
                rounded = buffer[: len(chunk)].copy_(chunk).add_(0.0)  # −0 + 0 = +0
                data = rounded.view(torch.uint8).numpy().data
                crc = zlib.crc32(data, crc)
                file.write(data)
            stored[name] = StoredTensor(name, tuple(tensor.shape), offset, crc)
        file.truncate()
    index = WeightIndex(version, dtype, complete, tuple(stored.values()))
    entries = [[t.name, t.shape, t.offset, t.checksum] for t in index.tensors]
    document = {"version": version, "dtype": str(dtype).removeprefix("torch."), "complete": complete, "tensors": entries}
    atomic_write_text(index_file, json.dumps(document))
    return index


def read_index(folder: Path) -> WeightIndex:
    """Raises WeightFileError when there is none (never written, or its writer was killed), or none that can be read."""
    try:
        document = json.loads((folder / INDEX_FILE).read_text())
    except (OSError, ValueError) as error:
        raise WeightFileError(f"{folder} holds no finished weights; write them again ({INDEX_FILE}: {error})") from error
    tensors = tuple(StoredTensor(name, tuple(shape), offset, crc) for name, shape, offset, crc in document["tensors"])
    return WeightIndex(document["version"], getattr(torch, document["dtype"]), document["complete"], tensors)


def read_weights(folder: Path) -> tuple[WeightIndex, dict[str, Tensor]]:
    """The index and views of the mapped file, every checksum verified. Raises WeightFileError naming a tensor cut off or damaged."""
    index, tensors = _map(folder)
    for stored in index.tensors:
        if checksum(tensors[stored.name]) != stored.checksum:
            raise WeightFileError(f"{stored.name} in {folder} of version {index.version} does not have the checksum of its index: damaged")
    return index, tensors


def _map(folder: Path) -> tuple[WeightIndex, dict[str, Tensor]]:
    index, path = read_index(folder), folder / DATA_FILE
    found = path.stat().st_size if path.is_file() else 0
    if found < index.size:
        cut = next(t.name for t in index.tensors if t.offset + torch.Size(t.shape).numel() * index.dtype.itemsize > found)
        raise WeightFileError(f"{path} of version {index.version} has {found} bytes, its index needs {index.size}: cut off at {cut}")
    data = torch.from_file(str(path), shared=True, size=found, dtype=torch.uint8) if found else torch.empty(0, dtype=torch.uint8)
    tensors = {}
    for stored in index.tensors:
        size = torch.Size(stored.shape).numel() * index.dtype.itemsize
        tensors[stored.name] = data[stored.offset :][:size].view(index.dtype).view(stored.shape)
    return index, tensors


def columns_of(width: int, part: int, parts: int) -> slice:
    """The columns of a matrix that belong to part 0 <= part < parts; a matrix of fewer columns than parts belongs to each whole."""
    return slice(part * width // parts, (part + 1) * width // parts) if width >= parts else slice(0, width)


def part_checksums(folder: Path, part: int, parts: int) -> dict[str, int]:
    """Name -> checksum of the columns of one part (of a vector: of all). With parts = 1 what WeightIndex.checksums says.

    To be compared with the engine's own of the same part: a tensor that is missing, swapped or old is wrong in every part, and reading a
    part back costs that part of the time.
    """
    _, tensors = _map(folder)
    return {name: checksum(t[:, columns_of(t.shape[1], part, parts)] if t.ndim == 2 else t) for name, t in tensors.items()}


def differing(expected: Mapping[str, int], held: Mapping[str, int]) -> list[str]:
    """Names of the tensors that the engine does not hold as `expected` (WeightIndex.checksums, part_checksums) says."""
    return [name for name, crc in expected.items() if held.get(name) != crc]


def send_weights(call: Callable[[str, str, dict[str, Any]], Any], folder: Path, version: str) -> None:
    """Has the engine load the weights of `folder`. Requests in flight are finished before, with the old ones.

    call: (verb, path, body) -> response with .json(). It raises when the engine fails, which is then left paused, to be restarted. Raises
    WeightFileError when the engine refuses the file: it goes on with what it held. vLLM's own update leaves keys and values of the old
    weights in the prefix cache; the pause drops them.
    """
    call("POST", "/pause?mode=wait&clear_cache=true", {})
    rpc = {"method": "fastlora_update_weights", "args": [str(folder), version]}
    refusal = call("POST", "/collective_rpc", rpc).json()["results"][0]
    if not refusal:
        call("POST", "/update_weight_version", {"new_version": version})
    call("POST", "/resume", {})
    if refusal:
        raise WeightFileError(refusal)
