"""Compiles device code of csrc/cuda for the CPU: a library for ctypes, or a program under a sanitizer; the same text is compiled once.

The text can be another than the repository's: `edit` replaces pieces of it, which is how tests plant bugs.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).parent
DEVICE_CODE = HERE.parents[1] / "csrc/cuda"
CACHE = Path(os.environ.get("FASTLORA_CUDA_CPU_CACHE", Path(tempfile.gettempdir()) / f"fastlora_cuda_cpu_{os.getuid()}"))
FLAGS = ("-std=c++17", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-pthread")
SANITIZERS = {
    "thread": ("-O1", "-fsanitize=thread", "-DWITH_TSAN"),
    "address": ("-O1", "-fsanitize=address", "-DWITH_ASAN"),
    "undefined": ("-O1", "-fsanitize=undefined,float-cast-overflow", "-fno-sanitize-recover=all"),
}

needs_gxx = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64",
    reason="the emulation of CUDA needs g++ and switches stacks in x86-64 assembly",
)

Edit = tuple[str, str, str]
"""(file of csrc/cuda, text in it, what it is replaced by)."""


def library(harness: str, edits: tuple[Edit, ...] = ()) -> ctypes.CDLL:
    """tests/cuda_cpu/<harness>.cpp with the device code that it includes, loaded."""
    loaded = ctypes.CDLL(str(_compile(harness, ("-O2", "-fPIC", "-shared"), edits)))
    loaded.emulation_error.restype = ctypes.c_char_p
    return loaded


def run_under(
    sanitizer: str | None, harness: str, edits: tuple[Edit, ...] = (), arguments: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """The harness's `main`, as a program of its own; it ends with what a sanitizer finds first."""
    program = _compile(harness, SANITIZERS[sanitizer] if sanitizer else ("-O0",), edits)
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([program, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=120)


@cache
def _compile(harness: str, flags: tuple[str, ...], edits: tuple[Edit, ...]) -> Path:
    """Path of the result."""
    sources = {path.name: path.read_text() for path in sorted(DEVICE_CODE.glob("*.cuh"))}
    for name, text, replacement in edits:
        if sources[name].count(text) != 1:
            raise ValueError(f"{name} has {text!r} {sources[name].count(text)} times, not once")
        sources[name] = sources[name].replace(text, replacement)
    return compile_text(harness, sources | {f"{harness}.cpp": (HERE / f"{harness}.cpp").read_text()}, flags)


def compile_text(name: str, sources: Mapping[str, str], flags: tuple[str, ...], libraries: tuple[str, ...] = ()) -> Path:
    """All .cpp files among `sources`, which lie in a folder cuda/, with the emulation; from the cache where it is already there."""
    ours = {path.name: path.read_text() for path in [*sorted(HERE.glob("emulation.*")), HERE / "elements.h"]}
    target = CACHE / f"{name}-{_digest(sources, ours, FLAGS + flags)}"
    if not target.exists():
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "cuda").mkdir()
            for file, text in sources.items():
                (Path(folder) / "cuda" / file).write_text(text)
            files = [Path(folder) / "cuda" / file for file in sources if file.endswith(".cpp")]
            _move(_run(Path(folder), [*FLAGS, *flags, *files, _scheduler(flags), *libraries]), target)
    return target


@cache
def _scheduler(flags: tuple[str, ...]) -> Path:
    """emulation.cpp as an object file, without the sanitizer's instrumentation."""
    flags = ("-O2", "-fPIC", *(flag for flag in flags if flag.startswith("-DWITH")))
    target = CACHE / f"emulation-{_digest({path.name: path.read_text() for path in HERE.glob('emulation.*')}, FLAGS + flags)}.o"
    if not target.exists():
        with tempfile.TemporaryDirectory() as folder:
            _move(_run(Path(folder), [*FLAGS, *flags, "-c", HERE / "emulation.cpp"]), target)
    return target


def _run(folder: Path, arguments: list[str | Path]) -> Path:
    """g++; raises RuntimeError with what it says."""
    output = folder / "out"
    command = ["g++", f"-I{folder}", f"-I{HERE}", *arguments, "-o", output]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"g++ {' '.join(map(str, arguments))} failed:\n{done.stderr}")
    return output


def _move(source: Path, target: Path) -> None:
    """Several test processes may do so at the same time."""
    CACHE.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=CACHE))
    shutil.copy2(source, beside / "x")
    (beside / "x").replace(target)
    beside.rmdir()


def _digest(*parts: Mapping[str, str] | tuple[str, ...]) -> str:
    return hashlib.sha256(repr([sorted(part.items()) if isinstance(part, Mapping) else part for part in parts]).encode()).hexdigest()[:24]
