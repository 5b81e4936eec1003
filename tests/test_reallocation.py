"""Reallocation between two ranks of one adapter: scores against a plain loop, the carried state in a model, budgets, refusals."""

from __future__ import annotations

import math
from collections import defaultdict
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastlora.config import ConfigError, LoraConfig, OptimConfig, ReallocationConfig, RunConfig
from fastlora.lora.groups import projections, shapes
from fastlora.lora.packed import PackedAdapter, attach
from fastlora.lora.patterns import resolve, scale_of, with_ranks
from fastlora.metrics import GRADIENT_PROFILE_SCHEMA, layer_of
from fastlora.optim import AdamW
from fastlora.reallocation import Carried, carry, check_reallocation, moved_rank, new_ranks, unit_scores, units
from tests.lora.adapters import UNEVEN, attach_uneven
from tests.tiny import make_tiny_model
from tests.tolerances import FP64_EXACT, SAME_IN_FLOAT32

BY_LAYER = {f"layers.{layer}": rank for layer, rank in enumerate((4, 1, 8, 2, 5))}
"""Layer -> rank of all its modules."""


LORA = LoraConfig(rank_pattern={rf"{layer}\..*": rank for layer, rank in BY_LAYER.items()})


@cache
def layered_adapter() -> PackedAdapter:
    """On five layers of unequal rank."""
    model = make_tiny_model("llama", num_hidden_layers=len(BY_LAYER))
    return attach(model, resolve(shapes(projections(model)), LORA), seed=0, cast_to_input=True)


def layered(**settings: Any) -> tuple[PackedAdapter, RunConfig]:
    """It, and a config of the same."""
    return layered_adapter(), RunConfig(lora=LORA, reallocation=ReallocationConfig(**{"every": 1, "r_max": 32, **settings}), seed=3)


def table(adapter: PackedAdapter, norm: Any, steps: int = 3) -> pa.Table:
    """A gradient profile: norm(step, spec, matrix) at two optimizer steps a step."""
    rows = [
        {
            "step": step,
            "module": spec.name,
            "layer": layer_of(spec.name),
            "matrix": matrix,
            "rank": spec.rank,
            "norm": norm(step, spec, matrix),
        }
        for step in range(1, steps + 1)
        for _ in range(2)
        for spec in adapter.specs
        for matrix in "AB"
        if spec.rank
    ]
    columns = [[row.get(name) for row in rows] for name in GRADIENT_PROFILE_SCHEMA.names]
    return pa.table(columns, schema=GRADIENT_PROFILE_SCHEMA)


def noise(seed: int) -> Any:
    generator = np.random.default_rng(seed)
    return lambda step, spec, matrix: generator.gamma(2.0)


@pytest.mark.parametrize("unit", ["layer", "module"])
@pytest.mark.parametrize("normalise", ["none", "sqrt_r", "s_sqrt_r"])
def test_scores_are_mean_shares(unit: str, normalise: str) -> None:
    """Against loops over the rows; step 2 has a gradient that is not finite, step 3 none."""
    adapter, config = layered(unit=unit, normalise=normalise)
    random = noise(0)
    profile = table(adapter, lambda step, *rest: {2: float("nan"), 3: 0.0}.get(step) if step in (2, 3) else random(step, *rest), steps=5)
    shares: dict[str, list[float]] = defaultdict(list)
    for step in (1, 4, 5):
        squares: dict[str, float] = defaultdict(float)
        for row in profile.to_pylist():
            if row["step"] == step:
                rank, alpha = row["rank"], config.lora.lora_alpha
                divisor = {"none": 1.0, "sqrt_r": rank**0.5, "s_sqrt_r": scale_of(alpha, rank, "alpha/r") * rank**0.5}[normalise]
                name = row["module"] if unit == "module" else f"layer {row['layer']}"
                squares[name] += (row["norm"] / divisor) ** 2
        total = sum(math.sqrt(value) for value in squares.values())
        for name, value in squares.items():
            shares[name].append(math.sqrt(value) / total)
    scores = unit_scores(profile, units(adapter.specs, unit), config.reallocation)
    assert scores is not None
    assert scores == pytest.approx({name: sum(values) / 3 for name, values in shares.items()}, rel=FP64_EXACT)


def test_what_neither_rank_nor_scale_changes() -> None:
    """dB = s G Aᵀ with the same ‖G‖ everywhere: s √r normalisation sees equal layers, √r alone does not."""
    adapter, config = layered()
    profile = table(adapter, lambda step, spec, matrix: spec.scale * math.sqrt(spec.rank))
    for normalise, equal in (("s_sqrt_r", True), ("sqrt_r", False), ("none", False)):
        c = config.reallocation.model_copy(update={"normalise": normalise})
        scores = unit_scores(profile, units(adapter.specs, "layer"), c)
        assert scores is not None
        assert (max(scores.values()) < 1.01 * min(scores.values())) == equal


