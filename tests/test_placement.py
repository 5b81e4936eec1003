"""Scores against the gradients themselves, masks against a full sort, ties against chance."""

from __future__ import annotations

import time
from collections import Counter
from fractions import Fraction
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy.stats import chisquare, kstest
from torch import Tensor

from fastlora.config import ConfigError
from fastlora.lora.groups import AttachError
from fastlora.lora.peft_format import b_mask_metadata, check_b_mask, load_b_mask, save_b_mask
from fastlora.placement import KINDS, SCOPES, SNR_LIMIT, divide, overlap, projection_shares, scores, top_k_mask
from tests.tolerances import FP32_ADVANTAGE, FP64_EXACT

BATCHES = 16
SHAPES = {
    "model.layers.0.self_attn.v_proj": (7, 3),
    "model.layers.0.mlp.down_proj": (11, 1),
    "model.layers.1.self_attn.v_proj": (7, 5),
    "model.layers.1.mlp.down_proj": (11, 0),
}


def gradients(seed: int = 0, batches: int = BATCHES) -> dict[str, Tensor]:
    """Module -> g [batches, n, r]; a few entries are always 0, or never change."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, shape in SHAPES.items():
        g = torch.randn(batches, *shape, generator=generator, dtype=torch.float64)
        if g[0].numel():
            g[:, 0, 0], g[:, 1, 0] = 0.0, -0.5
        result[name] = g
    return result


def sums_of(g: Tensor) -> Tensor:
    return torch.stack([g.sum(0), g.sign().sum(0), g.abs().sum(0), (g * g).sum(0)]).float()


SUMS = {name: sums_of(g) for name, g in gradients().items()}
MAGNITUDE = {name: sums[2] for name, sums in SUMS.items()}
ENTRIES = sum(n * r for n, r in SHAPES.values())


def agreement(g: np.ndarray) -> float:
    return abs(sum(1 if x > 0 else -1 if x < 0 else 0 for x in g)) / len(g)


@pytest.mark.parametrize(
    ("kind", "formula"),
    [
        ("sign_consistency", agreement),
        ("signed_sum", lambda g: abs(g.sum())),
        ("snr", lambda g: 0.0 if not g.any() else min(SNR_LIMIT, abs(g.mean()) / g.std(ddof=1)) if g.std(ddof=1) else SNR_LIMIT),
        ("magnitude", lambda g: np.abs(g).sum()),
        ("fisher", lambda g: (g**2).sum()),
    ],
)
def test_scores_are_those_of_the_gradients(kind: str, formula: Any) -> None:
    result = scores(SUMS, BATCHES, kind)
    for name, g in gradients().items():
        assert result[name].shape == SHAPES[name]
        for n, r in np.ndindex(*SHAPES[name]):
            assert float(result[name][n, r]) == pytest.approx(formula(g[:, n, r].numpy()), rel=FP32_ADVANTAGE, abs=1e-12), (name, n, r)


def test_snr_of_what_float32_cannot_tell_from_constant() -> None:
    """mean 1000, deviation 1e-4: cancellation leaves noise, which may be negative; all such entries are equal, and finite."""
    generator = torch.Generator().manual_seed(1)
    g = 1000 + 1e-4 * torch.randn(BATCHES, 50, 4, generator=generator, dtype=torch.float64)
    assert scores({"q_proj": sums_of(g)}, BATCHES, "snr")["q_proj"].unique().tolist() == [SNR_LIMIT]


def test_random_scores_are_uniform_and_follow_seed_and_name() -> None:
    big = {name: torch.zeros(4, 100, 100) for name in ("layers.0.q_proj", "layers.1.q_proj")}
    first = scores(big, BATCHES, "random", seed=0)
    values = torch.cat([tensor.ravel() for tensor in first.values()]).numpy()
    assert kstest(values, "uniform").pvalue > 1e-3
    assert len(np.unique(values)) == len(values), "equal random scores would be settled by gradients"
    assert abs(np.corrcoef(first["layers.0.q_proj"].ravel(), first["layers.1.q_proj"].ravel())[0, 1]) < 0.05
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.05
    again = scores(dict(reversed(big.items())), BATCHES, "random", seed=0)
    assert all(torch.equal(first[name], again[name]) for name in big), "the order of the modules must not matter"
    assert not torch.equal(first["layers.0.q_proj"], scores(big, BATCHES, "random", seed=1)["layers.0.q_proj"])


@st.composite
def tied_problems(draw: st.DrawFn) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Scores and magnitudes of few values: most are equal."""
    score, magnitude = {}, {}
    for module in range(draw(st.integers(1, 4))):
        name = f"layers.{module}.{draw(st.sampled_from(['q_proj', 'v_proj']))}"
        shape = (draw(st.integers(1, 5)), draw(st.integers(0, 4)))
        values = st.lists(st.integers(0, 2), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1])
        score[name] = torch.tensor(draw(values), dtype=torch.float64).reshape(shape)
        magnitude[name] = torch.tensor(draw(values), dtype=torch.float32).reshape(shape)
    if not any(tensor.numel() for tensor in score.values()):
        score["layers.0.q_proj"] = magnitude["layers.0.q_proj"] = torch.ones(2, 2)
    return score, magnitude


