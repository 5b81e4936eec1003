"""Intervals and tests behind every accuracy that fastlora prints.

    one accuracy             Wilson score interval                              (statsmodels)
    before against after     exact McNemar test on the discordant problems      (statsmodels)
                             Newcombe's interval of the paired difference       (from two Wilson intervals)
    pass@k                   unbiased estimator, bootstrap over problems        (scipy)
    several seeds            bootstrap of the paired difference over items and seeds
    many comparisons         Holm's step-down correction                        (statsmodels)
    planning                 items, and seeds, that a gap needs                 (Connor's formula; variance components)
    two series of numbers    Pearson's or Spearman's correlation, interval by Fisher's z   (scipy)

The closed forms keep a width when every answer is right or nothing changed; the bootstrap does not (see `pass_at_k`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import atanh, ceil, floor, inf, sqrt, tanh

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import bootstrap, hypergeom, norm, pearsonr, spearmanr
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
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


@dataclass(frozen=True, slots=True)
class SeededDifference:
    """Accuracy of one strategy minus that of another, both run with the same seeds on the same items."""

    difference: float
    """Mean of second − first over seeds and items."""
    low: float
    high: float
    p_value: float
    """Two-sided, from the resamples that lie on the other side of 0; never below 2 / (resamples + 1)."""
    num_seeds: int
    num_items: int
    confidence: float
    seeds_resampled: bool
    """False: the interval says nothing about other seeds than these."""

    def __str__(self) -> str:
        over = "items and seeds" if self.seeds_resampled else "items"
        sizes = f"{self.num_items} items × {self.num_seeds} seeds, over {over}"
        return f"{self.difference:+.3f} [{self.low:+.3f}, {self.high:+.3f}], p = {self.p_value:.3g}, {sizes}"


def paired_bootstrap(
    first_si: ArrayLike, second_si: ArrayLike, confidence: float = 0.95, *, resample_seeds: bool = True, seed: int = 0
) -> SeededDifference:
    """Interval of the mean of d = second − first over seeds s and items i, by resampling what repeats.

    first_si, second_si: [seeds, items], right (1) or wrong (0), or any score; row s of both comes from one seed, column i is one item.
    A resample draws items with replacement, the same for both strategies and all seeds, and, if resample_seeds, seeds as well,
    independently of the items: the bootstrap of a crossed array (Owen 2007, "The pigeonhole bootstrap", Annals of Applied Statistics
    1, 386). Percentile limits; p = 2 min(P(d* ≤ 0), P(d* ≥ 0)), each counted with + 1 (Davison & Hinkley 1997, section 4.2).

    Both ways of resampling shake what belongs to neither seed nor item (σ²_rest of `variance_components`), so that it counts up to
    three times: the interval is rather too wide where seeds agree little about items. What is due to the seeds alone is too small by
    (S − 1)/S, as in every bootstrap. One seed cannot be resampled, and is not: seeds_resampled says so. Where no score differs the
    interval has no width, which says nothing about new items.

    Raises ValueError unless both are arrays of one shape [≥ 1, ≥ 2] of finite numbers.
    """
    _check_confidence(confidence)
    change_si = _differences(first_si, second_si)
    seeds, items = change_si.shape
    generator = np.random.default_rng(seed)
    resample_seeds = resample_seeds and seeds > 1
    means = []
    for _ in range(BOOTSTRAP_RESAMPLES // 1000):  # 1,000 × 1,319 items × 3 seeds × 8 bytes = 32 MB at a time
        mean_sb = change_si[:, generator.integers(items, size=(1000, items))].mean(axis=2)
        if resample_seeds:
            mean_sb = np.take_along_axis(mean_sb, generator.integers(seeds, size=(seeds, 1000)), axis=0)
        means.append(mean_sb.mean(axis=0))
    resampled = np.concatenate(means)
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    # 1e-12: sums of the same numbers in another order may miss 0 by a rounding
    beyond = min(int((resampled <= 1e-12).sum()), int((resampled >= -1e-12).sum()))
    p_value = min(1.0, 2 * (beyond + 1) / (len(resampled) + 1))
    return SeededDifference(float(change_si.mean()), float(low), float(high), p_value, seeds, items, confidence, resample_seeds)


def _differences(first_si: ArrayLike, second_si: ArrayLike) -> NDArray[np.float64]:
    first, second = np.asarray(first_si, dtype=np.float64), np.asarray(second_si, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 2 or first.shape[0] < 1 or first.shape[1] < 2:
        raise ValueError(f"a paired comparison needs two arrays [seeds, items] of one shape, got {first.shape} and {second.shape}")
    change_si = second - first
    if bad := int((~np.isfinite(change_si)).sum()):
        raise ValueError(f"{bad} of {change_si.size} paired scores are NaN or infinite")
    return change_si


@dataclass(frozen=True, slots=True)
class HolmTest:
    """Many comparisons, judged together."""

    adjusted: tuple[float, ...]
    """p-values that may each be compared with alpha, in the order given."""
    rejected: tuple[bool, ...]
    alpha: float
    """Probability of even one false rejection, at most, whatever the dependence between the comparisons."""


def holm(p_values: Sequence[float], alpha: float = 0.05) -> HolmTest:
    """Holm's step-down correction (Holm 1979, Scandinavian Journal of Statistics 6, 65).

    Raises ValueError for no p-values or one outside [0, 1].
    """
    _check_confidence(1 - alpha)
    if not p_values or not all(0 <= p <= 1 for p in p_values):
        raise ValueError(f"Holm's correction needs p-values between 0 and 1, got {list(p_values)}")
    rejected, adjusted, _, _ = multipletests(list(p_values), alpha=alpha, method="holm")
    return HolmTest(tuple(float(p) for p in adjusted), tuple(bool(r) for r in rejected), alpha)


def items_needed(difference: float, discordance: float, *, power: float = 0.8, alpha: float = 0.05) -> int:
    """Items on which two strategies (one seed) must be compared for McNemar's test to find a gap, with this power.

        n = (z_{1−α/2} √ψ + z_power √(ψ − δ²))² / δ²            (Connor 1987, Biometrics 43, 207)

    difference: δ, of the two accuracies. discordance: ψ, fraction of items that exactly one of the two gets right.
    The exact test, which is what `paired_test` makes, is conservative: by enumeration it needs 1.5/δ to 1.8/δ items more.

    Raises ValueError unless 0 < |δ| ≤ ψ ≤ 1 and power and alpha lie between 0 and 1.
    """
    if not 0 < abs(difference) <= discordance <= 1:
        raise ValueError(f"difference = {difference} and discordance = {discordance}: 0 < |difference| <= discordance <= 1 is needed")
    z_alpha, z_power = _quantiles(power, alpha)
    return ceil(((z_alpha * sqrt(discordance) + z_power * sqrt(discordance - difference**2)) / difference) ** 2)


def _quantiles(power: float, alpha: float) -> tuple[float, float]:
    _check_confidence(power)
    _check_confidence(1 - alpha)
    return float(norm.ppf(1 - alpha / 2)), float(norm.ppf(power))


@dataclass(frozen=True, slots=True)
class VarianceComponents:
    """Of d_si = μ + seed_s + item_i + rest_si, the paired difference of one seed on one item."""

    seeds: float
    """How much one strategy's lead differs from seed to seed, over all items."""
    items: float
    """How much it differs from item to item, over all seeds."""
    rest: float

    def of_mean(self, num_seeds: int, num_items: int) -> float:
        """Variance of the mean difference: σ²_seeds / S + σ²_items / I + σ²_rest / (S I)."""
        return self.seeds / num_seeds + self.items / num_items + self.rest / (num_seeds * num_items)