def test_only_the_steps_since_the_last_one_count() -> None:
    adapter, config = layered(power=1.0)
    profile = table(adapter, lambda step, spec, matrix: float(step < 3 or layer_of(spec.name) == 2), steps=4)
    early, late = (new_ranks(adapter, profile, since, 4, config) for since in (0, 2))
    assert late["model.layers.2.mlp.up_proj"] == 20 - 4 > early["model.layers.2.mlp.up_proj"], "r_min = 1 for the four others"


def test_without_any_gradient_ranks_stay() -> None:
    adapter, config = layered()
    for norm in (0.0, float("inf")):
        ranks = new_ranks(adapter, table(adapter, lambda *_, norm=norm: norm), 0, 3, config)
        assert ranks == {spec.name: spec.rank for spec in adapter.specs} and moved_rank(adapter, ranks) == 0


@given(
    seed=st.integers(0, 2**31),
    granularity=st.sampled_from([1, 2, 4, 5]),
    strategy=st.sampled_from(["proportional", "shuffled-proportional"]),
)
def test_the_budget_is_kept(seed: int, granularity: int, strategy: str) -> None:
    adapter, config = layered(granularity=granularity, r_min=0, r_max=20, strategy=strategy, power=2.0)
    ranks = new_ranks(adapter, table(adapter, noise(seed), steps=1), 0, 1, config)
    assert sum(ranks.values()) == sum(spec.rank for spec in adapter.specs)
    assert all(rank % granularity == 0 and 0 <= rank <= 20 for rank in ranks.values())
    assert moved_rank(adapter, ranks) == sum(abs(ranks[spec.name] - spec.rank) for spec in adapter.specs) // 2
    assert all(len({ranks[spec.name] for spec in unit}) == 1 for unit in units(adapter.specs, "layer").values())


# ------------------------------------------------------------------------------------------------ the carried state


def optimizer_of(adapter: PackedAdapter) -> AdamW:
    """With noise as moments, zero in the gaps as a real one."""
    optimizer, generator = AdamW(adapter.flat, OptimConfig()), torch.Generator().manual_seed(5)
    for slot in adapter.slots.values():
        for view in (slot.a_rd, slot.b_rn):
            view(optimizer.exp_avg).copy_(torch.randn(view(optimizer.exp_avg).shape, generator=generator))
            view(optimizer.exp_avg_sq).copy_(torch.rand(view(optimizer.exp_avg).shape, generator=generator))
    return optimizer


def attached_with(carried: Carried, adapter: PackedAdapter, ranks: dict[str, int], scaling: str) -> tuple[Any, PackedAdapter]:
    """A fresh model and adapter at the new ranks, with the carried values: what `build` and `Trainer` make of the checkpoint."""
    model = make_tiny_model("llama")
    other = attach(model, with_ranks(adapter.specs, ranks, scaling), seed=9, cast_to_input=False)
    assert other.flat.data.shape == carried.parameters.shape
    other.flat.data.copy_(carried.parameters)
    return model, other


@torch.no_grad()
def exact_logits(adapter: PackedAdapter) -> Tensor:
    """Of a float64 model with W + s B A in place of W."""
    model = make_tiny_model("llama", dtype=torch.float64)
    for name, slot in adapter.slots.items():
        model.get_submodule(name).weight += slot.scale * adapter.b_rn(name).double().t() @ adapter.a_rd(name).double()
    return model(torch.arange(3, 40)[None]).logits


@torch.no_grad()
@pytest.mark.parametrize("scaling", ["constant", "alpha/r"])
def test_growing_leaves_the_model_as_it_is(scaling: str) -> None:
    """Ranks doubled (a power of two, so that float32 takes up the change of s exactly), rank 0 included: fp64 logits, the same."""
    model = make_tiny_model("llama")
    adapter = attach_uneven(model, lora={"scaling": scaling, "rank_pattern": UNEVEN}, cast_to_input=False)
    ranks = {spec.name: 2 * spec.rank or 6 for spec in adapter.specs}
    carried = carry(adapter, optimizer_of(adapter), ranks, scaling=scaling, seed=1)
    grown_model, grown = attached_with(carried, adapter, ranks, scaling)
    assert grown.rank_pattern == ranks and carried.delta_w_error == 0
    before, after = exact_logits(adapter), exact_logits(grown)
    assert (after - before).norm() <= FP64_EXACT * before.norm()
    tokens = torch.arange(3, 40)[None]
    torch.testing.assert_close(grown_model(tokens).logits, model(tokens).logits, rtol=SAME_IN_FLOAT32, atol=10 * SAME_IN_FLOAT32)


