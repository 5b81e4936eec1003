"""Ranks from scores: budgets held exactly, the nearest vector by enumeration, every impossible wish named with its numbers."""

from __future__ import annotations

import math
import re
from collections import Counter
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from fastlora.allocation import (
    STRATEGIES,
    allocate,
    layer_scores,
    modules_by_layer,
    rank_pattern,
    reduced_budget,
    share_ratio,
    sqrt_rank_shares,
)
from fastlora.config import ConfigError, LoraConfig
from fastlora.lora.patterns import ProjectionShape, resolve
from tests.tolerances import FP64_EXACT

MODULES = [f"model.layers.{layer}.{kind}" for layer in range(12) for kind in ("self_attn.q_proj", "mlp.down_proj")]


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """A profile, bounds, a granularity and a budget that can be met."""
    layers, granularity = draw(st.integers(1, 40)), draw(st.sampled_from([1, 4, 8, 16]))
    low, span = draw(st.integers(0, 4)), draw(st.integers(0, 30))
    units = draw(st.integers(layers * low, layers * (low + span)))
    score = st.one_of(st.floats(1e-9, 1e9), st.just(0.0), st.sampled_from([1.0, 2.0]))
    scores = draw(st.lists(score, min_size=layers, max_size=layers))
    if not any(scores):
        scores[0] = 1.0
    return {
        "scores_l": scores,
        "budget": units * granularity,
        "r_min": low * granularity,
        "r_max": (low + span) * granularity,
        "granularity": granularity,
        "seed": draw(st.integers(0, 5)),
        "power": draw(st.sampled_from([0.0, 0.5, 1.0, 3.0])),
    }


@given(problems(), st.sampled_from(list(STRATEGIES)))
@settings(max_examples=300, deadline=None)
def test_every_budget_is_hit_exactly(problem: dict[str, Any], strategy: str) -> None:
    if strategy == "inverse-proportional":
        problem["scores_l"] = [score or 1.0 for score in problem["scores_l"]]
    ranks = allocate(strategy, fraction=1.0, **problem)
    assert sum(ranks) == problem["budget"]
    assert len(ranks) == len(problem["scores_l"])
    for rank in ranks:
        assert problem["r_min"] <= rank <= problem["r_max"]
        assert rank % problem["granularity"] == 0
        assert type(rank) is int
    assert ranks == allocate(strategy, fraction=1.0, **problem), "the same seed must repeat"


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=4),
    st.integers(0, 2),
    st.integers(0, 5),
    st.sampled_from([1, 4]),
    st.sampled_from([1, 2, -1]),
    st.data(),
)
@settings(max_examples=200, deadline=None)
def test_bounds_granularity_and_power_leave_it_the_nearest(
    scores: list[int], low: int, span: int, granularity: int, power: int, data: st.DataObject
) -> None:
    """By enumeration in exact fractions: nothing within the bounds and of this sum has a smaller Σ (r − q)². power −1 = the inverse."""
    units = data.draw(st.integers(len(scores) * low, len(scores) * (low + span)))
    weights = [Fraction(score) ** power for score in scores]
    quotas = [units * weight / sum(weights) for weight in weights]

    def distance(vector: tuple[int, ...]) -> Fraction:
        return sum(((x - q) ** 2 for x, q in zip(vector, quotas, strict=True)), Fraction(0))

    feasible = [vector for vector in product(range(low, low + span + 1), repeat=len(scores)) if sum(vector) == units]
    ranks = allocate(
        "inverse-proportional" if power < 0 else "proportional",
        [float(score) for score in scores],
        units * granularity,
        power=abs(power),
        r_min=low * granularity,
        r_max=(low + span) * granularity,
        granularity=granularity,
        seed=data.draw(st.integers(0, 3)),
    )
    assert distance(tuple(rank // granularity for rank in ranks)) <= min(map(distance, feasible)) + Fraction(1, 10**9)


@pytest.mark.parametrize(("low", "high"), [(0, 9), (1, 4)])
def test_proportional_is_the_nearest_vector_of_every_small_problem(low: int, high: int) -> None:
    """All scores 1..6 of three layers and all budgets up to 9, in whole numbers: Σ (r Σs − budget s)² is the least there is."""
    vectors: dict[int, list[tuple[int, ...]]] = {}
    for vector in product(range(low, high + 1), repeat=3):
        vectors.setdefault(sum(vector), []).append(vector)
    for scores in product(range(1, 7), repeat=3):
        for budget in range(3 * low, 10):

            def distance(vector: tuple[int, ...], scores: tuple[int, ...] = scores, budget: int = budget) -> int:
                return sum((r * sum(scores) - budget * s) ** 2 for r, s in zip(vector, scores, strict=True))

            ranks = allocate("proportional", scores, budget, r_min=low, r_max=high)
            assert distance(ranks) == min(map(distance, vectors[budget])), (scores, budget, ranks)


def test_largest_remainder_by_hand() -> None:
    """Hamilton's textbook case: 10 seats, votes 47, 16, 15.8, 12, 6.1, 3.1: quotas 4.7 1.6 1.58 1.2 .61 .31."""
    assert allocate("proportional", [47, 16, 15.8, 12, 6.1, 3.1], 10, r_min=0) == (5, 2, 1, 1, 1, 0)


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=30, unique=True), st.integers(0, 500), st.integers(0, 9))
@settings(deadline=None)
def test_order_and_seed_do_not_matter_without_ties(scores: list[int], spare: int, seed: int) -> None:
    """A layer's rank depends on its score, not on its place; a higher score never gets fewer ranks."""
    budget = len(scores) + spare
    ranks = allocate("proportional", scores, budget, r_min=1)
    by_score = sorted(zip(scores, ranks, strict=True))
    assert [rank for _, rank in by_score] == sorted(ranks)
    # two layers may still claim the last unit with the same remainder; then only the multiset is fixed
    turned = allocate("proportional", scores[::-1], budget, r_min=1, seed=seed)
    assert sorted(turned) == sorted(ranks)


