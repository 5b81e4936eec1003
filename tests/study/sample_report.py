"""A study's report as a study would make it, from made-up numbers: every picture, every verdict, hostile words.

`python -m tests.study.sample_report FOLDER` writes one, to look at.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from fastlora.analysis.gradient_profile import LayerNorms
from fastlora.statistics import pass_at_k, proportion_interval
from fastlora.study import pictures
from fastlora.study.claims import Claim, Estimate, Sample, above, accuracy_claim, by_interval, by_property, conclusions, within
from fastlora.study.report import Picture, StudyReport, Table, write_study_report

HOSTILE = "<script>alert('x')</script> | & `tick` *star* $x$"
"""Words that would break a page or a table that does not escape them."""

RANKS = {"uniform": 32, "random": 31, "proportional": 30, "reduced": 22}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SETTING = {
    "command": "python -m fastlora.study rank-allocation --config configs/studies/rank_allocation_cpu.toml",
    "commit": "9b3bad2",
    "machine": "2 cores of Zen 4, 24 GiB, no GPU",
    "items": "256",
    "seeds": "0, 1, 2",
    "scale": "SmolLM2-135M, 20 steps; published: Qwen2.5-1.5B, 1,000 steps",
}


def sample_report() -> StudyReport:
    """All of it."""
    claims = sample_claims()
    may, may_not = conclusions(claims)
    limit = "anything about other models, tasks or lengths of training"
    return StudyReport(
        title="Rank allocation under GRPO (made-up numbers)",
        study="rank-allocation",
        may_conclude=may,
        may_not_conclude=(*may_not, limit),
        claims=claims,
        tables=sample_tables(),
        pictures=sample_pictures(np.random.default_rng(0)),
        setting=SETTING,
    )


def sample_claims() -> tuple[Claim, ...]:
    """One of each verdict."""
    amplification = by_interval(Estimate(0.97, 0.94, 0.99), above(0.8), "the correlation of rank and change of share")
    normalised = by_interval(Estimate(0.3, 0.1, 0.5), above(0.8), "the correlation of rank and rank-normalised share")
    budget = by_property({f"{name}/seed-{seed}": True for name in RANKS for seed in range(3)}, "the ranks sum to the budget")
    gap = by_interval(Estimate(0.02, 0.001, 0.05), above(0.0), "the gap between uniform and proportional")
    same = by_interval(Estimate(0.01, -0.04, 0.06), within(-0.03, 0.03), "the gap between shuffled and proportional")
    sample = Sample(
        items=256, seeds=3, min_items=1000, min_seeds=3, needed="a gap of +0.020 needs 4,321 items × 3 seeds (power 0.8, alpha 0.05)"
    )
    paper = "arXiv 2605.07366"
    return (
        budget.claim("Every strategy but reduced spends the budget exactly", source=paper, published="896"),
        amplification.claim("Layers with more rank gain share", source=f"{paper}, figure 4", published="0.972 / 0.946"),
        normalised.claim("They still do with the rank taken out", source="the √r prediction of this project", published="–"),
        accuracy_claim("Uniform beats proportional", gap, sample, source=f"{paper}, table 2", published="74.5 % against 70.0 %"),
        accuracy_claim("Which layer gets which rank makes no difference", same, sample, source=HOSTILE, published="not run"),
    )


def sample_tables() -> tuple[Table, ...]:
    """One with published numbers, one with holes and hostile words."""
    accuracy = Table(
        "accuracy",
        "Held-out accuracy by strategy",
        ("strategy", "Σ r", "parameters", "accuracy", "low", "high", "published (GSM8K, 200 items)"),
        (
            ("base", 0, 0, 0.375, 0.318, 0.436, 0.66),
            ("proportional", 896, 36_929_536, 0.6212, 0.560, 0.678, 0.70),
            ("uniform", 896, 36_929_536, 0.6407, 0.580, 0.697, 0.745),
            ("shuffled", 896, 36_929_536, 0.6311, 0.570, 0.688, None),
        ),
        "95 % Wilson intervals; published numbers are of another model and task: compare orders, not values.",
    )
    odd = Table("odd", HOSTILE, ("what", "value"), ((HOSTILE, None), ("nan", float("nan")), ("small", -1.5e-7), ("two\nlines", 1e7)))
    return accuracy, odd


def sample_pictures(rng: Generator) -> tuple[Picture, ...]:
    """Each kind once."""
    layers, steps = np.arange(30, dtype=np.int32), np.arange(1, 41)
    ranks = {name: np.clip(rng.normal(mean, 0 if name == "uniform" else 7, 30).round(), 8, 48) for name, mean in RANKS.items()}
    profile = 1 + 0.4 * np.sin(layers / 5)
    shares = {name: _share(profile * np.sqrt(r) * np.exp(rng.normal(0, 0.03, 30))) for name, r in ranks.items()}
    predicted = {name: _share(shares["uniform"] * np.sqrt(r)) for name, r in ranks.items() if name != "uniform"}
    norms = {name: _norms(layers, steps, share, rng) for name, share in shares.items()}
    changes = {name: (r, shares[name] / shares["uniform"]) for name, r in ranks.items() if name != "uniform"}
    return (
        Picture("heat", "Gradient norm by layer and step", pictures.heat_maps(norms, "‖g‖ of a layer"), "Blank = exactly zero."),
        Picture("shares", "Share of the gradient by layer", pictures.share_bars(layers, shares, predicted), "Mean over steps."),
        Picture(
            "amplification",
            "Rank against change of share",
            pictures.scatter_fits(changes, "rank of the layer", "share ÷ share of the uniform run"),
            "One dot a layer.",
        ),
        *_accuracy_pictures(rng),
        *_curve_pictures(steps, rng),
        Picture(
            "projections",
            "Chosen entries by projection",
            pictures.stacked_shares({name: dict(zip(PROJECTIONS, _share(rng.uniform(0.2, 3, 7)), strict=True)) for name in RANKS}, "share"),
            "k = 4,096 entries of B.",
        ),
    )


def _accuracy_pictures(rng: Generator) -> tuple[Picture, ...]:
    regimes = {
        name: {float(rank): proportion_interval(int(rng.normal(mean, 8)), 300) for rank in (1, 4, 16, 64, 256)}
        for name, mean in (("outcome", 160), ("process", 145), ("distillation", 130))
    }
    passes = {
        name: {k: pass_at_k(16, rng.binomial(16, rng.beta(a, 3, 60)).tolist(), k) for k in (1, 2, 4, 8, 16)}
        for name, a in (("student", 1.0), ("teacher", 2.5))
    }
    strategies = {name: proportion_interval(int(rng.normal(160, 9)), 256) for name in RANKS}
    published = {"uniform": 0.745, "random": 0.675, "proportional": 0.70, "reduced": 0.65}
    band = ("full fine-tuning", proportion_interval(163, 300))
    return (
        Picture("rank", "Accuracy against rank", pictures.against(regimes, "LoRA rank", "pass@1", band=band), "95 % Wilson intervals."),
        Picture("strategies", "Accuracy by strategy", pictures.intervals(strategies, "accuracy", published=published), "256 problems."),
        Picture("pass-at-k", "pass@k", pictures.pass_at_k_curves(passes), "16 samples a problem."),
    )


def _curve_pictures(steps: NDArray[np.int64], rng: Generator) -> tuple[Picture, ...]:
    deviation = {
        name: top * np.exp(rng.normal(0, 0.1, (3, 40))) for name, top in (("outcome", 0.6), ("process", 6.0), ("distillation", 1.0))
    }
    truncated = {
        name: np.clip(0.1 + rate * steps / 40 + rng.normal(0, 0.03, (3, 40)), 0, 1)
        for name, rate in zip(deviation, (0, 0.8, 0.1), strict=True)
    }
    accuracy = {name: np.where(steps % 10 == 0, 0.4 + rng.normal(0, 0.03, (3, 40)), np.nan) for name in deviation}
    panels = [
        pictures.CurvePanel("Standard deviation of the advantages", "std", steps, deviation, log=True, references={"published peak": 9.05}),
        pictures.CurvePanel("Truncated completions", "share of completions", steps, truncated, percent=True),
        pictures.CurvePanel("Held-out accuracy", "pass@1", steps, accuracy, percent=True),
    ]
    cosines = {name: mean + rng.normal(0, 0.02, (3, 40)) for name, mean in (("SFT", 0.35), ("GRPO", 0.03))}
    return (
        Picture("collapse", "Collapse", pictures.curves(panels), "Line: mean of three seeds; band: smallest to largest."),
        Picture("cosines", "Consecutive gradients", pictures.consecutive_cosines(steps, cosines), "Whole gradient of B."),
    )


def _norms(layers: NDArray[np.int32], steps: NDArray[np.int64], share: NDArray[np.float64], rng: Generator) -> LayerNorms:
    norms_ls = share[:, None] * np.exp(rng.normal(0, 0.3, (len(layers), len(steps))))
    norms_ls[:, 0] = 0  # B = 0: nothing yet
    return LayerNorms(layers, steps.astype(np.int32), norms_ls)


def _share(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values / values.sum()


if __name__ == "__main__":
    print(*write_study_report(sample_report(), Path(sys.argv[1])), sep="\n")