def test_state_lies_where_the_new_adapter_looks_for_it() -> None:
    """Uneven ranks to other uneven ones, 0 both ways: ΔW is the truncated SVD module by module, moments are carried, gaps stay zero."""
    adapter = attach_uneven(make_tiny_model("llama"))
    optimizer = optimizer_of(adapter)
    ranks = {spec.name: (spec.rank * 3 + 5 * place) % 11 for place, spec in enumerate(adapter.specs)}
    assert any(ranks[spec.name] == 0 < spec.rank for spec in adapter.specs) and any(ranks[s.name] > 0 == s.rank for s in adapter.specs)
    carried = carry(adapter, optimizer, ranks, scaling="alpha/r", seed=1)
    _, other = attached_with(carried, adapter, ranks, "alpha/r")
    cut = whole = 0.0
    for spec in adapter.specs:
        old = (
            spec.scale * adapter.b_rn(spec.name).double().t() @ adapter.a_rd(spec.name).double()
            if spec.rank
            else torch.zeros(1, 1).double()
        )
        u, s, vh = torch.linalg.svd(old, full_matrices=False)
        kept = ranks[spec.name]
        cut, whole = cut + float(s[kept:].square().sum()), whole + float(s.square().sum())
        if kept and spec.rank:
            slot = other.slots[spec.name]
            new = slot.scale * other.b_rn(spec.name).double().t() @ other.a_rd(spec.name).double()
            torch.testing.assert_close(new, u[:, :kept] * s[:kept] @ vh[:kept], rtol=0, atol=1e-6 * float(s[0]))
            if kept >= spec.rank:
                old_slot = adapter.slots[spec.name]
                gain = slot.scale / old_slot.scale
                for view, factor in (("a_rd", 1.0), ("b_rn", gain)):
                    expected = factor * getattr(old_slot, view)(optimizer.exp_avg)
                    torch.testing.assert_close(getattr(slot, view)(carried.exp_avg)[: spec.rank], expected, rtol=1e-6, atol=0)
    assert carried.delta_w_error == pytest.approx(math.sqrt(cut / whole), rel=1e-6)
    inside = torch.zeros(len(carried.parameters), dtype=torch.bool)
    for segment in other.flat.segments:
        inside[segment.offset :][: segment.numel] = True
    for buffer in (carried.parameters, carried.exp_avg, carried.exp_avg_sq):
        assert not buffer[~inside].any()


def test_fresh_rows_depend_on_seed_and_module() -> None:
    adapter = attach_uneven(make_tiny_model("llama"))
    ranks = {spec.name: spec.rank + 2 for spec in adapter.specs}

    def rows(seed: int) -> list[Tensor]:
        carried = carry(adapter, optimizer_of(adapter), ranks, scaling="alpha/r", seed=seed)
        _, other = attached_with(carried, adapter, ranks, "alpha/r")
        return [other.a_rd(spec.name)[spec.rank :] for spec in adapter.specs if other.slots[spec.name].in_features == 64]

    first, again, otherwise = rows(1), rows(1), rows(2)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(first, otherwise, strict=True))
    assert len({tuple(x.flatten().tolist()) for x in first}) == len(first)


# ------------------------------------------------------------------------------------------------ refusals before the run


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a layer of several ranks": ({}, {"rank_pattern": {"q_proj": 3}}, "q_proj has rank 3, model.layers.0.self_attn.k_proj 16"),
    "r_max above the widths": ({"r_max": 65}, {}, r"r_max = 65 is above both widths of a module of layer 0 \(64\)"),
    "unequal modules": ({"unit": "module"}, {"parameter_budget": 29696}, "parameter_budget cannot be kept: a rank more costs 96 .* 160"),
    "unequal layers": (
        {},
        {"target_modules": ("q_proj", "layers.1.mlp.up_proj"), "rank_budget": 48},
        "rank_budget cannot be kept: a rank more costs 1 in one layer and 2",
    ),
    "below the minimum": ({"r_min": 17}, {}, "2 layers with ranks that add up to 32: .* below 2 layers × r_min 17"),
    "above the maximum": ({"r_max": 15}, {}, "above 2 layers × r_max 15"),
    "granularity": ({"granularity": 5, "r_min": 5, "r_max": 60}, {}, "32 is no multiple of granularity = 5"),
    "unknown strategy": ({"strategy": "proportionl"}, {}, "'proportionl' is unknown; did you mean proportional"),
    "a smaller budget": ({"strategy": "reduced"}, {}, "'reduced' spends less than the budget"),
    "the inverse of nothing": (
        {"strategy": "inverse-proportional", "unit": "module"},
        {"rank_pattern": {"q_proj": 0}},
        "is 0, which has no inverse",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_fail_later_is_refused_first(case: str) -> None:
    reallocation, lora, message = REFUSED[case]
    config = RunConfig(reallocation=ReallocationConfig(**{"every": 1, **reallocation}), lora=LoraConfig(**lora))
    found = shapes(projections(make_tiny_model("llama")))
    with pytest.raises(ConfigError, match=message):
        check_reallocation(resolve(found, config.lora), found, config)


def test_what_can_be_is_not_refused() -> None:
    for reallocation, lora in (
        ({}, {"rank_budget": 224, "parameter_budget": 29696}),
        ({"unit": "module", "r_min": 0}, {"rank_pattern": {"q_proj": 3}, "rank_budget": 198}),
    ):
        config = RunConfig(reallocation=ReallocationConfig(**{"every": 1, **reallocation}), lora=LoraConfig(**lora))
        found = shapes(projections(make_tiny_model("llama")))
        check_reallocation(resolve(found, config.lora), found, config)
