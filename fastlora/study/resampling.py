"""Intervals of quantities that are no means: ratios of shares, correlations, ranks of gradients.

    over steps      the steps of a run resampled in blocks, the same ones in all runs that are compared    (Künsch 1989, moving blocks)
    leave one out   jackknife: se² = (b − 1)/b Σ (θ_(i) − θ̄)²                                                (Efron & Stein 1981)

Neighbouring steps are alike, so that single steps would make intervals too narrow. Neither interval says anything about other seeds or
models.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from fastlora.study.claims import Estimate

RESAMPLES = 2000
"""Limits repeat to about 2 % of an interval's width."""
CONFIDENCE = 0.95


def over_steps(statistic: Callable[[NDArray[np.int64]], float], num_steps: int, *, seed: int = 0) -> Estimate:
    """statistic(indices of steps [s]) of all steps, and its 95 % percentile interval over resampled blocks of ⌈∛s⌉ neighbours.

    Below 3 steps the limits are NaN, which decide nothing.
    """
    if num_steps < 3:
        return Estimate(statistic(np.arange(num_steps)), math.nan, math.nan)
    block = int(np.ceil(num_steps ** (1 / 3)))
    generator = np.random.default_rng(seed)
    starts = generator.integers(num_steps - block + 1, size=(RESAMPLES, -(-num_steps // block)))
    indices = (starts[:, :, None] + np.arange(block)).reshape(RESAMPLES, -1)[:, :num_steps]
    low, high = np.quantile([statistic(chosen) for chosen in indices], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(statistic(np.arange(num_steps)), float(low), float(high))


def leave_one_out(statistic: Callable[[NDArray[np.int64]], float], num_batches: int) -> Estimate:
    """statistic(indices of batches [b]) of all batches, and its 95 % interval by the jackknife; NaN limits below 3 batches."""
    if num_batches < 3:
        return Estimate(statistic(np.arange(num_batches)), math.nan, math.nan)
    everything = np.arange(num_batches)
    without = np.array([statistic(np.delete(everything, i)) for i in everything])
    error = float(np.sqrt((num_batches - 1) / num_batches * ((without - without.mean()) ** 2).sum()))
    value, reach = statistic(everything), float(norm.ppf((1 + CONFIDENCE) / 2)) * error
    return Estimate(value, value - reach, value + reach)
