"""Intervals of quantities that are no means: ratios of shares, correlations, ranks of gradients.

    over steps      the steps of a run resampled in blocks, the same ones in all runs that are compared    (Künsch 1989, moving blocks)
    leave one out   jackknife: se² = (b − 1)/b Σ (θ_(i) − θ̄)²                                                (Efron & Stein 1981)

Neighbouring steps are alike, so that single steps would make intervals too narrow. Neither interval says anything about other seeds or
models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from fastlora.study.claims import Estimate

RESAMPLES = 2000
"""Limits repeat to about 2 % of an interval's width."""
CONFIDENCE = 0.95


Statistic = Callable[[NDArray[np.int64]], float]
"""Of a run, of these steps [s] of it."""


def over_steps(statistic: Statistic, num_steps: int) -> Estimate:
    """`over_runs` of one run."""
    return over_runs([(statistic, num_steps)])


def over_runs(runs: Sequence[tuple[Statistic, int]]) -> Estimate:
    """Mean over runs (statistic, number of steps) of the statistic of all steps, and its 95 % percentile interval over resampled blocks of
    ⌈∛s⌉ neighbours, in each run by themselves.

    Below 3 steps the limits are NaN, which decide nothing.
    """
    value = float(np.mean([statistic(np.arange(num_steps)) for statistic, num_steps in runs]))
    if min(num_steps for _, num_steps in runs) < 3:
        return Estimate(value, math.nan, math.nan)
    generator = np.random.default_rng(0)
    drawn = [[statistic(chosen) for chosen in _resampled_blocks(num_steps, generator)] for statistic, num_steps in runs]
    low, high = np.quantile(np.mean(drawn, axis=0), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(value, float(low), float(high))


def _resampled_blocks(num_steps: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Indices of steps [RESAMPLES, s]."""
    block = int(np.ceil(num_steps ** (1 / 3)))
    starts = generator.integers(num_steps - block + 1, size=(RESAMPLES, -(-num_steps // block)))
    return np.asarray((starts[:, :, None] + np.arange(block)).reshape(RESAMPLES, -1)[:, :num_steps])


def leave_one_out(statistic: Callable[[NDArray[np.int64]], float], num_batches: int) -> Estimate:
    """statistic(indices of batches [b]) of all batches, and its 95 % interval by the jackknife; NaN limits below 3 batches."""
    if num_batches < 3:
        return Estimate(statistic(np.arange(num_batches)), math.nan, math.nan)
    everything = np.arange(num_batches)
    without = np.array([statistic(np.delete(everything, i)) for i in everything])
    error = float(np.sqrt((num_batches - 1) / num_batches * ((without - without.mean()) ** 2).sum()))
    value, reach = statistic(everything), float(norm.ppf((1 + CONFIDENCE) / 2)) * error
    return Estimate(value, value - reach, value + reach)
