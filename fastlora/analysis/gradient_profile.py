"""The gradient profile by layer: raw, and with the rank taken out.

A matrix of rank r has r rows that receive gradients of like size, so its norm grows like √r (at constant α/r) whatever the
layer does; ‖g‖/√r compares layers of different ranks. A layer's norm is the root of the sum of squares over its matrices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class LayerNorms:
    """Gradient norms by layer and step."""

    layers: NDArray[np.int32]
    """Sorted layer numbers, [l]."""
    steps: NDArray[np.int32]
    """Sorted steps, [s]."""
    norms_ls: NDArray[np.float64]
    """[l, s]; NaN where no matrix of that layer has a gradient at that step."""

    @property
    def share_l(self) -> NDArray[np.float64]:
        """Share of each layer in the sum of norms, mean over steps; sums to 1."""
        total_s = np.nansum(self.norms_ls, axis=0)
        return np.nanmean(self.norms_ls[:, total_s > 0] / total_s[total_s > 0], axis=1)

    @property
    def share_ratio(self) -> float:
        """Largest share over smallest, of the layers that have a gradient at all."""
        share_l = self.share_l[self.share_l > 0]
        return float(share_l.max() / share_l.min())

    def top_share(self, fraction: float) -> float:
        """Share carried by the strongest `fraction` of the layers (rounded up)."""
        share_l = np.sort(self.share_l)[::-1]
        return float(share_l[: math.ceil(fraction * len(share_l))].sum())


def layer_norms(profile: pa.Table, matrices: str = "AB", rank_normalised: bool = False) -> LayerNorms:
    """The norms of a `gradient_profile.parquet`: of all matrices, of "A" or of "B"; ‖g‖/√r if `rank_normalised`."""
    columns = {name: profile[name].to_numpy(zero_copy_only=False) for name in ("layer", "step", "matrix", "rank", "norm")}
    kept = np.isin(columns["matrix"], list(matrices)) & np.isfinite(columns["norm"])
    layers, row_layer = np.unique(columns["layer"], return_inverse=True)
    steps, row_step = np.unique(columns["step"], return_inverse=True)
    squares = columns["norm"].astype(np.float64) ** 2 / (columns["rank"] if rank_normalised else 1)
    norms_ls = np.zeros((len(layers), len(steps)))
    present_ls = np.zeros_like(norms_ls, dtype=bool)
    np.add.at(norms_ls, (row_layer[kept], row_step[kept]), squares[kept])
    present_ls[row_layer[kept], row_step[kept]] = True
    return LayerNorms(layers, steps, np.where(present_ls, np.sqrt(norms_ls), np.nan))


def has_gradient(profile: pa.Table) -> bool:
    """Some norm is positive: there is something to draw and to compare."""
    return bool(np.any(profile["norm"].to_numpy() > 0))
