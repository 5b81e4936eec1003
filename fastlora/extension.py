"""The compiled ops (csrc, fastlora/_C.so): loaded once, or the reason why they are not there."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_C.so")


@cache
def missing() -> str | None:
    """None once the extension is loaded; otherwise why it cannot be, in a sentence."""
    if not LIBRARY.exists():
        return "the C++ extension was not built: install a C++ compiler and run `pip install -e .` (`make setup`) again"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"the C++ extension {LIBRARY.name} does not load under torch {torch.__version__}: {error}; build it again"
    return None


def instruction_set() -> str:
    """The set that the C++ kernels use on this processor: generic, avx2, avx512 or avx512bf16. The extension must be there."""
    return torch.ops.fastlora_cpu.instruction_set()
