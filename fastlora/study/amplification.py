"""Do ranks move the gradient's shares further than √r does? One cell's profile against the uniform cell's, over the same steps.

    share'_l ∝ share_l √(r'_l / r_l)                                              the prediction (allocation.sqrt_rank_shares)
    log(share'_l / share_l) = c + β log(r'_l / r_l)                               β by least squares over the layers; √r says ½
    excess = (β − ½) log(max r' / min r')                                         in the units of a log max/min ratio

Ranks must not know the noise of the profile that they are compared with: the layer that a short run shows too strong gets too many of them,
and is weaker when it is measured again, so that proportional ranks fall short of √r and inverse ones exceed it by as much. The uniform
cell here is therefore another run than the one whose profile chose the ranks. The paper's measure, the max/min ratio, looks at two layers
of thirty; its claims are asked by it, the √r law by all layers of all strategies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from fastlora.allocation import share_ratio, sqrt_rank_shares
from fastlora.analysis.gradient_profile import LayerNorms, Measure
from fastlora.study.claims import Claim, Decision, Estimate, Region, above, by_interval, within
from fastlora.study.resampling import over_runs, over_steps

SOURCE = "arXiv 2605.07366"
SAME_BUDGET = ("proportional", "shuffled-proportional", "inverse-proportional", "random")
"""Strategies of which the √r law is asked: `reduced` has another budget, `dynamic` another rank at every time."""
PUBLISHED_RATIO = {"uniform": 2.17, "proportional": 3.00, "reduced": 3.57}
"""Max/min, by strategy."""
NEAR = math.log(PUBLISHED_RATIO["proportional"] / PUBLISHED_RATIO["uniform"]) / 2
"""Half of the published amplification, a factor of 1.18: what exceeds √r by more would leave much of it unexplained, and within it measured
and predicted ratios count as equal. Single runs of SmolLM2 over 32 steps differ by 10 % (LOG.md)."""


@dataclass(frozen=True, slots=True)
class Profiled:
    """What one cell's gradients say, against the uniform cell of its seed; over the steps that had a gradient in every cell of the seed."""

    strategy: str
    seed: int
    ranks_l: tuple[int, ...]
    norms: LayerNorms
    """Raw, of all steps."""
    shares: Mapping[Measure, NDArray[np.float64]]
    """Shares of the layers [l, s]."""
    uniform: Mapping[Measure, NDArray[np.float64]]
    """Those of the uniform cell at the same steps."""
    uniform_ranks_l: tuple[int, ...]

    @property
    def num_steps(self) -> int:
        """s."""
        return self.shares["raw"].shape[1]

    @property
    def change_l(self) -> NDArray[np.float64]:
        """Of the mean raw share against the uniform cell."""
        return np.asarray(self.shares["raw"].mean(axis=1) - self.uniform["raw"].mean(axis=1))

    def ratio(self, measure: Measure, steps: NDArray[np.int64]) -> float:
        """Max/min ratio of the shares, mean over these steps."""
        return max_min(self.shares[measure], steps)

    def uniform_ratio(self, measure: Measure, steps: NDArray[np.int64]) -> float:
        """The same of the uniform cell."""
        return max_min(self.uniform[measure], steps)

    def predicted_ratio(self, steps: NDArray[np.int64]) -> float:
        """The raw ratio if rank did nothing but add rows."""
        return share_ratio(self.predicted_shares(steps))

    def excess(self, steps: NDArray[np.int64]) -> float:
        """How much further than √r the ranks have moved the raw shares, by all layers that have a rank; see the module."""
        ranks_l = np.array(self.ranks_l, dtype=float)
        kept = ranks_l > 0
        x_l = np.log(ranks_l[kept] / np.array(self.uniform_ranks_l)[kept])
        y_l = np.log(self.shares["raw"][:, steps].mean(axis=1)[kept] / self.uniform["raw"][:, steps].mean(axis=1)[kept])
        slope, _ = np.polyfit(x_l, y_l, 1)
        return float((slope - 0.5) * np.ptp(x_l))

    @property
    def excess_interval(self) -> Estimate:
        """`excess` over all steps, blocks of them resampled."""
        return over_steps(self.excess, self.num_steps)

    def predicted_shares(self, steps: NDArray[np.int64]) -> tuple[float, ...]:
        """√r on the uniform cell's shares over these steps; the scale is constant in the first scale mode, which is the one predicted."""
        return sqrt_rank_shares(self.uniform["raw"][:, steps].mean(axis=1).tolist(), self.uniform_ranks_l, self.ranks_l)


