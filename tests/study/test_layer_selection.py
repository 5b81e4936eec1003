"""The study of layers without running it: which probes it asks for, and what it makes of their agreement."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm, spearmanr

from fastlora.probe import LayerScores
from fastlora.study.claims import Estimate
from fastlora.study.config import load_study_config
from fastlora.study.layer_selection import LayerSelection, runs_of
from tests.study.configs import write_study

SECTION = """
seeds = [0, 1]
[layer_selection]
repeats = 2
second_task = { source = "reasoning_gym:products" }
"""


@pytest.fixture
def study(tmp_path: Path) -> LayerSelection:
    return LayerSelection(load_study_config(write_study(tmp_path, SECTION, study="layer-selection")))


def test_probes_of_seeds_and_repetitions_have_batches_of_their_own(study: LayerSelection) -> None:
    base, *probes = next(study.plan())
    assert (base.name, base.task) == ("second task/base", "evaluate")
    assert [cell.name for cell in probes] == [f"probe/{name}" for name in ("seed-0", "seed-1", "repeat-0", "repeat-1")]
    assert len({cell.options["seed"] for cell in probes}) == 4


def test_agreement_of_the_probes_is_the_mean_over_pairs_with_a_jackknife(study: LayerSelection, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(size=(4, 30))
    scores = np.arange(30) + 3 * noise - noise.min()
    probes = {}
    for number, row in enumerate(scores):
        layers = {layer: float(score) for layer, score in enumerate(row)}
        (folder := tmp_path / f"probe-{number}").mkdir()
        LayerScores(layers, {}, {layer: [score] for layer, score in layers.items()}, "m", "sft", 1, 0, 1, 42, 4, 1.0, 1, 1, 1).write(folder)
        probes[f"probe/{number}"] = folder
    (claim,) = study._claims(probes, {})

    def agreement(kept: list[int]) -> float:
        return float(np.mean([spearmanr(scores[i], scores[j]).statistic for i, j in combinations(kept, 2)]))

    without = np.array([agreement([i for i in range(4) if i != left_out]) for left_out in range(4)])
    reach = norm.ppf(0.975) * np.sqrt(3 / 4 * ((without - without.mean()) ** 2).sum())
    value = agreement([0, 1, 2, 3])
    assert claim.measured == f"{value:.3g} [{value - reach:.3g}, {value + reach:.3g}]"
    assert claim.verdict == ("supported" if value - reach > 0.8 else "undecided")


@pytest.mark.parametrize(
    ("top", "last", "verdicts"),
    [(0.70, 0.65, ["supported"] * 2), (0.85, 0.85, ["not supported"] * 2), (0.77, 0.80, ["undecided"] * 2)],
)
def test_savings_are_held_against_the_published_mean_and_the_last_layers_own(
    study: LayerSelection, tmp_path: Path, top: float, last: float, verdicts: list[str]
) -> None:
    layers = {layer: float(layer) for layer in range(30)}
    (folder := tmp_path / "probe").mkdir()
    LayerScores(layers, {}, {layer: [score] for layer, score in layers.items()}, "m", "sft", 1, 0, 1, 42, 4, 1.0, 1, 1, 1).write(folder)
    ratios = {f"{name}-sft": Estimate(ratio, ratio - 0.02, ratio + 0.02) for name, ratio in (("top", top), ("last", last))}
    *saved, _ = study._claims({"probe/0": folder, "probe/1": folder, "probe/2": folder}, ratios)
    assert [claim.verdict for claim in saved] == verdicts
    assert [claim.text.partition(" train at least ")[2] for claim in saved] == ["23.1% faster (sft)", "20% faster (sft)"]


@pytest.mark.parametrize(
    ("layers", "shown"), [([], ""), ([3], "3"), ([0, 1, 2, 3, 8, 9, 29], "0–3, 8–9, 29"), ([0, 2, 4], "0, 2, 4"), (list(range(30)), "0–29")]
)
def test_neighbouring_layers_are_one_run(layers: list[int], shown: str) -> None:
    assert runs_of(layers) == shown
