"""The statistics against enumeration, published values and the bootstrap."""

from __future__ import annotations

import random
from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom, bootstrap, norm, pearsonr, spearmanr
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm

from fastlora.statistics import (
    VarianceComponents,
    correlation,
    holm,
    items_for_seeds,
    items_needed,
    paired_bootstrap,
    paired_test,
    pass_at_k,
    proportion_interval,
    seeds_for_items,
    variance_components,
)
from tests.tolerances import BOOTSTRAP_LIMIT, FP64_EXACT, PUBLISHED_4_DIGITS


def answers(both: int, gained: int, lost: int, neither: int) -> tuple[list[bool], list[bool]]:
    """Two shuffled answer sheets with the given fourfold table."""
    pairs = [(True, True)] * both + [(False, True)] * gained + [(True, False)] * lost + [(False, False)] * neither
    random.Random(0).shuffle(pairs)
    return [b for b, _ in pairs], [a for _, a in pairs]


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 10), (7, 10), (136, 256), (1319, 1319)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_wilson_limits_are_where_the_score_test_just_accepts(successes: int, n: int, confidence: float) -> None:
    """Definition: at a limit p, |p̂ − p| = z √(p (1 − p) / n)."""
    result = proportion_interval(successes, n, confidence)
    z = norm.ppf(0.5 + confidence / 2)
    for p in (result.low, result.high):
        assert (result.value - p) ** 2 == pytest.approx(z * z * p * (1 - p) / n, abs=FP64_EXACT)
    assert 0 <= result.low <= result.value <= result.high <= 1
    assert (result.successes, result.n, result.confidence) == (successes, n, confidence)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (0, 5), (9, 3), (41, 12)])
def test_mcnemar_is_the_exact_sign_test(gained: int, lost: int) -> None:
    n = gained + lost
    tail = sum(Fraction(comb(n, i), 2**n) for i in range(min(gained, lost) + 1))
    before, after = answers(both=31, gained=gained, lost=lost, neither=17)
    result = paired_test(before, after)
    assert result.p_value == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=FP64_EXACT)
    assert (result.gained, result.lost, result.n) == (gained, lost, 48 + n)


def test_newcombe_interval_of_the_published_example() -> None:
    """Newcombe 1998, method 10, table 20 / 12 / 2 / 16: 0.2000, lower limit 0.0562."""
    result = paired_test(*answers(both=20, gained=12, lost=2, neither=16))
    assert result.difference == pytest.approx(0.2)
    assert result.low == pytest.approx(0.0562, abs=PUBLISHED_4_DIGITS)


@pytest.mark.parametrize("table", [(700, 320, 180, 119), (300, 90, 310, 619), (40, 600, 550, 129)])
def test_newcombe_interval_agrees_with_the_bootstrap_on_many_problems(table: tuple[int, int, int, int]) -> None:
    before, after = answers(*table)
    result = paired_test(before, after)
    change = np.array(after, dtype=float) - np.array(before, dtype=float)
    oracle = bootstrap((change,), np.mean, method="percentile", batch=500, rng=1).confidence_interval
    assert (result.low, result.high) == pytest.approx((oracle.low, oracle.high), abs=BOOTSTRAP_LIMIT)


def test_no_change_is_not_certainty() -> None:
    result = paired_test([True] * 30 + [False] * 34, [True] * 30 + [False] * 34)
    assert result.p_value == 1.0
    assert result.low < 0.0 < result.high


def test_swapping_before_and_after_mirrors_the_interval() -> None:
    before, after = answers(20, 12, 2, 16)
    there, back = paired_test(before, after), paired_test(after, before)
    assert (back.low, back.high, back.p_value) == pytest.approx((-there.high, -there.low, there.p_value))
    assert (back.gained, back.lost) == (there.lost, there.gained)


@pytest.mark.parametrize("num_samples", [1, 2, 5, 6])
def test_pass_at_k_counts_every_draw(num_samples: int) -> None:
    num_correct = [*range(num_samples + 1), 0, num_samples]
    for k in range(1, num_samples + 1):
        draws = [any(i < correct for i in draw) for correct in num_correct for draw in combinations(range(num_samples), k)]
        result = pass_at_k(num_samples, num_correct, k)
        assert result.value == pytest.approx(sum(draws) / len(draws), rel=FP64_EXACT)
        assert result.low <= result.value <= result.high


def test_pass_at_k_interval_is_over_problems() -> None:
    """pass@1 with all-or-nothing problems is a plain proportion: the two intervals must then agree."""
    num_correct = [4] * 400 + [0] * 600
    result, wilson = pass_at_k(4, num_correct, 1), proportion_interval(400, 1000)
    assert (result.low, result.high) == pytest.approx((wilson.low, wilson.high), abs=BOOTSTRAP_LIMIT)
    assert result == pass_at_k(4, num_correct, 1), "the same seed must repeat"


