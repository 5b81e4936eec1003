"""Runs a compiled Triton kernel on the CPU, strictly: as the launcher of a GPU would, with everything watched that a GPU does not watch.

    with on_cpu(threads=2, order_seed=7):
        kernels.forward(...)              # every launch inside goes through the compiler's front end, emit.py and g++

Loads and stores outside the tensors that were passed, stores of two programs to one place and loads of what another program stores raise
LaunchError. Outputs should be NaN before the launch: nothing here fills them.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from bench.triton_cpu.emit import Argument, Translation, translate
from fastlora_triton.front_end import compile_for
from fastlora_triton.launch import use_launcher

HERE = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-std=c++17", "-w", "-shared", "-fPIC", "-pthread")
"""No contraction: a product and a sum are two roundings here; the GPU's compiler fuses them. Tensor-core products do not depend on it."""
CACHE = Path(os.environ.get("FASTLORA_TRITON_CPU_CACHE", Path(tempfile.gettempdir()) / f"fastlora_triton_cpu_{os.getuid()}"))

_CTYPES = {"i1": ctypes.c_bool, "i32": ctypes.c_int32, "i64": ctypes.c_int64, "f32": ctypes.c_float}


class LaunchError(AssertionError):
    """What a launch did that it must not do; the message names program and tensor."""


@dataclass(frozen=True, slots=True)
class Watch:
    """How strictly launches are run."""

    threads: int = 2
    order_seed: int = 0
    """0: programs in ascending order; else shuffled."""
    conflicts: bool = True
    """Report programs that store to one place. Off for kernels that do so with equal values."""


@contextmanager
def on_cpu(watch: Watch = Watch()) -> Iterator[None]:
    """Inside, fastlora_triton's launchers run their kernels here."""

    def launch(kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
        run(compile_for(90, kernel, grid, *args, **options).asm["ttir"], kernel, grid, args, options, watch)

    with use_launcher(launch):
        yield


def run(ttir: str, kernel: Any, grid: Sequence[int], args: Sequence[Any], options: dict[str, Any], watch: Watch) -> None:
    """Runs a kernel's TTIR on the tensors of its arguments. Raises LaunchError."""
    translation, library = build(ttir, translate)
    given = named_arguments(kernel, args, options)
    buffers = tensors_of(given)
    count = len(buffers)
    message = library.launch(
        (ctypes.c_void_p * count)(*(tensor.data_ptr() for tensor in buffers.values())),
        (ctypes.c_void_p * count)(*(tensor.data_ptr() + extent(tensor) for tensor in buffers.values())),
        (ctypes.c_char_p * count)(*(label(name, tensor) for name, tensor in buffers.items())),
        *map(ctypes.c_int, (count, watch.conflicts, watch.threads)),
        ctypes.c_uint(watch.order_seed),
        *grid_sizes(grid),
        *c_values(translation, given),
    )
    if message:
        raise LaunchError(f"{translation.name}: {message.decode()}")


def named_arguments(kernel: Any, args: Sequence[Any], options: dict[str, Any]) -> dict[str, Any]:
    """A launch's arguments and constants under the kernel's names."""
    return dict(zip(kernel.arg_names, args, strict=False)) | {name: value for name, value in options.items() if name in kernel.arg_names}


def grid_sizes(grid: Sequence[int]) -> list[ctypes.c_int]:
    """Three."""
    return [ctypes.c_int(n) for n in (*grid, 1, 1)[:3]]


def tensors_of(given: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors behind a launch's arguments."""
    return {name: tensor for argument, value in given.items() for name, tensor in _tensors(argument, value)}


def label(name: str, tensor: Tensor) -> bytes:
    """For messages."""
    return f"{name} {tuple(tensor.shape)}".encode()


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors behind an argument: a tensor, a descriptor's, or those of a tuple."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, tuple):
        for index, part in enumerate(value):
            yield from _tensors(f"{name}[{index}]", part)
    elif hasattr(value, "base"):
        yield name, value.base


def extent(tensor: Tensor) -> int:
    """Bytes from the first element to behind the last."""
    if not tensor.numel():
        return 0
    return (sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1) * tensor.element_size()


def c_values(translation: Translation, given: dict[str, Any], address: Callable[[Tensor], int] = Tensor.data_ptr) -> list[Any]:
    """What the kernel's library is called with; `address` of a tensor."""
    return [_c_value(argument, given, address) for argument in translation.arguments]


def _c_value(argument: Argument, given: dict[str, Any], address: Callable[[Tensor], int]) -> Any:
    """The kernel's argument `%x`, or `%x.shape.0`, `%x.stride.1` of a descriptor, `%x.0` of a tuple."""
    name, *path = argument.name[1:].split(".")
    value = given[name]
    while path and isinstance(value, tuple):
        value = value[int(path.pop(0))]
    if path:
        values = {"shape": getattr(value, "shape", ()), "stride": getattr(value, "strides", ())}.get(path[0])
        value = 0 if values is None or len(path) == 1 else values[int(path[1])]
        return _CTYPES[argument.type](int(value))
    if isinstance(value, Tensor):
        return ctypes.c_void_p(address(value))
    if hasattr(value, "base"):
        return ctypes.c_void_p(address(value.base))
    return _CTYPES[argument.type](value)


@cache
def build(ttir: str, translator: Callable[[str], Translation]) -> tuple[Translation, ctypes.CDLL]:
    """The C++ of a kernel and its compiled library."""
    translation = translator(ttir)
    library = compiled(translation.name, translation.source)
    library.launch.restype = ctypes.c_char_p
    return translation, library


def compiled(name: str, source: str) -> ctypes.CDLL:
    """The library of a C++ source, kept in CACHE between processes. Raises RuntimeError with what the compiler says."""
    headers = "".join(path.read_text() for path in sorted(HERE.glob("*.h")))
    path = CACHE / f"{name}_{hashlib.sha256((source + headers + ' '.join(FLAGS)).encode()).hexdigest()[:16]}.so"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            source_path, library = Path(scratch) / "kernel.cpp", Path(scratch) / "kernel.so"
            source_path.write_text(source)
            command = ["g++", *FLAGS, f"-I{HERE}", str(source_path), "-o", str(library)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{name}: the C++ of its TTIR does not compile:\n{done.stderr[:4000]}")
            library.replace(path)
    return ctypes.CDLL(str(path))