def test_equal_claims_do_not_go_to_the_first_layers() -> None:
    """900 = 28 × 32 + 4 ranks over 28 equal layers: who gets the 4 depends on the seed, and over 400 seeds every layer does alike."""
    extra = np.zeros(28)
    for seed in range(400):
        ranks = np.array(allocate("uniform", [1.0] * 28, 900, seed=seed))
        assert sorted(set(ranks.tolist())) == [32, 33]
        extra += ranks - 32
    assert chisquare(extra).pvalue > 1e-3


def test_random_draws_every_allocation_alike() -> None:
    """4 layers of 1..4, Σ = 9: all vectors by enumeration, drawn 6,000 times."""
    feasible = [vector for vector in product(range(1, 5), repeat=4) if sum(vector) == 9]
    drawn = Counter(allocate("random", [1.0] * 4, 9, r_min=1, r_max=4, seed=seed) for seed in range(6000))
    assert set(drawn) == set(feasible)
    assert chisquare([drawn[vector] for vector in feasible]).pvalue > 1e-3


def test_random_of_the_paper() -> None:
    """16 to 48 and Σ = 896 over 28 layers; another seed, another draw; the scores have no say."""
    first, second = (allocate("random", [1.0] * 28, 896, r_min=16, r_max=48, seed=seed) for seed in (0, 1))
    assert sum(first) == sum(second) == 896
    assert first != second
    assert max(first) > 40
    assert min(first) < 24
    assert first == allocate("random", list(range(28)), 896, r_min=16, r_max=48, seed=0)


def test_shuffled_has_the_multiset_of_proportional_and_not_its_order() -> None:
    scores = list(np.random.default_rng(3).uniform(1, 3, 28))
    straight = allocate("proportional", scores, 896)
    shuffles = [allocate("shuffled-proportional", scores, 896, seed=seed) for seed in range(20)]
    assert all(sorted(shuffle) == sorted(straight) for shuffle in shuffles)
    assert len(set(shuffles)) == 20
    assert straight not in shuffles