def crossed(seeds: int, items: int, components: VarianceComponents, mean: float, generator: np.random.Generator) -> np.ndarray:
    """[seeds, items] of μ + seed + item + rest with these variances."""
    return (
        mean
        + generator.normal(0, components.seeds**0.5, (seeds, 1))
        + generator.normal(0, components.items**0.5, (1, items))
        + generator.normal(0, components.rest**0.5, (seeds, items))
    )


def test_bootstrap_over_items_agrees_with_scipy_and_with_newcombe() -> None:
    before, after = answers(700, 320, 180, 119)
    result = paired_bootstrap([before], [after])
    change = np.array(after, dtype=float) - np.array(before, dtype=float)
    oracle = bootstrap((change,), np.mean, method="percentile", batch=500, rng=1).confidence_interval
    newcombe = paired_test(before, after)
    assert result.difference == pytest.approx(newcombe.difference, rel=FP64_EXACT)
    assert (result.low, result.high) == pytest.approx((oracle.low, oracle.high), abs=BOOTSTRAP_LIMIT)
    assert (result.low, result.high) == pytest.approx((newcombe.low, newcombe.high), abs=BOOTSTRAP_LIMIT)
    assert (result.num_seeds, result.num_items, result.seeds_resampled) == (1, 1319, False)
    assert result == paired_bootstrap([before], [after]), "the same seed must repeat"


def test_seeds_are_repeated_measures() -> None:
    """Three seeds with the same answers are one seed's worth of items, not three: repeating rows must not narrow the interval."""
    before, after = answers(700, 320, 180, 119)
    once, thrice = paired_bootstrap([before], [after]), paired_bootstrap([before] * 3, [after] * 3)
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high), abs=BOOTSTRAP_LIMIT)


@pytest.mark.parametrize("resample_seeds", [True, False])
def test_the_bootstrap_variance_is_that_of_the_pigeonhole(resample_seeds: bool) -> None:
    """Exact variance of the resampled means of a fixed array: of items, of seeds, and of what is left, which both shake."""
    d_si = crossed(4, 300, VarianceComponents(0.02, 0.3, 0.5), 0.1, np.random.default_rng(2))
    seeds, items = d_si.shape
    over_items = ((d_si.mean(axis=0) - d_si.mean()) ** 2).sum() / items**2
    over_seeds = ((d_si.mean(axis=1) - d_si.mean()) ** 2).sum() / seeds**2
    rest = ((d_si - d_si.mean(0) - d_si.mean(1)[:, None] + d_si.mean()) ** 2).sum() / (seeds * items) ** 2
    variance = over_items + over_seeds + rest if resample_seeds else over_items
    result = paired_bootstrap(np.zeros_like(d_si), d_si, resample_seeds=resample_seeds)
    reach = norm.ppf(0.975) * variance**0.5
    if not resample_seeds:
        assert (result.low, result.high) == pytest.approx((d_si.mean() - reach, d_si.mean() + reach), abs=BOOTSTRAP_LIMIT)
    else:  # 4 seeds: not quite normal
        assert result.high - result.low == pytest.approx(2 * reach, rel=0.05)
    assert result.seeds_resampled is resample_seeds


def test_the_p_value_of_the_bootstrap() -> None:
    before, after = answers(700, 320, 180, 119)
    assert paired_bootstrap([before], [after]).p_value == pytest.approx(2 / 10_001, rel=FP64_EXACT), "6 standard errors from 0"
    assert paired_bootstrap([before], [before]).p_value == 1
    before, after = answers(900, 120, 100, 199)  # z = 20 / √220
    result = paired_bootstrap([before], [after])
    assert result.p_value == pytest.approx(2 * norm.sf(20 / 220**0.5), abs=0.02)
    mirrored = paired_bootstrap([after], [before])
    assert (mirrored.low, mirrored.high) == pytest.approx((-result.high, -result.low), rel=1e-9)
    assert mirrored.p_value == result.p_value


