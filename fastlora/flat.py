"""Trainable parameters as one flat buffer: what the optimizer, the checkpoint and the norms see, whatever is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastlora.ops.adamw_step import ALIGNMENT, Segment


def align(offset: int) -> int:
    """The next multiple of ALIGNMENT elements."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


@dataclass(slots=True)
class FlatParameters:
    """Values and gradients [N] in float32, and where each matrix lies. Gaps between segments hold zeros and stay zero."""

    data: Tensor
    grad: Tensor
    """The accumulated gradient; 0 where the mask is False."""
    segments: tuple[Segment, ...]
    """One per matrix, in the order of PEFT's parameters."""
    mask: Tensor | None = None
    """bool [N], entries of segments that train; None = all."""

    @classmethod
    def zeros(cls, size: int, segments: Sequence[Segment], device: torch.device) -> FlatParameters:
        """Buffers of `size` zeros."""
        data = torch.zeros(size, dtype=torch.float32, device=device)
        return cls(data, torch.zeros_like(data), tuple(segments))

    def parameter(self, offset: int, *shape: int) -> nn.Parameter:
        """A leaf whose values and gradient are views of the buffers: autograd accumulates straight into `grad`."""
        size = int(torch.Size(shape).numel())
        leaf = nn.Parameter(self.data[offset : offset + size].view(shape))
        leaf.grad = self.grad[offset : offset + size].view(shape)
        return leaf

    def trainable_index(self) -> Tensor | None:
        """int32 [k], ascending: elements of the buffer that are in a segment and that the mask lets train; None where there is no mask.

        Raises ValueError when a masked buffer is too long for int32.
        """
        if self.mask is None:
            return None
        if len(self.data) > torch.iinfo(torch.int32).max:
            raise ValueError(f"a mask on B goes with up to 2^31 - 1 parameters, here are {len(self.data)}: lower lora.r")
        trains = torch.zeros_like(self.mask)
        for s in self.segments:
            trains[s.offset :][: s.numel] = self.mask[s.offset :][: s.numel]
        return trains.nonzero().squeeze(1).to(torch.int32)

    @property
    def num_trainable(self) -> int:
        """Entries that can move."""
        index_k = self.trainable_index()
        return sum(s.numel for s in self.segments) if index_k is None else len(index_k)


def flatten_model(model: nn.Module) -> FlatParameters:
    """Moves every weight of a float32 model into one flat buffer (full fine-tuning); tied weights are stored once.

    Raises ValueError for a model that is not float32: full fine-tuning has no master copy besides the weights themselves.
    """
    model.requires_grad_(True)
    segments, size = [], 0
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise ValueError(f"{name} is {parameter.dtype}; method = 'full' needs model.dtype = 'float32'")
        rows = parameter.shape[0]
        segments.append(Segment(name, size, (rows, parameter.numel() // rows), transposed=False))
        size = align(size + parameter.numel())
    flat = FlatParameters.zeros(size, segments, next(model.parameters()).device)
    with torch.no_grad():
        for segment, parameter in zip(segments, model.parameters(), strict=True):
            view = slice(segment.offset, segment.offset + segment.numel)
            flat.data[view].copy_(parameter.reshape(-1))
            parameter.data = flat.data[view].view(parameter.shape)
            parameter.grad = flat.grad[view].view(parameter.shape)
    return flat