@pytest.mark.parametrize(("granularity", "total"), [(1, 627), (4, 628), (8, 624), (16, 624)])
def test_reduced_spends_a_fraction(granularity: int, total: int) -> None:
    """.7 · 896 = 627.2, to the nearest multiple."""
    ranks = allocate("reduced", list(range(1, 29)), 896, fraction=0.7, granularity=granularity, r_min=0)
    assert sum(ranks) == total == reduced_budget(896, 0.7, granularity)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 20, "r_min": 8}, "a budget of 20 ranks is below 3 layers × r_min 8 = 24"),
        ({"budget": 60, "r_max": 16}, "a budget of 60 ranks is above 3 layers × r_max 16 = 48"),
        ({"budget": 50, "granularity": 8, "r_min": 8, "r_max": 64}, "the budget = 50 is no multiple of granularity = 8"),
        ({"granularity": 8, "r_min": 12, "r_max": 64}, "r_min = 12 is no multiple of granularity = 8"),
        ({"granularity": 8, "r_min": 8, "r_max": 60}, "r_max = 60 is no multiple of granularity = 8"),
        ({"r_min": 9, "r_max": 8}, "r_min = 9, r_max = 8"),
        ({"r_min": -1}, "r_min = -1"),
        ({"granularity": 0}, "granularity = 0"),
        ({"power": -1.0}, "power = -1.0 must be a finite number >= 0"),
        ({"power": math.nan}, "power = nan"),
        ({"scores_l": [1.0, math.nan, 1.0]}, "the score of layer 1 is nan"),
        ({"scores_l": [1.0, 2.0, -0.5]}, "the score of layer 2 is -0.5"),
        ({"scores_l": [1.0, math.inf, 1.0]}, "the score of layer 1 is inf"),
        ({"scores_l": []}, r"the scores have shape \[0\]"),
        ({"scores_l": [[1.0], [2.0]]}, r"the scores have shape \[2, 1\]"),
        ({"scores_l": [0.0] * 3}, "the scores of all 3 layers are 0"),
        ({"strategy": "inverse-proportional", "scores_l": [1.0, 0.0, 2.0]}, "the score of layer 1 is 0, which has no inverse"),
        ({"strategy": "reduced", "fraction": 0.0}, "fraction = 0.0 of the budget"),
        ({"strategy": "reduced", "fraction": 1.5}, "fraction = 1.5 of the budget"),
        ({"strategy": "reduced", "budget": 30, "r_min": 8}, "a budget of 21 ranks is below 3 layers × r_min 8 = 24"),
        ({"strategy": "proportoinal"}, "'proportoinal' is unknown; did you mean proportional"),
    ],
)
def test_the_impossible_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        allocate(**{"strategy": "proportional", "scores_l": [1.0, 2.0, 3.0], "budget": 48, **settings})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("[16, 16, 16]", None),
        ("__import__('numpy').array([8, 24, 16])", None),
        ("[16, 16]", "returned 2 of them where 3 ranks are needed"),
        ("None", "returned a NoneType where 3 ranks"),
        ("[16, 16, 15]", "gave layer 2 the rank 15; it must be a multiple of 8 within 8..32"),
        ("[0, 24, 24]", "gave layer 0 the rank 0; it must be a multiple of 8 within 8..32"),
        ("[16.0, 16.0, 16.0]", "gave layer 0 the rank 16.0"),
        ("[16, 16, 24]", "returned ranks that add up to 56, the budget is 48"),
    ],
)
def test_ones_own_allocator_is_held_to_the_same(tmp_path: Path, body: str, message: str | None) -> None:
    file = tmp_path / "own.py"
    file.write_text(f"def share(scores_l, budget, *, r_min, r_max, granularity, seed):\n    return {body}\n")

    def call() -> tuple[int, ...]:
        return allocate(f"{file}:share", [1.0, 2.0, 3.0], 48, r_min=8, r_max=32, granularity=8)

    if message is None:
        assert sum(call()) == 48
    else:
        with pytest.raises(ConfigError, match=rf"own.py:share {message}"):
            call()