@pytest.mark.parametrize("p_values", [[0.01, 0.04, 0.03, 0.005], [0.5], [0.2, 0.2, 0.2], [0.0, 1.0, 0.012, 0.011, 0.5]])
def test_holm_by_its_definition(p_values: list[float]) -> None:
    """The i-th smallest times (m − i + 1), never below its predecessor, at most 1; reject until the first that is too large."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        worst = adjusted[index] = max(worst, min(1.0, p_values[index] * (len(p_values) - rank)))
    result = holm(p_values)
    assert result.adjusted == pytest.approx(adjusted, rel=FP64_EXACT)
    assert result.rejected == tuple(p <= 0.05 for p in adjusted)


def power_of_mcnemar(n: int, difference: float, discordance: float) -> float:
    """Of the test z² = (b − c)² / (b + c) at 5 %, by enumeration of all numbers of discordant items and of gains among them."""
    total = 0.0
    for discordant in range(1, n + 1):
        if (weight := binom.pmf(discordant, n, discordance)) < 1e-9:
            continue
        gained = np.arange(discordant + 1)
        rejects = (2 * gained - discordant) ** 2 >= norm.ppf(0.975) ** 2 * discordant
        total += weight * binom.pmf(gained, discordant, (discordance + difference) / (2 * discordance))[rejects].sum()
    return total


@pytest.mark.parametrize(("difference", "discordance"), [(0.05, 0.2), (-0.1, 0.3), (0.045, 0.25)])
def test_items_needed_give_the_power(difference: float, discordance: float) -> None:
    n = items_needed(difference, discordance)
    assert n == items_needed(-difference, discordance)
    assert power_of_mcnemar(n, difference, discordance) == pytest.approx(0.8, abs=0.012)
    assert power_of_mcnemar(n // 2, difference, discordance) < 0.6


def test_the_published_gap_is_undecidable_on_200_items() -> None:
    """149 against 140 right of 200 (arXiv 2605.07366): at the discordance of two such models the gap needs some thousand items."""
    assert 900 < items_needed(0.045, 0.25) < 1000


def test_variance_components_are_those_of_the_anova_table() -> None:
    d_si = crossed(3, 40, VarianceComponents(2.0, 0.5, 1.0), 0.3, np.random.default_rng(0))
    seeds, items = d_si.shape
    seed_of, item_of = np.indices(d_si.shape).reshape(2, -1)
    table = anova_lm(ols("d ~ C(s) + C(i)", pd.DataFrame({"d": d_si.ravel(), "s": seed_of, "i": item_of})).fit())
    ms_seeds, ms_items, ms_rest = table["mean_sq"]
    result = variance_components(np.zeros_like(d_si), d_si)
    assert result.rest == pytest.approx(ms_rest, rel=1e-9)
    assert result.items == pytest.approx((ms_items - ms_rest) / seeds, rel=1e-9)
    assert result.seeds == pytest.approx((ms_seeds - ms_rest) / items, rel=1e-9)


def test_variance_components_are_found_again() -> None:
    truth = VarianceComponents(seeds=0.04, items=0.3, rest=0.5)
    generator = np.random.default_rng(1)
    found = [variance_components(np.zeros((6, 80)), crossed(6, 80, truth, 0, generator)) for _ in range(400)]
    for part in ("seeds", "items", "rest"):
        assert np.mean([getattr(one, part) for one in found]) == pytest.approx(getattr(truth, part), rel=0.1), part


def test_a_negative_component_counts_as_none() -> None:
    d_si = np.array([[1.0, -1.0, 1.0, -1.0], [-1.0, 1.0, -1.0, 1.0]])
    assert variance_components(np.zeros_like(d_si), d_si) == VarianceComponents(0.0, 0.0, 8 / 3)


def test_a_design_has_its_power() -> None:
    """4,000 experiments of the size asked for: z tests with the known variance find the gap in 80 % of them."""
    components, gap = VarianceComponents(seeds=4e-4, items=0.1, rest=0.3), 0.05
    design = items_for_seeds(gap, components, 5)
    assert components.of_mean(5, design.num_items) <= (gap / (norm.ppf(0.975) + norm.ppf(0.8))) ** 2
    assert components.of_mean(5, design.num_items - 1) > (gap / (norm.ppf(0.975) + norm.ppf(0.8))) ** 2
    generator = np.random.default_rng(0)
    means = np.array([crossed(5, design.num_items, components, gap, generator).mean() for _ in range(1000)])
    found = np.abs(means) > norm.ppf(0.975) * components.of_mean(5, design.num_items) ** 0.5
    assert found.mean() == pytest.approx(0.8, abs=0.04)  # three standard errors of 1,000
    back = seeds_for_items(gap, components, design.num_items)
    assert back.num_seeds == 5
    assert str(design) == f"a gap of +0.050 needs {design.num_items:,} items × 5 seeds (power 0.8, alpha 0.05)"


def test_a_design_without_seed_variance_is_the_paired_one() -> None:
    """One seed, d in {−1, 0, 1}: variance ψ − δ² a problem; Connor's formula differs only by ψ under the null."""
    design = items_for_seeds(0.05, VarianceComponents(0.0, 0.2 - 0.05**2, 0.0), 1)
    assert design.num_items == pytest.approx(items_needed(0.05, 0.2), rel=0.02)