def max_min(shares_ls: NDArray[np.float64], steps: NDArray[np.int64]) -> float:
    """Max/min ratio over the layers of shares [l, s], mean over these steps."""
    return share_ratio(shares_ls[:, steps].mean(axis=1).tolist())


def amplification_claims(runs: Sequence[Profiled]) -> Iterator[Claim]:
    """The paper's reading of proportional ranks, of each seed, and its confrontation with √r."""
    published = f"max/min {PUBLISHED_RATIO['uniform']:.2f} → {PUBLISHED_RATIO['proportional']:.2f}; √r alone predicts 3.07"

    def measured(one: Profiled, steps: NDArray[np.int64]) -> float:
        return math.log(one.ratio("raw", steps) / one.uniform_ratio("raw", steps))

    def beyond(one: Profiled, steps: NDArray[np.int64]) -> float:
        return math.log(one.ratio("raw", steps) / one.predicted_ratio(steps))

    def without_rank(one: Profiled, steps: NDArray[np.int64]) -> float:
        return math.log(one.ratio("delta_w", steps) / one.uniform_ratio("delta_w", steps))

    amplified = "log of the raw max/min ratio, proportional over uniform"
    over_prediction = "log of the raw max/min ratio over its √r prediction"
    of_delta_w = "log of the max/min ratio of ‖∂L/∂ΔW‖, proportional over uniform"
    half = "half of the published amplification"
    for text, statistic, region, what in (
        ("Ranks by the profile amplify the imbalance of the gradient's shares", measured, above(0.0), amplified),
        (f"The amplification exceeds what √r makes of the uniform profile by {half}", beyond, above(NEAR), over_prediction),
        (f"With the rank taken out (∂L/∂ΔW) the imbalance still grows by {half}", without_rank, above(NEAR), of_delta_w),
    ):
        yield by_runs(runs, statistic, region, what).claim(text, source=f"{SOURCE}, section 5", published=published)


def sqrt_law_claim(runs: Sequence[Profiled]) -> Claim:
    """Of all strategies of SAME_BUDGET, whose ranks know nothing of the uniform cell's noise: a seed's mean over them, mean of the seeds.

    The cells of a seed must have the same steps: these are resampled for all of them at once, since they share the uniform cell.
    """
    strategies = ", ".join(dict.fromkeys(one.strategy for one in runs))
    seeds = list(dict.fromkeys(one.seed for one in runs))
    of_seeds = [[one for one in runs if one.seed == seed] for seed in seeds]

    def mean_excess(of_seed: Sequence[Profiled], steps: NDArray[np.int64]) -> float:
        return float(np.mean([one.excess(steps) for one in of_seed]))

    found = over_runs([(partial(mean_excess, of_seed), of_seed[0].num_steps) for of_seed in of_seeds])
    what = f"(β − ½) log(max r / min r), by all layers, mean of {strategies} ranks"
    return _decision(found, within(-NEAR, NEAR), what, seeds).claim(
        "A rank moves its layer's share by √r, to half of the published amplification", source="control, not published", published="not run"
    )


def by_runs(runs: Sequence[Profiled], statistic: Callable[[Profiled, NDArray[np.int64]], float], region: Region, what: str) -> Decision:
    """Decides from `over_runs`, one cell a seed: the mean of the seeds."""
    return _decision(over_runs([(partial(statistic, one), one.num_steps) for one in runs]), region, what, [one.seed for one in runs])


def _decision(found: Estimate, region: Region, what: str, seeds: Sequence[int]) -> Decision:
    return by_interval(found, region, f"{what}, seed {', '.join(map(str, seeds))} (blocks of steps resampled)")
