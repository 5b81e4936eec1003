"""The gradient profile by layer, in three measures, and the numbers that the rank-allocation study reports of it (arXiv 2605.07366).

    raw              ‖g‖        of dA and dB
    rank_normalised  ‖g‖ / √r   a matrix of rank r has r rows that receive gradients of like size: at constant α/r its norm grows like √r
                                whatever the layer does
    delta_w          ‖∂L/∂ΔW‖   estimated (fastlora/gradient_profile.py): free of rank, scale, A and B

A layer's norm is the root of the sum of squares over its matrices and over the optimizer steps of a step. Its share is its part in the
sum of all layers' norms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Measure = Literal["raw", "rank_normalised", "delta_w"]


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
    def shares_ls(self) -> NDArray[np.float64]:
        """Share of each layer in the sum of norms [l, steps whose gradient is finite and not all zero]; a column sums to 1."""
        total_s = self.norms_ls.sum(axis=0)
        counted_s = total_s > 0
        return self.norms_ls[:, counted_s] / total_s[counted_s]

    @property
    def share_l(self) -> NDArray[np.float64]:
        """`shares_ls`, mean over its steps; sums to 1."""
        return self.shares_ls.mean(axis=1)

    @property
    def share_ratio(self) -> float:
        """Largest share over smallest, of the layers that have a gradient at all."""
        share_l = self.share_l[self.share_l > 0]
        return float(share_l.max() / share_l.min())

    def top_share(self, fraction: float) -> float:
        """Share carried by the strongest `fraction` of the layers (rounded up)."""
        share_l = np.sort(self.share_l)[::-1]
        return float(share_l[: math.ceil(fraction * len(share_l))].sum())

    @property
    def early_late_correlation(self) -> float:
        """Pearson correlation over the layers of the mean share in the first and in the last third of the steps (rounded down).

        NaN when one of the two is the same in all layers. Raises ValueError below 3 steps with a gradient.
        """
        shares_ls = self.shares_ls
        third = shares_ls.shape[1] // 3
        if third == 0:
            raise ValueError(f"an early and a late profile need 3 steps with a gradient, here are {shares_ls.shape[1]}")
        return correlation(shares_ls[:, :third].mean(axis=1), shares_ls[:, -third:].mean(axis=1))


def layer_norms(profile: pa.Table, measure: Measure = "raw", matrices: str = "AB") -> LayerNorms:
    """The norms of a `gradient_profile.parquet`: of all matrices, of "A" or of "B"; delta_w belongs to modules and asks for all.

    Raises ValueError for delta_w with one matrix alone, or of a run that has none (see `measures`).
    """
    if measure == "delta_w" and matrices != "AB":
        raise ValueError(f"delta_w is the norm of a module's gradient; it has none of {matrices} alone")
    if measure not in measures(profile):
        raise ValueError(f"this profile has no {measure}: it is not known where a mask on B trained")
    layers, steps, norms_ls = _norms(profile, "layer", measure, matrices)
    return LayerNorms(layers, steps, norms_ls)


def module_shares(profile: pa.Table, measure: Measure = "raw") -> dict[str, float]:
    """Module -> its share of the sum of norms over modules; as `LayerNorms.share_l`, by module."""
    modules, steps, norms_ms = _norms(profile, "module", measure, "AB")
    shares = LayerNorms(np.arange(len(modules), dtype=np.int32), steps, norms_ms).share_l
    return dict(zip(modules.tolist(), shares.tolist(), strict=True))


def _norms(profile: pa.Table, group: str, measure: Measure, matrices: str) -> tuple[NDArray[Any], NDArray[np.int32], NDArray[np.float64]]:
    """Sorted values of the column `group` [g], sorted steps [s], roots of the sums of squares [g, s]."""
    value = "delta_w_norm" if measure == "delta_w" else "norm"
    columns = {name: profile[name].to_numpy(zero_copy_only=False) for name in (group, "step", "matrix", "rank", value)}
    kept = np.isin(columns["matrix"], list("B" if measure == "delta_w" else matrices))
    groups, row_group = np.unique(columns[group], return_inverse=True)
    steps, row_step = np.unique(columns["step"], return_inverse=True)
    squares = np.where(np.isfinite(columns[value]), columns[value], np.nan).astype(np.float64) ** 2
    if measure == "rank_normalised":
        squares /= columns["rank"]
    squares_gs = np.zeros((len(groups), len(steps)))
    np.add.at(squares_gs, (row_group[kept], row_step[kept]), squares[kept])
    return groups, steps, np.sqrt(squares_gs)


def measures(profile: pa.Table) -> tuple[Measure, ...]:
    """The measures that a profile has: delta_w is null under a mask on B."""
    known = profile["delta_w_norm"].null_count < profile.num_rows
    return tuple(measure for measure in get_args(Measure) if known or measure != "delta_w")


def layer_ranks(profile: pa.Table) -> NDArray[np.float64]:
    """Σ r of each layer [l], sorted by layer; mean over the steps where ranks are reallocated."""
    rows = profile.filter(pc.equal(profile["matrix"], "B"))
    ranks = rows.group_by(["layer", "module"]).aggregate([("rank", "mean")])
    layers, row_layer = np.unique(ranks["layer"].to_numpy(), return_inverse=True)
    ranks_l = np.zeros(len(layers))
    np.add.at(ranks_l, row_layer, ranks["rank_mean"].to_numpy())
    return ranks_l


def rank_shift_correlation(rank_l: NDArray[np.float64], share_l: NDArray[np.float64], reference_l: NDArray[np.float64]) -> float:
    """Pearson correlation of a layer's rank with the change of its share against a reference, the uniform run's; NaN if one is constant.

    Raises ValueError when the two runs do not have the same number of layers.
    """
    if not rank_l.shape == share_l.shape == reference_l.shape:
        raise ValueError(f"ranks of {len(rank_l)} layers, shares of {len(share_l)}, reference of {len(reference_l)}: not the same layers")
    return correlation(rank_l, share_l - reference_l)


def correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Pearson's; NaN when x or y is constant."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def mean_ranks(profile: pa.Table) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float64]]:
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