@pytest.mark.parametrize("n", [5, 28, 200])
def test_pearson_interval_is_scipys(n: int) -> None:
    x, noise = np.random.default_rng(n).standard_normal((2, n))
    result, oracle = correlation(x, x + noise), pearsonr(x, x + noise)
    limits = oracle.confidence_interval(0.95)
    assert (result.value, result.p_value) == pytest.approx((oracle.statistic, oracle.pvalue), rel=FP64_EXACT)
    assert (result.low, result.high) == pytest.approx((limits.low, limits.high), rel=1e-9)


def test_spearman_interval_covers() -> None:
    """ρ = .8 of normals: Spearman's is 6/π asin(ρ/2); 95 % intervals of 28 layers hold it in about 95 % of 1,000 draws."""
    truth, generator, held = 6 / np.pi * np.arcsin(0.4), np.random.default_rng(0), 0
    for _ in range(1000):
        x, noise = generator.standard_normal((2, 28))
        result = correlation(x, 0.8 * x + 0.6 * noise, "spearman")
        held += result.low <= truth <= result.high
    assert result.value == pytest.approx(spearmanr(x, 0.8 * x + 0.6 * noise).statistic, rel=FP64_EXACT)
    assert 0.93 < held / 1000 < 0.975


@pytest.mark.parametrize("method", ["pearson", "spearman"])
def test_perfect_correlation(method: str) -> None:
    for sign in (1, -1):
        result = correlation([1, 2, 3, 5], [sign * 2 * x for x in (1, 2, 3, 5)], method)
        assert (result.value, result.low, result.high) == pytest.approx((sign, sign, sign))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: proportion_interval(3, 0), "3 successes of 0"),
        (lambda: proportion_interval(4, 3), "4 successes of 3"),
        (lambda: proportion_interval(1, 3, 95), "confidence = 95"),
        (lambda: paired_test([True], []), "1 before and 0 after"),
        (lambda: paired_test([], []), "0 before and 0 after"),
        (lambda: pass_at_k(4, [1, 2], 5), "pass@5 needs 1 <= k <= 4"),
        (lambda: pass_at_k(4, [1, 5], 2), "between 0 and 4, got"),
        (lambda: pass_at_k(4, [], 2), "at least two problems.*got 0"),
        (lambda: pass_at_k(4, [2], 2), "at least two problems.*got 1"),
        (lambda: paired_bootstrap([[1, 0]], [[1, 0], [1, 1]]), r"of one shape, got \(1, 2\) and \(2, 2\)"),
        (lambda: paired_bootstrap([1, 0], [1, 0]), r"two arrays \[seeds, items\] of one shape, got \(2,\)"),
        (lambda: paired_bootstrap([[1]], [[0]]), r"got \(1, 1\)"),
        (lambda: paired_bootstrap([[1, float("nan")]], [[1, 0]]), "1 of 2 paired scores are NaN"),
        (lambda: variance_components([[1, 0]], [[0, 0]]), "cannot be estimated from one seed"),
        (lambda: holm([]), "needs p-values between 0 and 1"),
        (lambda: holm([0.5, float("nan")]), "needs p-values between 0 and 1"),
        (lambda: holm([0.5], 1.5), "must lie strictly between"),
        (lambda: items_needed(0.0, 0.2), r"0 < \|difference\| <= discordance"),
        (lambda: items_needed(0.3, 0.2), "difference = 0.3 and discordance = 0.2"),
        (lambda: items_needed(0.1, 0.2, power=1.0), "must lie strictly between"),
        (lambda: items_for_seeds(0.0, VarianceComponents(0, 1, 1), 3), "a difference of 0 cannot be found"),
        (lambda: items_for_seeds(0.05, VarianceComponents(0.01, 1, 1), 3), "with 3 seeds: at least 32 seeds are needed"),
        (lambda: seeds_for_items(0.05, VarianceComponents(0, 1, 1), 1319), "on 1319 items: at least 3140 items are needed"),
        (lambda: correlation([1, 2, 3], [1, 2, 3]), "at least 4 pairs, got 3 and 3"),
        (lambda: correlation([1, 2, 3, 4], [1, 1, 1, 1]), "not all the same"),
        (lambda: correlation([1, 2, 3, 4], [1, 2, 3, float("nan")]), "finite numbers"),
        (lambda: correlation([1, 2, 3, 4], [1, 2, 3, 5], "kendall"), "'kendall' is unknown"),
    ],
)
def test_nonsense_is_refused(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()
