"""Which implementations there are to test, and how to run one: its name and, for `cpp`, the instruction set of its kernels."""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import fastlora.ops
from fastlora import extension
from fastlora.ops.registry import OpSpec, use_implementation
from tests.tolerances import KERNEL_ERROR_FACTOR, KERNEL_ERROR_FLOOR

ALL_INSTRUCTION_SETS = ("generic", "avx2", "avx512", "avx512bf16")
INSTRUCTION_SETS = () if extension.missing() else ALL_INSTRUCTION_SETS[: ALL_INSTRUCTION_SETS.index(extension.instruction_set()) + 1]
"""Those of this processor, the least first."""

needs_extension = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))


def op_specs() -> list[OpSpec]:
    """Every OpSpec at the top of a module of fastlora.ops, alone or in a tuple; sorted by name."""
    specs: dict[str, OpSpec] = {}
    for info in pkgutil.iter_modules(fastlora.ops.__path__):
        module = importlib.import_module(f"fastlora.ops.{info.name}")
        found = [spec for value in vars(module).values() for spec in (value if isinstance(value, tuple) else (value,))]
        specs |= {spec.name: spec for spec in found if isinstance(spec, OpSpec)}
    return sorted(specs.values(), key=lambda spec: spec.name)


class Variant(NamedTuple):
    """An implementation; for `cpp` with the instruction set of its kernels."""

    implementation: str
    instruction_set: str | None = None

    def __str__(self) -> str:
        return self.implementation if self.instruction_set is None else f"{self.implementation}.{self.instruction_set}"


CPP = [Variant("cpp", name) for name in INSTRUCTION_SETS]
"""Every set of C++ kernels that runs here; none without the extension (tests/test_extension.py says so by name)."""


@contextmanager
def running(variant: Variant) -> Iterator[None]:
    """Inside the block every op runs this implementation, its kernels this instruction set; what was before comes back after it."""
    with use_implementation(variant.implementation):
        if variant.instruction_set is None:
            yield
            return
        before = extension.instruction_set()
        torch.ops.fastlora_cpu.use_instruction_set(variant.instruction_set)
        try:
            yield
        finally:
            torch.ops.fastlora_cpu.use_instruction_set(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads for torch's parallel loops inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def relative_error(got: Tensor, truth: Tensor) -> float:
    """‖got − truth‖ / ‖truth‖ in float64."""
    return float((got.detach().double() - truth.detach()).norm() / truth.detach().double().norm().clamp(min=1e-300))


def assert_no_worse(got: Sequence[Tensor], plain: Sequence[Tensor], truth: Sequence[Tensor]) -> None:
    """Is the error of each tensor against fp64 that of plain torch in the same dtype, up to the order of the roundings?"""
    for index, (ours, theirs, exact) in enumerate(zip(got, plain, truth, strict=True)):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), f"tensor {index}"
        assert ours.isfinite().all(), f"tensor {index} is not finite"
        error, limit = relative_error(ours, exact), KERNEL_ERROR_FACTOR * relative_error(theirs, exact) + KERNEL_ERROR_FLOOR
        assert error <= limit, f"tensor {index}: error {error:.2e} against fp64, at most {limit:.2e} allowed"


class PooledErrors:
    """Relative L2 error of each output of an op over many samples, ours and plain torch's in the same dtype, against fp64.

    Pooled: on one small sample torch's own error is a matter of luck.
    """

    def __init__(self) -> None:
        self._squares: Counter[tuple[int, str]] = Counter()

    def add(self, got: Sequence[Tensor], plain: Sequence[Tensor], truth: Sequence[Tensor]) -> None:
        """The outputs of one sample. One whose shapes differ is what an implementation keeps for its own backward pass."""
        for index, (ours, theirs, exact) in enumerate(zip(got, plain, truth, strict=True)):
            if ours.shape == exact.shape:
                self._squares[index, "ours"] += float((ours.double() - exact).square().sum())
                self._squares[index, "torch"] += float((theirs.double() - exact).square().sum())
                self._squares[index, "truth"] += float(exact.square().sum())

    def assert_within(self, factor: float, floor: float) -> None:
        """Ours is at most `factor` times torch's, plus `floor`."""
        for index in sorted({index for index, _ in self._squares}):
            size = max(self._squares[index, "truth"], 1e-300)
            ours, theirs = (math.sqrt(self._squares[index, name] / size) for name in ("ours", "torch"))
            assert ours <= factor * theirs + floor, f"output {index}: error {ours:.2e} against fp64, torch's own is {theirs:.2e}"
