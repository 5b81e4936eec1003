"""Layers from scores: the published choices and their controls, all of one size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from fastlora.config import ConfigError, LoraConfig
from fastlora.lora.patterns import ProjectionShape, resolve
from fastlora.selection import STRATEGIES, layer_count, read_layer_scores, select_layers, selected_rank_pattern

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
MODULES = [f"model.layers.{layer}.{kind}" for layer in range(12) for kind in KINDS]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.data())
@settings(max_examples=200, deadline=None)
def test_every_choice_has_the_same_size_and_the_right_layers(scores: list[int], data: st.DataObject) -> None:
    count, seed = data.draw(st.integers(1, len(scores))), data.draw(st.integers(0, 9))
    chosen = {name: select_layers(name, scores, count, seed) for name in STRATEGIES}
    for name, layers in chosen.items():
        assert len(layers) == count == len(set(layers)), name
        assert layers == tuple(sorted(layers)), name
        assert set(layers) <= set(range(len(scores))), name
        assert select_layers(name, scores, count, seed) == layers, f"{name}: the same seed must repeat"
    assert sorted(scores[layer] for layer in chosen["top"]) == sorted(scores)[len(scores) - count :]
    assert sorted(scores[layer] for layer in chosen["bottom"]) == sorted(scores)[:count]
    assert chosen["first"] == tuple(range(count))
    assert chosen["last"] == tuple(range(len(scores) - count, len(scores)))
    before, after = chosen["middle"][0], len(scores) - 1 - chosen["middle"][-1]
    assert chosen["middle"][-1] - before == count - 1, "the middle is one block"
    assert after - before in (0, 1)


def test_top_fraction_and_above_median_by_hand() -> None:
    scores = [5.0, 1.0, 4.0, 4.0, 9.0, 2.0]  # median 4: two above it
    assert layer_count("top_fraction", scores) == 3
    assert layer_count("above_median", scores) == 2
    assert select_layers("top", scores, layer_count("above_median", scores)) == (0, 4)
    assert set(select_layers("top", scores, 3)) in ({0, 4, 2}, {0, 4, 3})


@pytest.mark.parametrize(("layers", "fraction", "count"), [(30, 0.5, 15), (27, 0.5, 14), (30, 0.1, 3), (28, 0.3, 8), (3, 1.0, 3)])
def test_the_count_is_rounded_halves_up(layers: int, fraction: float, count: int) -> None:
    assert layer_count("top_fraction", [1.0] * layers, fraction) == count


@pytest.mark.parametrize("strategy", ["top", "bottom", "random"])
def test_equal_scores_are_settled_by_the_seed_and_fairly(strategy: str) -> None:
    drawn = np.zeros(8)
    for seed in range(800):
        drawn[list(select_layers(strategy, [1.0] * 8, 3, seed))] += 1
    assert chisquare(drawn).pvalue > 1e-3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layer_count("top", [1.0]), "the count 'top' is unknown; there are top_fraction, above_median"),
        (lambda: layer_count("top_fraction", [1.0, 2.0], 0.0), "fraction = 0.0 of the layers"),
        (lambda: layer_count("top_fraction", [1.0, 2.0], 1.1), "fraction = 1.1 of the layers"),
        (lambda: layer_count("top_fraction", [1.0] * 4, 0.1), "fraction = 0.1 of 4 layers is none"),
        (lambda: layer_count("above_median", [1.0] * 4), "no score lies above the median 1.0"),
        (lambda: layer_count("above_median", [1.0, float("nan")]), "the score of layer 1 is nan"),
        (lambda: layer_count("above_median", []), r"shape \[0\]"),
        (lambda: select_layers("top", [1.0, float("inf")], 1), "the score of layer 1 is inf"),
        (lambda: select_layers("top", [1.0, 2.0], 0), "0 of 2 layers cannot be chosen"),
        (lambda: select_layers("top", [1.0, 2.0], 3), "3 of 2 layers cannot be chosen"),
        (lambda: select_layers("midle", [1.0, 2.0], 1), "'midle' is unknown; did you mean middle"),
        (
            lambda: selected_rank_pattern([12], MODULES, attention_rank=1, mlp_rank=1),
            "layer 12 is chosen and this model has 12: the choice is of another model",
        ),
        (
            lambda: selected_rank_pattern([0], ["model.layers.0.conv"], attention_rank=1, mlp_rank=1),
            "model.layers.0.conv lies in no self_attn and no mlp",
        ),
    ],
)
def test_the_impossible_is_named(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("[7, 2, 0]", None),
        ("{0, 1, 2}", None),
        ("3", "returned a int where 3 layer numbers"),
        ("[0, 1]", "returned 2 layers, 2 of them different; 3 are needed"),
        ("[0, 1, 1]", "returned 3 layers, 2 of them different"),
        ("[0, 1, 8]", "returned the layer 8; layers are 0 to 7"),
        ("[0, 1, -1]", "returned the layer -1"),
        ("[0, 1, 2.0]", "returned the layer 2.0"),
    ],
)
def test_ones_own_choice_is_held_to_the_same(tmp_path: Path, body: str, message: str | None) -> None:
    file = tmp_path / "own.py"
    file.write_text(f"def pick(scores_l, count, *, seed):\n    return {body}\n")
    if message is None:
        layers = select_layers(f"{file}:pick", [1.0] * 8, 3)
        assert layers == tuple(sorted(layers))
        assert len(layers) == 3
    else:
        with pytest.raises(ConfigError, match=rf"own.py:pick {message}"):
            select_layers(f"{file}:pick", [1.0] * 8, 3)


def test_asymmetric_ranks_reach_the_chosen_layers_alone() -> None:
    """Through the strict resolver: r = 0 elsewhere, layer 1 is not 10 or 11."""
    pattern = selected_rank_pattern([1, 5], MODULES, attention_rank=16, mlp_rank=64)
    config = LoraConfig(target_modules=("q_proj", "o_proj", "gate_proj", "down_proj"), r=0, rank_pattern=pattern, rank_budget=2 * 160)
    ranks = {spec.name: spec.rank for spec in resolve([ProjectionShape(name, 64, 64) for name in MODULES], config)}
    for name, rank in ranks.items():
        chosen = name.split(".")[2] in ("1", "5")
        assert rank == (0 if not chosen else 16 if "self_attn" in name else 64), name


def test_scores_come_from_the_probe_of_this_model(tmp_path: Path) -> None:
    path = tmp_path / "probe.json"

    def write(layers: int, modules: list[str]) -> None:
        path.write_text(json.dumps({"layers": {str(n): n / 4 for n in reversed(range(layers))}, "modules": dict.fromkeys(modules, 1.0)}))

    with pytest.raises(ConfigError, match=r"probe.json: no such file"):
        read_layer_scores(path, MODULES)
    write(12, [*MODULES, "model.layers.0.input_layernorm"])
    assert read_layer_scores(path, MODULES) == tuple(n / 4 for n in range(12))
    write(13, [*MODULES, "model.layers.12.mlp.gate_proj"])
    with pytest.raises(ConfigError, match=r"probe.json: the profile has 13 layers, 0 to 12; this model has 12"):
        read_layer_scores(path, MODULES)
    write(12, MODULES[2:])
    with pytest.raises(ConfigError, match=r"no score of model.layers.0.self_attn.q_proj \(2 of 48 modules\): it is of another model"):
        read_layer_scores(path, MODULES)
    for text in ("{", "[]", '{"layers": {"a": 1}, "modules": {}}', '{"layers": [1], "modules": {}}', '{"layers": {}}'):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"is no probe.json with `layers` and `modules`"):
            read_layer_scores(path, MODULES)