@given(tied_problems(), st.sampled_from(SCOPES), st.integers(0, 3), st.data())
@settings(max_examples=150, deadline=None)
def test_a_mask_is_what_sorting_within_each_group_gives(
    problem: tuple[dict[str, Tensor], dict[str, Tensor]], scope: str, seed: int, data: st.DataObject
) -> None:
    """Exactly k; in every group nothing outside the mask beats anything inside it by (score, magnitude); groups have their shares."""
    score, magnitude = problem
    k = data.draw(st.integers(1, sum(tensor.numel() for tensor in score.values())))
    masks = top_k_mask(score, magnitude, k, scope=scope, seed=seed)
    assert list(masks) == list(score)
    assert sum(int(mask.sum()) for mask in masks.values()) == k
    assert all(mask.dtype == torch.bool and mask.shape == score[name].shape for name, mask in masks.items())
    groups: dict[str, list[tuple[float, float, bool]]] = {}
    for name in score:
        group = {"global": "", "module": name, "projection": name.split(".")[-1]}[scope]
        triples = zip(score[name].ravel().tolist(), magnitude[name].ravel().tolist(), masks[name].ravel().tolist(), strict=True)
        groups.setdefault(group, []).extend(triples)
    entries = sum(len(members) for members in groups.values())
    for members in groups.values():
        inside = sorted((s, m) for s, m, chosen in members if chosen)
        assert sorted(((s, m) for s, m, _ in members), reverse=True)[: len(inside)] == inside[::-1]
        assert abs(len(inside) - Fraction(k * len(members), entries)) < 1
    turned = top_k_mask(dict(reversed(score.items())), magnitude, k, scope=scope, seed=seed)
    assert all(torch.equal(masks[name], turned[name]) for name in masks), "the order of the modules must not matter"


@given(st.lists(st.integers(0, 8), min_size=1, max_size=4), st.data())
@settings(deadline=None)
def test_divide_is_the_nearest_of_all(sizes: list[int], data: st.DataObject) -> None:
    """By enumeration: no other division of k has a smaller Σ (part − quota)²."""
    named = {f"layers.{index}.q_proj": size for index, size in enumerate(sizes)}
    entries = sum(sizes)
    if not entries:
        return
    k = data.draw(st.integers(0, entries))
    parts = divide(k, named, seed=data.draw(st.integers(0, 3)))
    assert sum(parts.values()) == k
    assert all(0 <= parts[name] <= size for name, size in named.items())

    def distance(vector: tuple[int, ...]) -> Fraction:
        return sum(((x - Fraction(k * size, entries)) ** 2 for x, size in zip(vector, sizes, strict=True)), Fraction(0))

    bars = combinations(range(k + len(sizes) - 1), len(sizes) - 1)
    vectors = (tuple(b - a - 1 for a, b in zip((-1, *cut), (*cut, k + len(sizes) - 1), strict=True)) for cut in bars)
    assert distance(tuple(parts.values())) == min(map(distance, vectors))


def test_ties_favour_no_layer_and_no_place() -> None:
    """All alike: over 600 seeds each module, and each position, is chosen as often as any other."""
    alike = {f"model.layers.{layer}.q_proj": torch.ones(4, 3) for layer in range(5)}
    drawn = torch.zeros(5, 12)
    for seed in range(600):
        masks = top_k_mask(alike, alike, 6, seed=seed)
        drawn += torch.stack([mask.ravel().float() for mask in masks.values()])
    assert int(drawn.sum()) == 3600
    assert chisquare(drawn.sum(1)).pvalue > 1e-3
    assert chisquare(drawn.ravel()).pvalue > 1e-3


