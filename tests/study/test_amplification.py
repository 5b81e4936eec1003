"""The √r law and the paper's ratio, on profiles whose truth is planted."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from fastlora.allocation import allocate
from fastlora.analysis.gradient_profile import LayerNorms
from fastlora.study.amplification import SAME_BUDGET, Profiled, amplification_claims, sqrt_law_claim

LAYERS, STEPS, RANK = 30, 48, 16
TRUE_L = 1 + np.linspace(0, 1.2, LAYERS) ** 2


def noisy_shares(true_l: NDArray[np.float64], rng: np.random.Generator, noise: float) -> NDArray[np.float64]:
    """[l, s]: a layer's own lasting deviation in this run, and noise from step to step."""
    norms_ls = true_l[:, None] * np.exp(noise * rng.standard_normal((LAYERS, 1)) + noise * rng.standard_normal((LAYERS, STEPS)))
    return np.asarray(norms_ls / norms_ls.sum(axis=0))


def profiled(strategy: str, *, exponent: float, noise: float, seed: int = 0, own_profile: bool = False) -> Profiled:
    """A cell whose norms go as r^exponent, ranks chosen by the profile of another run, or of the uniform run that it is compared with."""
    rng = np.random.default_rng(seed)
    uniform_ls = noisy_shares(TRUE_L, rng, noise)
    chooses_ls = uniform_ls if own_profile else noisy_shares(TRUE_L, rng, noise)
    ranks_l = allocate(strategy, chooses_ls.mean(axis=1).tolist(), LAYERS * RANK, r_min=4, r_max=64, seed=seed)
    true_l = TRUE_L * (np.array(ranks_l) / RANK) ** exponent
    shares_ls = noisy_shares(true_l, rng, noise)
    norms = LayerNorms(np.arange(LAYERS, dtype=np.int32), np.arange(STEPS, dtype=np.int32), shares_ls)
    of = {"raw": shares_ls, "delta_w": noisy_shares(TRUE_L, rng, noise)}
    return Profiled(strategy, seed, ranks_l, norms, of, {"raw": uniform_ls, "delta_w": uniform_ls}, (RANK,) * LAYERS)


def test_without_noise_the_excess_is_the_exponent_s_own() -> None:
    for exponent in (0.0, 0.5, 0.8):
        one = profiled("random", exponent=exponent, noise=0.0)
        reach = np.log(max(one.ranks_l) / min(one.ranks_l))
        assert one.excess(np.arange(STEPS)) == pytest.approx((exponent - 0.5) * reach, abs=1e-12)


@pytest.mark.parametrize(("exponent", "verdict"), [(0.5, "supported"), (0.8, "not supported"), (0.2, "not supported")])
def test_the_law_is_decided_by_all_layers_of_all_strategies(exponent: float, verdict: str) -> None:
    seeds = {0: SAME_BUDGET, 1: ("proportional", "random")}
    runs = [profiled(name, exponent=exponent, noise=0.03, seed=seed) for seed, names in seeds.items() for name in names]
    claim = sqrt_law_claim(runs)
    assert claim.verdict == verdict
    mean = np.mean([np.mean([one.excess(np.arange(STEPS)) for one in runs if one.seed == seed]) for seed in seeds])
    assert claim.measured.startswith(f"{mean:.3g} ".replace("-", "−")), "a seed counts once, however many strategies it has"
    assert "proportional, shuffled-proportional, inverse-proportional, random ranks, seed 0, 1 (" in claim.test


def test_what_the_cells_of_a_seed_share_is_not_averaged_out() -> None:
    """Four cells that are one: the interval of their mean is the interval of one."""
    one = profiled("random", exponent=0.5, noise=0.2)
    assert sqrt_law_claim([one] * 4).measured == sqrt_law_claim([one]).measured


@pytest.mark.parametrize("own_profile", [False, True])
def test_ranks_by_the_compared_profile_regress_to_its_mean(own_profile: bool) -> None:
    """√r alone, and a lasting deviation of each run: what the study would see if the uniform run's own profile chose the ranks."""
    mean = {
        strategy: np.mean(
            [profiled(strategy, exponent=0.5, noise=0.2, seed=seed, own_profile=own_profile).excess(np.arange(STEPS)) for seed in range(20)]
        )
        for strategy in ("proportional", "inverse-proportional", "random")
    }
    assert abs(mean["random"]) < 0.2  # 4 standard errors
    assert (mean["proportional"] < -0.2) == (mean["inverse-proportional"] > 0.2) == own_profile


@pytest.mark.parametrize(
    ("exponent", "verdicts"),
    [
        (0.5, ["supported", "not supported", "not supported"]),  # the paper's numbers
        (0.9, ["supported", "supported", "not supported"]),
    ],
)
def test_the_paper_s_claims(exponent: float, verdicts: list[str]) -> None:
    claims = amplification_claims([profiled("proportional", exponent=exponent, noise=0.01, seed=seed) for seed in (0, 1)])
    assert [claim.verdict for claim in claims] == verdicts
