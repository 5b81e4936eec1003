"""Triton's compiler without a GPU: the JIT's own front end (specialisation of arguments, options, passes) for an architecture by number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class AbsentGpu:
    """As much of a driver as JITFunction.warmup asks for. It never launches anything."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        """For whom to compile."""
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        """A number for each architecture: the JIT keeps a cache for each device."""
        return self.capability

    def get_current_stream(self, device: Any = None) -> int:
        """None."""
        return 0


def compile_for(capability: int, kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> Any:
    """The compiled kernel (`asm`, `metadata`) for compute capability 80, 90, 100; arguments may be on the meta device."""
    before = driver._active
    driver.set_active(AbsentGpu(capability))
    try:
        return kernel.warmup(*args, grid=tuple(grid), **options)
    finally:
        driver._active = before
