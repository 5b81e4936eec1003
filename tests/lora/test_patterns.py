"""Strict patterns: what a key hits, what is refused and in which words, what the table shows."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fastlora.config import ConfigError, LoraConfig
from fastlora.lora.patterns import ModuleSpec, ProjectionShape, describe, num_parameters, resolve

NUM_LAYERS = 20
KINDS = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (64, 32), "mlp.down_proj": (96, 64)}
SHAPES = [ProjectionShape(f"model.layers.{layer}.{kind}", *widths) for layer in range(NUM_LAYERS) for kind, widths in KINDS.items()]
NAMES = [shape.name for shape in SHAPES]


def _config(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"target_modules": ("q_proj", "k_proj", "down_proj"), "r": 8, "lora_alpha": 16.0, **settings})


def _ranks(**settings: Any) -> dict[str, int]:
    return {spec.name: spec.rank for spec in resolve(SHAPES, _config(**settings))}


def _hit(key: str) -> list[str]:
    """Modules that get the rank of a one-key rank_pattern."""
    return [name for name, rank in _ranks(rank_pattern={key: 3}).items() if rank == 3]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("model.layers.1.self_attn.q_proj", ["model.layers.1.self_attn.q_proj"]),  # exact: not layers 10 to 19
        ("layers.1.self_attn.q_proj", ["model.layers.1.self_attn.q_proj"]),
        ("1.self_attn.q_proj", ["model.layers.1.self_attn.q_proj"]),  # after a dot: 11.self_attn.q_proj is another name
        ("self_attn.q_proj", [n for n in NAMES if n.endswith("q_proj")]),
        ("q_proj", [n for n in NAMES if n.endswith("q_proj")]),
        (r"layers\.1\..*", [n for n in NAMES if ".layers.1." in n]),
        (r"layers\.1\d?\.mlp\.down_proj", [n for n in NAMES if n.endswith("down_proj") and ".layers.1" in n]),
        (r"layers\.(3|7)\.self_attn\.(q|k)_proj", [n for n in NAMES if ".3.self" in n or ".7.self" in n]),
        ("q_proj|k_proj", [n for n in NAMES if "_attn" in n]),
    ],
)
def test_what_a_key_hits(key: str, expected: list[str]) -> None:
    assert _hit(key) == expected


@pytest.mark.parametrize("key", ["proj", "_proj", "layers.1", "q_proj.", "", "model", "Q_PROJ", "layersX1.self_attn.q_proj", r"layers\.1"])
def test_a_part_of_a_name_is_no_hit(key: str) -> None:
    """A dot in a plain name is a dot, and a name's beginning or middle hits nothing."""
    with pytest.raises(
        ConfigError, match=r"lora.rank_pattern: .* matches no target module. Modules end in down_proj, k_proj, q_proj; the first is"
    ):
        _hit(key)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ("q_proj", "w1")}, r"lora.target_modules: 'w1' matches no linear module"),
        ({"target_modules": ("q_proj",), "rank_pattern": {"k_proj": 4}}, r"lora.rank_pattern: 'k_proj' matches no target module"),
        ({"alpha_pattern": {"v_proj": 4.0}}, r"lora.alpha_pattern: 'v_proj' matches no target module"),
        (
            {"rank_pattern": {"q_proj": 4, "layers.3.self_attn.q_proj": 8}},
            r"model.layers.3.self_attn.q_proj is matched by two keys, 'q_proj' and 'layers.3.self_attn.q_proj'. Make one of them narrower",
        ),
        (
            {"alpha_pattern": {"q_proj": 4.0, r".*\.5\..*": 4.0}},
            r"lora.alpha_pattern: model.layers.5.self_attn.q_proj is matched by two keys",
        ),
        ({"rank_pattern": {"q_proj": 4, r"q_pro[j]": 4}}, "two keys"),  # even where both say the same
        ({"rank_budget": 481}, r"lora.rank_budget = 481 is missed: the 60 target modules come to 480 \(-1\)"),
        ({"rank_budget": 0}, r"lora.rank_budget = 0 is missed: .* 480 \(\+480\)"),
        ({"parameter_budget": 61_441}, r"lora.parameter_budget = 61,441 is missed: .* 61,440 \(-1\)"),
        ({"r": 0}, "every target module has rank 0: nothing would train"),
        ({"rank_pattern": {".*": 0}}, "every target module has rank 0"),
        ({"r": 65}, r"rank 65 of model.layers.0.self_attn.q_proj is above both of its widths \(64 in, 64 out\)"),
        (
            {"rank_pattern": {"layers.2.mlp.down_proj": 97}},
            r"rank 97 of model.layers.2.mlp.down_proj is above both of its widths \(96 in, 64 out\)",
        ),
        (
            {"rank_pattern": {"layers.(1.q_proj": 4}},
            r"lora.rank_pattern: 'layers.\(1.q_proj' is not a valid regular expression: .*unterminated",
        ),
        ({"target_modules": ("*_proj",)}, r"lora.target_modules: '\*_proj' is not a valid regular expression: nothing to repeat"),
    ],
    ids=str,
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(SHAPES, _config(**settings))


