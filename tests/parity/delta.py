"""How far two lists of numbers are apart: the unit of the parity table. Δ = 0 means the same bits (the sign of a zero aside)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Delta:
    """Difference between what fastlora and its oracle computed."""

    numbers: int
    """How many numbers were compared."""
    max_abs: float
    """Largest |ours − theirs|; infinite when one of them is not finite and the other differs."""
    max_ulp: int
    """Largest distance in representable float32 numbers (units in the last place)."""

    def __add__(self, other: Delta) -> Delta:
        """Both comparisons together."""
        return Delta(self.numbers + other.numbers, max(self.max_abs, other.max_abs), max(self.max_ulp, other.max_ulp))


def compare(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Delta:
    """Δ of equally long lists of float32 tensors of equal shapes; anything else is an error, not a difference."""
    return worst(_compare(a.detach(), b.detach()) for a, b in zip(ours, theirs, strict=True))


def worst(deltas: Iterable[Delta]) -> Delta:
    """All comparisons together."""
    return reduce(Delta.__add__, deltas, Delta(0, 0.0, 0))


def _compare(ours: Tensor, theirs: Tensor) -> Delta:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == torch.float32, (ours.shape, theirs.shape, ours.dtype)
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    if bool(same.all()):
        return Delta(ours.numel(), 0.0, 0)
    difference = (ours.double() - theirs.double()).abs().nan_to_num(torch.inf, torch.inf)
    ulp = (_ordinal(ours) - _ordinal(theirs)).abs()
    return Delta(ours.numel(), float(difference[~same].max()), int(ulp[~same].max()))


def _ordinal(x: Tensor) -> Tensor:
    """int64, the position of each float32 in the ordered list of all of them; ±0 share one."""
    bits = x.contiguous().view(torch.int32).long()
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