def variance_components(first_si: ArrayLike, second_si: ArrayLike) -> VarianceComponents:
    """The components of second − first [seeds, items], from the mean squares of a two-way layout with random rows and columns.

        σ²_rest = MS_rest,   σ²_seeds = (MS_seeds − MS_rest) / I,   σ²_items = (MS_items − MS_rest) / S

    (Searle, Casella & McCulloch 1992, "Variance Components", chapter 4; a negative estimate counts as 0.)
    Raises ValueError below two seeds, and as `paired_bootstrap`.
    """
    change_si = _differences(first_si, second_si)
    seeds, items = change_si.shape
    if seeds < 2:
        raise ValueError("variance between seeds cannot be estimated from one seed")
    mean_s, mean_i, mean = change_si.mean(axis=1), change_si.mean(axis=0), change_si.mean()
    rest_si = change_si - mean_s[:, None] - mean_i[None, :] + mean
    ms_seeds = items * ((mean_s - mean) ** 2).sum() / (seeds - 1)
    ms_items = seeds * ((mean_i - mean) ** 2).sum() / (items - 1)
    ms_rest = (rest_si**2).sum() / ((seeds - 1) * (items - 1))
    return VarianceComponents(
        seeds=max(0.0, float(ms_seeds - ms_rest) / items),
        items=max(0.0, float(ms_items - ms_rest) / seeds),
        rest=float(ms_rest),
    )


