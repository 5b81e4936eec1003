"""The gradient profile by layer: raw, and with the rank taken out.

A matrix of rank r has r rows that receive gradients of like size, so its norm grows like √r (at constant α/r) whatever the
layer does; ‖g‖/√r compares layers of different ranks. A layer's norm is the root of the sum of squares over its matrices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class LayerNorms:
    """Gradient norms by layer and step."""

    layers: NDArray[np.int32]
    """Sorted layer numbers, [l]."""
    steps: NDArray[np.int32]
    """Sorted steps, [s]."""
    norms_ls: NDArray[np.float64]
    """[l, s]; 0 where nothing of that layer trains, NaN where a gradient was not finite."""

    @property
    def share_l(self) -> NDArray[np.float64]:
        """Share of each layer in the sum of norms, mean over the steps whose gradient is finite and not all zero; sums to 1."""
        total_s = self.norms_ls.sum(axis=0)
        counted_s = total_s > 0
        return (self.norms_ls[:, counted_s] / total_s[counted_s]).mean(axis=1)

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
    kept = np.isin(columns["matrix"], list(matrices))
    layers, row_layer = np.unique(columns["layer"], return_inverse=True)
    steps, row_step = np.unique(columns["step"], return_inverse=True)
    squares = np.where(np.isfinite(columns["norm"]), columns["norm"], np.nan).astype(np.float64) ** 2
    if rank_normalised:
        squares /= columns["rank"]
    squares_ls = np.zeros((len(layers), len(steps)))
    np.add.at(squares_ls, (row_layer[kept], row_step[kept]), squares[kept])
    return LayerNorms(layers, steps, np.sqrt(squares_ls))


def layer_ranks(profile: pa.Table) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float64]]:
    """(layers [l], steps [s], mean rank of the layer's target modules [l, s]): of all that ever had a rank, 0 where one has none."""
    kept = profile.filter(pc.equal(profile["matrix"], "B"))
    layers, row_l = np.unique(kept["layer"].to_numpy(), return_inverse=True)
    steps, row_s = np.unique(kept["step"].to_numpy(), return_inverse=True)
    modules, row_m = np.unique(kept["module"].to_pylist(), return_inverse=True)
    rank_ms = np.zeros((len(modules), len(steps)))
    rank_ms[row_m, row_s] = kept["rank"].to_numpy()
    layer_m = np.zeros(len(modules), dtype=np.intp)
    layer_m[row_m] = row_l
    sum_ls = np.zeros((len(layers), len(steps)))
    np.add.at(sum_ls, layer_m, rank_ms)
    return layers, steps, sum_ls / np.bincount(layer_m)[:, None]


def has_gradient(profile: pa.Table) -> bool:
    """Some norm is positive: there is something to draw and to compare."""
    norms = profile["norm"].to_numpy()
    return bool(np.any(norms[np.isfinite(norms)] > 0))
