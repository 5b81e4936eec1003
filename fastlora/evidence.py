"""What is known of an implementation, from what is committed: the state in each cell of README's matrix.

| state | fact |
|---|---|
| tested | it runs on a CPU: tests/ops/test_contract.py runs every implementation that an op lists |
| compiled, not run on a GPU | every kernel of its file is in the compile gate's baseline (bench/compile_baseline.json) |
| tested on CARD | a card's rows have a time for it (bench/results/CARD/gpu.jsonl): bench.gpu writes none before its gate |
| not run on a GPU | none of these |
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from fastlora.errors import FastloraError
from fastlora.ops.registry import ON_A_CPU, Dispatch

TESTED, COMPILED, NOT_RUN = "tested", "compiled, not run on a GPU", "not run on a GPU"

_KERNELS = {
    "triton": ("kernels/fastlora_triton", (".py",), re.compile(r"^@(?:triton\.)?jit\b.*?^def (\w+_kernel)\(", re.MULTILINE | re.DOTALL)),
    "cuda": ("csrc/cuda", (".cu", ".cuh"), re.compile(r"__global__[^;{]*?\b(\w+_kernel)\s*\(")),
}
"""Implementation -> (folder of its files, their suffixes, what a kernel looks like)."""


class EvidenceError(FastloraError):
    """The committed results are not there; the message says where they were looked for."""


class Evidence:
    """The committed results of a checkout."""

    def __init__(self, repository: Path) -> None:
        """Raises EvidenceError where the folder is no checkout."""
        self._repository = repository
        if not (repository / "bench" / "compile_baseline.json").is_file():
            raise EvidenceError(f"{repository} is not a checkout of fastlora: the matrix is made of what is committed in bench/")

    @cached_property
    def compiled_kernels(self) -> frozenset[str]:
        """Names of all kernels in the baseline, whatever compiler they are listed under."""
        return frozenset(_kernel_names(json.loads((self._repository / "bench" / "compile_baseline.json").read_text())))

    @cached_property
    def _cards(self) -> Mapping[tuple[str, str], str]:
        """(op, implementation) -> the card that has a time for it, the last one."""
        found = {}
        for path in sorted((self._repository / "bench" / "results").glob("*/gpu.jsonl")):
            for row in map(json.loads, path.read_text().splitlines()):
                if row["median"] is not None:
                    found[row["op"], row["implementation"]] = row["device"]
        return found

    def state(self, dispatch: Dispatch, name: str) -> str | None:
        """Of one implementation of an op; None when the op does not list it."""
        if name not in dispatch.implementations:
            return None
        if name in ON_A_CPU:
            return TESTED
        if card := self._cards.get((dispatch.op, name)):
            return f"{TESTED} on {card}"
        kernels = self._kernels(name, dispatch)
        return COMPILED if kernels and kernels <= self.compiled_kernels else NOT_RUN

    def _kernels(self, name: str, dispatch: Dispatch) -> set[str]:
        """Names of the kernels in the op's own files, or else in those of its stem; none for another's library."""
        if name not in _KERNELS:
            return set()
        folder, suffixes, kernel = _KERNELS[name]
        for stem in (dispatch.op, dispatch.implementations[name].run.__module__.rpartition(".")[2]):
            paths = [self._repository / folder / f"{stem}{suffix}" for suffix in suffixes]
            if found := {kernel_name for path in paths if path.is_file() for kernel_name in kernel.findall(path.read_text())}:
                return found
        return set()


def _kernel_names(baseline: Mapping[str, Any]) -> set[str]:
    """`adamw_kernel fp32: 106` gives adamw_kernel; what is nested gives its own."""
    names: set[str] = set()
    for key, value in baseline.items():
        names |= _kernel_names(value) if isinstance(value, dict) else {key.split()[0]}
    return names
