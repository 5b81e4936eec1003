"""The compiled ops (csrc, fastlora/_C.so and fastlora/_C_cuda.so): loaded once, or the reason why they are not there."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_C.so")
CUDA_LIBRARY = Path(__file__).with_name("_C_cuda.so")


@cache
def missing() -> str | None:
    """None once the C++ extension is loaded; otherwise why it cannot be, in a sentence."""
    if not LIBRARY.exists():
        return "the C++ extension was not built: install a C++ compiler and run `pip install -e .` (`make setup`) again"
    return _load("C++", LIBRARY)


@cache
def missing_cuda() -> str | None:
    """None once the CUDA extension is loaded, which a torch without CUDA can do too; otherwise why it cannot be, in a sentence."""
    if not CUDA_LIBRARY.exists():
        return (
            "the CUDA extension was not built: install nvcc (a CUDA toolkit, or `pip install 'fastlora[cuda-build]'`) and run "
            "`pip install -e .` (`make setup`) again"
        )
    return _load("CUDA", CUDA_LIBRARY)


def _load(name: str, library: Path) -> str | None:
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"the {name} extension {library.name} does not load under torch {torch.__version__}: {error}; build it again"
    return None


def instruction_set() -> str:
    """The set that the C++ kernels use on this processor: generic, avx2, avx512 or avx512bf16. The extension must be there."""
    return torch.ops.fastlora_cpu.instruction_set()