def test_a_rank_between_the_widths_is_allowed() -> None:
    assert _ranks(rank_pattern={"k_proj": 64})["model.layers.0.self_attn.k_proj"] == 64


def test_a_budget_that_is_met_passes() -> None:
    ranks = _ranks(rank_pattern={"q_proj": 0, "down_proj": 1}, rank_budget=20 * 9, parameter_budget=20 * (8 * 96 + 160))
    assert sum(ranks.values()) == 180


def test_specs_are_in_the_models_order_with_rank_0_included() -> None:
    specs = resolve(SHAPES, _config(target_modules=("down_proj", "q_proj"), rank_pattern={"layers.0.mlp.down_proj": 0}))
    assert [spec.name for spec in specs] == [name for name in NAMES if "k_proj" not in name]
    assert specs[1] == ModuleSpec("model.layers.0.mlp.down_proj", 0, 16.0, 0.0)


@pytest.mark.parametrize(("scaling", "expected"), [("alpha/r", 24.0 / 3), ("alpha/sqrt(r)", 24.0 / math.sqrt(3)), ("constant", 24.0)])
def test_scale_modes(scaling: str, expected: float) -> None:
    """The rank pattern alone does not touch alpha."""
    specs = resolve(SHAPES, _config(scaling=scaling, rank_pattern={"q_proj": 3}, alpha_pattern={"q_proj": 24.0}))
    by_name = {spec.name: spec for spec in specs}
    assert by_name["model.layers.4.self_attn.q_proj"].scale == expected
    assert by_name["model.layers.4.self_attn.k_proj"].alpha == 16.0


def test_the_table_says_what_the_patterns_did() -> None:
    settings = {"rank_pattern": {r"layers\.[0-9]\.self_attn\.q_proj": 16, "k_proj": 0}, "alpha_pattern": {"layers.0.mlp.down_proj": 4.0}}
    specs = resolve(SHAPES, _config(**settings))
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(describe(specs, SHAPES))
    text = console.export_text()
    rows = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:6]] for line in text.splitlines() if line.startswith("│")
    }
    assert rows["q_proj"] == ["20", "16×10 8×10", "1 to 2", f"{10 * 24 * 128:,}"]
    assert rows["k_proj"] == ["20", "0×20", "–", "0"]
    assert rows["down_proj"] == ["20", "8×20", "0.5 to 2", f"{160 * 160:,}"]
    assert rows["all"] == ["40", f"Σ r = {240 + 160}", "", f"{10 * 24 * 128 + 160 * 160:,}"]


@given(
    ranks=st.dictionaries(st.sampled_from(NAMES), st.integers(0, 32), min_size=1),
    r=st.integers(0, 32),
    data=st.data(),
)
def test_the_order_of_keys_changes_nothing_and_sums_are_right(ranks: dict[str, int], r: int, data: st.DataObject) -> None:
    """Any set of exact names, in any order, after the model's modules in any order."""
    expected = {name: ranks.get(name, r) for name in NAMES}
    if not any(expected.values()):
        return
    shapes = data.draw(st.permutations(SHAPES))
    pattern = dict(data.draw(st.permutations(list(ranks.items()))))
    targets = tuple(data.draw(st.permutations(["q_proj", "k_proj", "down_proj"])))
    budget = {
        "rank_budget": sum(expected.values()),
        "parameter_budget": sum(expected[s.name] * (s.in_features + s.out_features) for s in SHAPES),
    }
    specs = resolve(shapes, LoraConfig(target_modules=targets, r=r, rank_pattern=pattern, **budget))
    assert {spec.name: spec.rank for spec in specs} == expected
    assert [spec.name for spec in specs] == [shape.name for shape in shapes]
    assert num_parameters(specs, shapes) == budget["parameter_budget"]


def test_a_dot_in_a_plain_name_is_a_dot() -> None:
    shapes = [ProjectionShape(name, 8, 8) for name in ("block.1.proj", "block.1xproj", "block_1.proj")]
    config = LoraConfig(target_modules=("proj", "1xproj"), r=2, rank_pattern={"block.1.proj": 3})
    assert [spec.rank for spec in resolve(shapes, config)] == [3, 2, 2]
