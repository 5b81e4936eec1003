"""Intervals and tests behind every accuracy that fastlora prints.

    one accuracy             Wilson score interval                              (statsmodels)
    before against after     exact McNemar test on the discordant problems      (statsmodels)
                             Newcombe's interval of the paired difference       (from two Wilson intervals)
    pass@k                   unbiased estimator, bootstrap over problems        (scipy)

The closed forms keep a width when every answer is right or nothing changed; the bootstrap does not (see `pass_at_k`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from scipy.stats import bootstrap, hypergeom
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

BOOTSTRAP_RESAMPLES = 10_000
"""The limits of a 95 % percentile interval then repeat to about 1 % of its width, whatever the seed."""


@dataclass(frozen=True, slots=True)
class Proportion:
    """A fraction of successes with its Wilson interval."""

    value: float
    """successes / n."""
    low: float
    high: float
    successes: int
    n: int
    confidence: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}], {self.successes} of {self.n}"


@dataclass(frozen=True, slots=True)
class PairedTest:
    """The same n problems answered twice."""

    difference: float
    """Fraction right after − fraction right before."""
    low: float
    """Newcombe limits of the difference."""
    high: float
    p_value: float
    """Exact two-sided McNemar p: how often `gained` fair coins among `gained + lost` fall at least this unevenly."""
    gained: int
    """Problems that went from wrong to right."""
    lost: int
    """Problems that went from right to wrong."""
    n: int
    confidence: float


@dataclass(frozen=True, slots=True)
class PassAtK:
    """Estimated probability that at least one of k samples of a problem is right, averaged over problems."""

    k: int
    value: float
    low: float
    high: float
    num_problems: int
    num_samples: int
    """Samples per problem behind the estimate."""
    confidence: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}], {self.num_problems} problems × {self.num_samples} samples"


def proportion_interval(successes: int, n: int, confidence: float = 0.95) -> Proportion:
    """Wilson score interval (Wilson 1927, JASA 22, 209) of `successes` out of `n`.

    Raises ValueError unless 0 <= successes <= n, n > 0 and 0 < confidence < 1.
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} trials is not a proportion: need n > 0 and 0 <= successes <= n")
    _check_confidence(confidence)
    value = successes / n
    low, high = proportion_confint(successes, n, alpha=1 - confidence, method="wilson")
    # Wilson limits always enclose the value; at 0 of n and n of n rounding puts them one ulp inside it.
    return Proportion(value, min(float(low), value), max(float(high), value), successes, n, confidence)


def paired_test(before: Sequence[bool], after: Sequence[bool], confidence: float = 0.95) -> PairedTest:
    """Did the same problems go better the second time?

    p is exact McNemar (McNemar 1947); the interval is Newcombe's square-and-add method with Wilson limits and
    continuity-corrected correlation ("method 10", Newcombe 1998, Statistics in Medicine 17, 2635): deterministic, and wider
    than zero when no answer changed, where a bootstrap would claim certainty.

    Raises ValueError when the sequences are empty or differ in length.
    """
    if len(before) != len(after) or not before:
        raise ValueError(f"a paired test needs the same problems twice, got {len(before)} before and {len(after)} after")
    _check_confidence(confidence)
    pairs = list(zip(before, after, strict=True))
    both, lost = pairs.count((True, True)), pairs.count((True, False))
    gained, neither = pairs.count((False, True)), pairs.count((False, False))
    low, high = _newcombe_paired(both, gained, lost, neither, confidence)
    p_value = float(mcnemar([[both, lost], [gained, neither]], exact=True).pvalue)
    return PairedTest((gained - lost) / len(pairs), low, high, p_value, gained, lost, len(pairs), confidence)


def _newcombe_paired(both: int, gained: int, lost: int, neither: int, confidence: float) -> tuple[float, float]:
    """Limits of p_after − p_before; below, l and u are the Wilson limits of each accuracy p.

    low  = d − √( (pa−la)² − 2φ (pa−la)(ub−pb) + (ub−pb)² )
    high = d + √( (ua−pa)² − 2φ (ua−pa)(pb−lb) + (pb−lb)² )
    """
    n = both + gained + lost + neither
    after = proportion_interval(both + gained, n, confidence)
    before = proportion_interval(both + lost, n, confidence)
    covariance = float(both * neither - gained * lost)
    if covariance > 0:
        covariance = max(covariance - n / 2, 0.0)
    spread = sqrt((both + gained) * (lost + neither)) * sqrt((both + lost) * (gained + neither))
    phi = covariance / spread if spread else 0.0

    def distance(a: float, b: float) -> float:
        return sqrt(a * a - 2 * phi * a * b + b * b)

    difference = after.value - before.value
    low = difference - distance(after.value - after.low, before.high - before.value)
    high = difference + distance(after.high - after.value, before.value - before.low)
    return low, high


def pass_at_k(num_samples: int, num_correct: Sequence[int], k: int, confidence: float = 0.95, seed: int = 0) -> PassAtK:
    """Unbiased pass@k (Chen et al. 2021, arXiv 2107.03374, eq. 1): mean over problems of 1 − C(n−c, k) / C(n, k).

    n = `num_samples` completions were drawn for every problem and c = `num_correct[i]` of them were right. One minus that ratio
    is the hypergeometric probability of at least one right completion among k drawn without replacement, which scipy computes
    without overflow. The interval is a percentile bootstrap over problems (they, not samples, are what generalises); when all
    problems have the same estimate it has no width, which then says nothing about new problems.

    Raises ValueError unless 1 <= k <= num_samples, there are two problems or more, and every count lies in 0..num_samples.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs 1 <= k <= {num_samples}, the samples per problem")
    if len(num_correct) < 2:
        raise ValueError(f"pass@{k} needs at least two problems for an interval over problems, got {len(num_correct)}")
    if min(num_correct) < 0 or max(num_correct) > num_samples:
        raise ValueError(f"pass@{k}: the right samples of a problem must number between 0 and {num_samples}, got {num_correct}")
    _check_confidence(confidence)
    per_problem = hypergeom.sf(0, num_samples, np.asarray(num_correct), k)
    resampled = bootstrap(
        (per_problem,),
        np.mean,
        n_resamples=BOOTSTRAP_RESAMPLES,
        batch=1000,  # 1,319 problems × 1,000 resamples × 8 bytes = 10 MB at a time
        confidence_level=confidence,
        method="percentile",
        rng=seed,
    )
    low, high = resampled.confidence_interval
    return PassAtK(k, float(per_problem.mean()), float(low), float(high), len(per_problem), num_samples, confidence)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence = {confidence} must lie strictly between 0 and 1")