@dataclass(frozen=True, slots=True)
class Design:
    """How large an experiment must be to find a gap."""

    difference: float
    num_seeds: int
    num_items: int
    power: float
    alpha: float

    def __str__(self) -> str:
        rule = f"(power {self.power:g}, alpha {self.alpha:g})"
        return f"a gap of {self.difference:+.3f} needs {self.num_items:,} items × {self.num_seeds} seeds {rule}"


def items_for_seeds(
    difference: float, components: VarianceComponents, num_seeds: int, *, power: float = 0.8, alpha: float = 0.05
) -> Design:
    """Items with which a two-sided z test on num_seeds seeds finds `difference`: Var(mean) ≤ (δ / (z_{1−α/2} + z_power))².

    Two normal tails, as for any mean (Lachin 1981, Controlled Clinical Trials 2, 93); with z for t, few seeds need somewhat more.
    Raises ValueError: difference 0, and when the seeds alone leave too much variance, however many the items.
    """
    allowed = _allowed_variance(difference, power, alpha)
    for_items = allowed - components.seeds / num_seeds
    if for_items <= 0:
        fewest = floor(components.seeds / allowed) + 1
        raise ValueError(f"no number of items finds a gap of {difference:+.3f} with {num_seeds} seeds: at least {fewest} seeds are needed")
    return Design(difference, num_seeds, max(1, ceil((components.items + components.rest / num_seeds) / for_items)), power, alpha)


def seeds_for_items(
    difference: float, components: VarianceComponents, num_items: int, *, power: float = 0.8, alpha: float = 0.05
) -> Design:
    """The other way round: seeds that a benchmark of num_items items takes. Raises ValueError when no number of seeds would do."""
    allowed = _allowed_variance(difference, power, alpha)
    for_seeds = allowed - components.items / num_items
    if for_seeds <= 0:
        fewest = floor(components.items / allowed) + 1
        raise ValueError(f"no number of seeds finds a gap of {difference} on {num_items} items: at least {fewest} items are needed")
    return Design(difference, max(1, ceil((components.seeds + components.rest / num_items) / for_seeds)), num_items, power, alpha)


def _allowed_variance(difference: float, power: float, alpha: float) -> float:
    if difference == 0:
        raise ValueError("a difference of 0 cannot be found, however large the experiment")
    return (difference / sum(_quantiles(power, alpha))) ** 2


@dataclass(frozen=True, slots=True)
class Correlation:
    """Of two series of n numbers."""

    value: float
    low: float
    high: float
    p_value: float
    n: int
    method: str
    confidence: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}], {self.method}, n = {self.n}"


def correlation(x: Sequence[float], y: Sequence[float], method: str = "pearson", confidence: float = 0.95) -> Correlation:
    """Correlation with an interval by Fisher's z: tanh(atanh r ± z √v).

    pearson: v = 1 / (n − 3) (Fisher 1921). spearman: v = (1 + r²/2) / (n − 3) (Bonett & Wright 2000, Psychometrika 65, 23).
    The interval takes the pairs for independent draws; layers of one model are neighbours, so it is rather too narrow for profiles.

    Raises ValueError: another method, lengths that differ, fewer than 4 pairs, a number that is not finite, a series without spread.
    """
    _check_confidence(confidence)
    if method not in ("pearson", "spearman"):
        raise ValueError(f"correlation {method!r} is unknown; there are pearson and spearman")
    if len(x) != len(y) or len(x) < 4:
        raise ValueError(f"a correlation with an interval needs at least 4 pairs, got {len(x)} and {len(y)} numbers")
    if not (np.isfinite(x).all() and np.isfinite(y).all()) or np.ptp(x) == 0 or np.ptp(y) == 0:
        raise ValueError("a correlation needs finite numbers that are not all the same")
    result = (pearsonr if method == "pearson" else spearmanr)(x, y)
    r = float(result.statistic)
    variance = (1.0 if method == "pearson" else 1 + r * r / 2) / (len(x) - 3)
    reach = float(norm.ppf((1 + confidence) / 2)) * sqrt(variance)
    centre = atanh(r) if abs(r) < 1 else inf * r
    return Correlation(r, tanh(centre - reach), tanh(centre + reach), float(result.pvalue), len(x), method, confidence)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence = {confidence} must lie strictly between 0 and 1")
