"""How a kernel is started. On a GPU: `kernel[grid](...)`; tests put another launcher here, which compiles it, runs it on a CPU or counts
what it reads. Launchers in this package go through `launch`, so that the same code prepares every one of these."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

Launcher = Callable[..., None]
"""(kernel, grid, *arguments, **options)."""
HOPPER = 90


def _on_gpu(kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
    kernel[tuple(grid)](*args, **options)


_launcher: Launcher = _on_gpu
_capability_without_gpu = HOPPER


def launch(kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
    """Starts `kernel` with a program for every cell of `grid`; options are its constants, num_warps and num_stages. An empty grid is no
    launch."""
    if all(grid):
        _launcher(kernel, grid, *args, **options)


def capability_of(device: torch.device) -> int:
    """Compute capability × 10 that a launch on `device` is for: the GPU's, or what `use_launcher` was told."""
    if device.type != "cuda":
        return _capability_without_gpu
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@contextmanager
def use_launcher(launcher: Launcher, capability: int = HOPPER) -> Iterator[None]:
    """Inside, `launch` calls this one; tensors that are on no GPU get the tiles of `capability`."""
    global _launcher, _capability_without_gpu
    before = _launcher, _capability_without_gpu
    _launcher, _capability_without_gpu = launcher, capability
    try:
        yield
    finally:
        _launcher, _capability_without_gpu = before