def test_the_pattern_gives_each_layer_its_rank() -> None:
    """Through the strict resolver: layer 1's key must not catch layers 10 and 11, and every module is hit once."""
    ranks = tuple(range(1, 13))
    shapes = [ProjectionShape(name, 64, 64) for name in MODULES]
    config = LoraConfig(target_modules=("q_proj", "down_proj"), r=0, rank_pattern=rank_pattern(ranks, MODULES), rank_budget=2 * sum(ranks))
    assert {spec.name: spec.rank for spec in resolve(shapes, config)} == {name: ranks[int(name.split(".")[2])] for name in MODULES}


def test_the_pattern_means_the_same_to_peft() -> None:
    """PEFT's rule (facts of 0.21): re.match(rf"(.*\\.)?({key})$", name); each name is hit by its own key alone."""
    pattern = rank_pattern(range(12), MODULES)
    for name in MODULES:
        assert [rank for key, rank in pattern.items() if re.match(rf"(.*\.)?({key})$", name)] == [int(name.split(".")[2])]
        assert not any(re.match(rf"(.*\.)?({key})$", name.replace(".layers.", "Xlayers.")) for key in pattern)


def test_another_model_is_named() -> None:
    with pytest.raises(ConfigError, match="11 ranks for a model of 12 layers"):
        rank_pattern(range(11), MODULES)
    with pytest.raises(ConfigError, match="lm_head lies in no layer"):
        modules_by_layer([*MODULES, "lm_head"])
    with pytest.raises(ConfigError, match="layer 3 has no module"):
        modules_by_layer([name for name in MODULES if ".3." not in name])
    assert layer_scores({layer: layer / 2 for layer in reversed(range(12))}, MODULES, "p") == tuple(layer / 2 for layer in range(12))
    with pytest.raises(ConfigError, match=r"^p: the profile has 13 layers, 0 to 12; this model has 12, 0 to 11: it is of another model"):
        layer_scores(dict.fromkeys(range(13), 1.0), MODULES, "p")
    with pytest.raises(ConfigError, match="the profile has no layers"):
        layer_scores({}, MODULES, "p")


@pytest.mark.parametrize(("low", "high", "published"), [(20, 40, 3.07), (12, 31, 3.49)])
def test_sqrt_rank_predicts_the_published_ratios(low: int, high: int, published: float) -> None:
    """arXiv 2605.07366: ratio 2.17 at uniform ranks, strongest layer highest rank: √(40/20) and √(31/12) on top of it."""
    shares = sqrt_rank_shares([2.17, 1.5, 1.0], [32] * 3, [high, (low + high) // 2, low])
    assert share_ratio(shares) == pytest.approx(published, abs=0.005)
    assert sum(shares) == pytest.approx(1, rel=FP64_EXACT)


def test_the_prediction_against_gradients_of_random_matrices() -> None:
    """dB = s dYᵀ x Aᵀ with A as LoRA starts it: norms of ranks 8 and 32 differ by s √r, in every scale mode."""
    generator = np.random.default_rng(0)
    x_td, dy_tn = generator.standard_normal((64, 128)), generator.standard_normal((64, 96))
    for scaling, scale in (("constant", (1.0, 1.0)), ("alpha/r", (1 / 8, 1 / 32)), ("alpha/sqrt(r)", (8**-0.5, 32**-0.5))):
        norms = [
            np.mean([np.linalg.norm(s * dy_tn.T @ x_td @ generator.uniform(-1, 1, (r, 128)).T) for _ in range(50)])
            for s, r in zip(scale, (8, 32), strict=True)
        ]
        predicted = sqrt_rank_shares([0.5, 0.5], [8, 8], [8, 32], scaling)
        assert norms[1] / norms[0] == pytest.approx(predicted[1] / predicted[0], rel=0.05), scaling


def test_a_prediction_needs_ranks_to_start_from() -> None:
    assert sqrt_rank_shares([0.5, 0.5], [8, 8], [0, 4]) == (0.0, 1.0)
    for args in (([1.0], [0], [1]), ([1.0, 1.0], [1], [1]), ([1.0], [1], [0]), ([1.0], [1], [-1])):
        with pytest.raises(ValueError, match="do not fit together"):
            sqrt_rank_shares(*args)