def test_fewer_entries_lie_within_more() -> None:
    score = scores(SUMS, BATCHES, "sign_consistency")
    masks = [top_k_mask(score, MAGNITUDE, k) for k in range(1, ENTRIES + 1)]
    for few, more in pairwise(masks):
        assert all(bool((more[name] | ~few[name]).all()) for name in few)


def test_magnitude_settles_ties_before_the_hash() -> None:
    alike = {"q_proj": torch.zeros(10, 10)}
    magnitude = {"q_proj": torch.randperm(100, generator=torch.Generator().manual_seed(0)).float().reshape(10, 10)}
    mask = top_k_mask(alike, magnitude, 7)["q_proj"]
    assert sorted(magnitude["q_proj"][mask].tolist()) == [93, 94, 95, 96, 97, 98, 99]


def test_five_million_entries_take_seconds() -> None:
    """No loop over entries: 5 M entries with many ties, one process of a laptop."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(-8, 9, (200, 250, 100), generator=generator).double()
    score = {f"model.layers.{n}.q_proj": signs[n].abs() / 16 for n in range(200)}
    start = time.process_time()
    masks = top_k_mask(score, {name: torch.ones_like(tensor) for name, tensor in score.items()}, 1_000_003)
    assert time.process_time() - start < 10
    assert sum(int(mask.sum()) for mask in masks.values()) == 1_000_003


def _with(sums: dict[str, Tensor], name: str, value: Tensor) -> dict[str, Tensor]:
    return {**sums, name: value}


V0 = "model.layers.0.self_attn.v_proj"
POISONED = SUMS[V0].clone()
POISONED[:, 2, 1] = torch.nan


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scores(SUMS, 15, "fisher"), "15 scoring batches; at least 16 are needed"),
        (lambda: scores(SUMS, BATCHES, "fischer"), "'fischer' is unknown; did you mean fisher"),
        (lambda: scores({}, BATCHES, "fisher"), "there are no sums"),
        (lambda: scores({"q": torch.zeros(3, 2, 2)}, BATCHES, "fisher"), r"the sums of q have shape \[3, 2, 2\]; \[4, n, r\] is needed"),
        *[
            (lambda kind=kind: scores(_with(SUMS, V0, POISONED), BATCHES, kind), rf"1 of the 21 scores \({kind}\) of {V0} are NaN")
            for kind in KINDS
        ],
        (lambda: top_k_mask(MAGNITUDE, MAGNITUDE, 0), "k = 0 entries cannot be chosen of 67"),
        (lambda: top_k_mask(MAGNITUDE, MAGNITUDE, 68), "k = 68 entries cannot be chosen of 67"),
        (lambda: top_k_mask(MAGNITUDE, MAGNITUDE, 5, scope="layer"), "the scope 'layer' is unknown; there are global, module, projection"),
        (lambda: top_k_mask(MAGNITUDE, {}, 5), rf"{V0} has scores of shape \[7, 3\] and no magnitudes"),
        (lambda: top_k_mask(MAGNITUDE, _with(MAGNITUDE, V0, torch.ones(2, 2)), 5), rf"{V0} has scores .* and shape \[2, 2\]"),
        (lambda: top_k_mask(_with(MAGNITUDE, V0, POISONED[0]), MAGNITUDE, 5), f"1 of the 21 scores of {V0} are NaN"),
        (lambda: top_k_mask(MAGNITUDE, _with(MAGNITUDE, V0, POISONED[2]), 5), f"1 of the 21 magnitudes of {V0} are NaN"),
        (lambda: projection_shares({"q_proj": torch.zeros(2, 2, dtype=torch.bool)}), "no chosen entry"),
        (lambda: overlap({"q": torch.ones(2, 2) > 0}, {"q": torch.ones(2, 3) > 0}), r"two masks differ in q: \(2, 2\) and \(2, 3\)"),
        (lambda: overlap({}, {"q": torch.ones(2, 3) > 0}), r"two masks differ in q: None and \(2, 3\)"),
    ],
)
def test_the_impossible_is_named(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sums_4nr[3] / batches", None),
        ("sums_4nr", r"own.py:score of .* returned \[4, 7, 3\]; a tensor \[7, 3\] is needed"),
        ("1.0", r"returned a float; a tensor \[7, 3\]"),
        ("sums_4nr[0] * float('nan')", r"21 of the 21 scores \(.*own.py:score\) of .* are NaN or infinite"),
    ],
)
def test_ones_own_score(tmp_path: Path, body: str, message: str | None) -> None:
    file = tmp_path / "own.py"
    file.write_text(f"def score(sums_4nr, batches):\n    return {body}\n")
    if message is None:
        own, fisher = scores(SUMS, BATCHES, f"{file}:score"), scores(SUMS, BATCHES, "fisher")
        assert all(torch.equal(own[name], fisher[name] / BATCHES) for name in SUMS)
    else:
        with pytest.raises(ConfigError, match=message):
            scores(SUMS, BATCHES, f"{file}:score")


def test_overlap_by_hand() -> None:
    """10 entries each; 3 and 4 chosen, 2 shared; modules a (4 entries) and b (6)."""
    first = {"a": torch.tensor([1, 1, 0, 0]).bool(), "b": torch.tensor([1, 0, 0, 0, 0, 0]).bool()}
    second = {"a": torch.tensor([1, 1, 1, 0]).bool(), "b": torch.tensor([0, 1, 0, 0, 0, 0]).bool()}
    result = overlap(first, second)
    assert (result.shared, result.jaccard) == (2, pytest.approx(2 / 5, rel=FP64_EXACT))
    assert result.chance == pytest.approx(1.2 / (7 - 1.2), rel=FP64_EXACT)  # 3 · 4 / 10 shared by chance
    within = 2 * 3 / 4 + 1 * 1 / 6
    assert result.chance_within_modules == pytest.approx(within / (7 - within), rel=FP64_EXACT)
    empty = {name: torch.zeros_like(mask) for name, mask in first.items()}
    assert np.isnan(overlap(empty, empty).jaccard)


def test_chance_is_what_random_masks_show() -> None:
    zeros = {f"layers.{n}.q_proj": torch.zeros(4, 100, 20) for n in range(5)}
    magnitude = {name: sums[2] for name, sums in zeros.items()}
    pair = [top_k_mask(scores(zeros, BATCHES, "random", seed=seed), magnitude, 3000, seed=seed) for seed in (0, 1)]
    result = overlap(*pair)
    assert result.jaccard == pytest.approx(result.chance, abs=0.02)  # 3000 · 3000 / 10,000 = 900 shared, standard deviation 21
    assert result.chance_within_modules == pytest.approx(result.chance, abs=0.01)


def test_shares_by_projection() -> None:
    masks = {
        "layers.0.v_proj": torch.ones(3, 2) > 0,
        "layers.1.v_proj": torch.zeros(3, 2) > 0,
        "layers.0.down_proj": torch.tensor([[True, True], [False, False]]),
    }
    shares = projection_shares(masks)
    assert Counter({kind: share.chosen for kind, share in shares.items()}) == Counter({"v_proj": 6, "down_proj": 2})
    assert shares["v_proj"].share_of_chosen == 6 / 8
    assert shares["v_proj"].share_of_entries == 12 / 16
    assert shares["down_proj"].entries == 4


def test_a_mask_goes_to_a_file_and_back(tmp_path: Path) -> None:
    path = tmp_path / "mask.safetensors"
    masks = top_k_mask(scores(SUMS, BATCHES, "fisher"), MAGNITUDE, 20)
    save_b_mask(path, masks, {"kind": "fisher", "scope": "global", "seed": 0, "batches": BATCHES})
    loaded = load_b_mask(path)
    assert loaded.keys() == masks.keys()
    assert all(torch.equal(loaded[name], masks[name]) for name in masks)
    assert b_mask_metadata(path) == {"kind": "fisher", "scope": "global", "seed": "0", "batches": "16", "k": "20"}
    check_b_mask(path, loaded, SHAPES, 20)
    check_b_mask(path, {V0: loaded[V0]}, SHAPES)  # the other modules stay untrained


def test_a_mask_that_does_not_fit_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "mask.safetensors"
    masks = {V0: torch.ones(7, 4) > 0, "model.layers.9.mlp.down_proj": torch.ones(11, 1) > 0}
    expected = (
        r"does not fit: 1 modules have no adapter, the first is model.layers.9.mlp.down_proj; 1 have another shape, "
        rf"{V0} \[7, 4\] where B is \[7, 3\]; 39 entries are chosen, 20 were asked for"
    )
    with pytest.raises(AttachError, match=expected):
        check_b_mask(path, masks, SHAPES, 20)
    with pytest.raises(AttachError, match=r"q_proj is torch.float32, a mask is bool"):
        save_b_mask(path, {"q_proj": torch.ones(2, 2)}, {})
    assert not path.exists()
    save_file({"q_proj": torch.ones(2, 2) > 0}, path, metadata={"k": "3"})
    with pytest.raises(AttachError, match="has 4 entries and its metadata say k = 3"):
        load_b_mask(path)
