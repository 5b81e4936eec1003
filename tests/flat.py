"""Flat parameters for tests of the optimizer: a layout made by hand, and its matrices as separate tensors in PEFT's shapes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastlora.flat import FlatParameters
from fastlora.ops.adamw_step import Segment

ODD_MODULES = ((1, 7, 1), (3, 5, 19), (17, 33, 23), (16, 64, 48), (2, 1, 15))
"""(r, d, n): ranks and widths that are no multiple of a vector, one that is, and matrices smaller than a vector."""


@dataclass
class HandmadeFlat(FlatParameters):
    """All A first, then all B [r,n], a hole of 17 elements after each; segments in PEFT's order A, B, A, B, ..."""

    gaps: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    """bool [N], True at elements that belong to no matrix."""

    def write(self, buffer: Tensor, tensors: list[Tensor]) -> None:
        """Put PEFT-shaped tensors into a flat buffer."""
        for s, tensor in zip(self.segments, tensors, strict=True):
            stored = tensor.t() if s.transposed else tensor
            buffer[s.offset : s.offset + s.numel] = stored.reshape(-1)

    def read(self, buffer: Tensor) -> list[Tensor]:
        """The matrices of a flat buffer, contiguous in PEFT's shapes."""
        stored = [buffer[s.offset : s.offset + s.numel].reshape(s.shape) for s in self.segments]
        return [(x.t() if s.transposed else x).contiguous() for s, x in zip(self.segments, stored, strict=True)]


def make_flat(
    modules: tuple[tuple[int, int, int], ...] = ODD_MODULES, *, masked: bool = False, dtype: torch.dtype = torch.float32
) -> HandmadeFlat:
    """Random parameters, zero gradient; with `masked`, about half of the entries train."""
    shapes = {(i, "A"): (r, d) for i, (r, d, _) in enumerate(modules)}
    shapes |= {(i, "B"): (r, n) for i, (r, _, n) in enumerate(modules)}
    offset, segments = 0, {}
    for (i, part), shape in shapes.items():
        segments[i, part] = Segment(f"layers.{i}.lora_{part}", offset, shape, transposed=part == "B")
        offset += shape[0] * shape[1] + 17  # an odd hole: nothing may depend on where a matrix starts
    ordered = tuple(segments[i, part] for i in range(len(modules)) for part in "AB")
    gaps = torch.ones(offset, dtype=torch.bool)
    for s in ordered:
        gaps[s.offset : s.offset + s.numel] = False
    data = torch.randn(offset, dtype=dtype).masked_fill(gaps, 0.0)
    mask = torch.rand(offset) < 0.5 if masked else None
    return HandmadeFlat(data, torch.zeros_like(data), ordered, mask, gaps)


def peft_shapes(flat: HandmadeFlat) -> list[tuple[int, int]]:
    """Shape of each matrix in PEFT."""
    return [s.shape[::-1] if s.transposed else s.shape for s in flat.segments]
