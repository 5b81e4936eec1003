"""How a kernel is started. On a GPU: `kernel[grid](...)`; tests put another launcher here, which compiles it, runs it on a CPU or counts
what it reads. Launchers in this package go through `launch`, so that the same code prepares every one of these."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

Launcher = Callable[..., None]
"""(kernel, grid, *arguments, **options)."""


def _on_gpu(kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
    kernel[tuple(grid)](*args, **options)


_launcher: Launcher = _on_gpu


def launch(kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
    """Starts `kernel` with a program for every cell of `grid`; options are its constants, num_warps and num_stages. An empty grid is no
    launch."""
    if all(grid):
        _launcher(kernel, grid, *args, **options)


@contextmanager
def use_launcher(launcher: Launcher) -> Iterator[None]:
    """Inside, `launch` calls this one."""
    global _launcher
    before, _launcher = _launcher, launcher
    try:
        yield
    finally:
        _launcher = before
