"""Buffers for kernels that run on the CPU: outputs start as NaN, and what lies before and behind a buffer is watched."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import torch
from torch import Tensor

GUARD = 256
"""Bytes on either side: 0xFF, which is NaN to a kernel that reads them and −1 as an index."""


@dataclass
class Memory:
    """The buffers of one launch."""

    blocks: list[tuple[Tensor, int]] = field(default_factory=list)
    """Bytes with both guards, and how many of them are the buffer's."""

    def place(self, values: Tensor, offset: int = 0) -> Tensor:
        """A copy between guards, at a multiple of 16 bytes, or `offset` bytes behind one."""
        size = values.numel() * values.element_size()
        whole = torch.full((2 * GUARD + size + 32,), 0xFF, dtype=torch.uint8)
        start = GUARD + -(whole.data_ptr() + GUARD) % 16 + offset
        block = whole[start - GUARD : start + size + GUARD]
        self.blocks.append((block, size))
        inside = block[GUARD : GUARD + size].view(values.dtype).view(values.shape)
        return inside.copy_(values)

    def output(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Filled with NaN."""
        return self.place(torch.full(shape, float("nan"), dtype=dtype))

    def assert_guards_hold(self) -> None:
        """Did nobody write beside a buffer?"""
        for number, (block, size) in enumerate(self.blocks):
            outside = torch.cat([block[:GUARD], block[GUARD + size :]])
            assert bool((outside == 0xFF).all()), f"written outside of buffer {number} of {size} bytes"


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """For ctypes; null for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
