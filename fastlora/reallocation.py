"""New ranks during a run: from its own gradients, at the same budget.

    every N steps    gradient profile since the last time ─► a score per unit ─► ranks (allocation.py)
                     A, B and AdamW's moments at those ranks (lora/resize.py) ─► a checkpoint ─► the run goes on from it

A unit is a layer, whose target modules share one rank, or a module. With g the gradients of a unit's matrices in one step, its score is
the mean over the steps of its share √Σ‖g‖² / Σ_units √Σ‖g‖². The norm of a gradient grows like s √r whatever the layer does
(at constant G = ∂L/∂ΔW: dB = s G Aᵀ has r columns), so that raw norms give more to who has more: `normalise` takes that out.

The ranks of a run are a part of its state. Which moment a run is killed at does not matter: its checkpoints are either from before the
reallocation, which then happens again, from the same profile, or from after it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from fastlora.allocation import allocate
from fastlora.checkpoint import Checkpoint
from fastlora.config import ConfigError, ReallocationConfig, RunConfig
from fastlora.lora.packed import PackedAdapter, Slot, place
from fastlora.lora.patterns import ModuleSpec, ProjectionShape, with_ranks
from fastlora.lora.resize import Components, Resized, Sides, resize
from fastlora.metrics import layer_of
from fastlora.optim import AdamW
from fastlora.rollout.sampler import derived_seed

Units = Mapping[str, tuple[ModuleSpec, ...]]
"""Name -> the modules that share a rank, in the model's order."""


@dataclass(frozen=True, slots=True)
class Reallocation:
    """The last one of a run."""

    step: int
    """After which it happened."""
    ranks: Mapping[str, int]
    """Of every target module from then on."""
    metrics: Mapping[str, float]
    """For the row of the first step at these ranks."""


def last_reallocation(checkpoint: Checkpoint) -> Reallocation | None:
    """Of the run that wrote a checkpoint; None = its ranks are still those of the config."""
    state = checkpoint.state["reallocation"]
    return None if state is None else Reallocation(**state)


def units(specs: Sequence[ModuleSpec], unit: str) -> Units:
    """The modules by unit ("layer" or "module"). Raises ConfigError for a layer whose modules differ in rank."""
    found: dict[str, tuple[ModuleSpec, ...]] = {}
    for spec in specs:
        name = spec.name if unit == "module" else f"layer {layer_of(spec.name)}"
        found[name] = (*found.get(name, ()), spec)
        first = found[name][0]
        if spec.rank != first.rank:
            raise ConfigError(
                f"reallocation.unit = 'layer' gives all target modules of a layer one rank, and {first.name} has rank {first.rank}, "
                f"{spec.name} {spec.rank}: set lora.rank_pattern by layer (lora.target_modules leaves modules out), or unit = 'module'"
            )
    return found


def check_reallocation(specs: Sequence[ModuleSpec], shapes: Sequence[ProjectionShape], config: RunConfig) -> None:
    """Before a run: raises ConfigError for what would fail, or miss lora's budgets, at the first reallocation."""
    c, by_unit = config.reallocation, units(specs, config.reallocation.unit)
    shape = {projection.name: projection for projection in shapes}
    widest = {name: min(max(shape[s.name].in_features, shape[s.name].out_features) for s in unit) for name, unit in by_unit.items()}
    for name, width in widest.items():
        if c.r_max > width:
            raise ConfigError(f"reallocation.r_max = {c.r_max} is above both widths of a module of {name} ({width}); lower it")
    per_rank = {
        "rank_budget": {len(unit) for unit in by_unit.values()},
        "parameter_budget": {sum(shape[s.name].in_features + shape[s.name].out_features for s in unit) for unit in by_unit.values()},
    }
    for key, costs in per_rank.items():
        if getattr(config.lora, key) is not None and len(costs) > 1:
            raise ConfigError(
                f"lora.{key} cannot be kept: a rank more costs {min(costs):,} in one {c.unit} and {max(costs):,} in another, and "
                f"reallocation keeps the sum of the {c.unit}s' ranks; remove lora.{key}"
                + (", or set unit = 'layer'" * (c.unit == "module"))
            )
    if c.strategy == "reduced":
        raise ConfigError("reallocation.strategy = 'reduced' spends less than the budget, which reallocation keeps; use 'proportional'")
    _allocated({name: float(unit[0].rank > 0) for name, unit in by_unit.items()}, by_unit, c, config.seed)


def new_ranks(adapter: PackedAdapter, profile: pa.Table, since: int, step: int, config: RunConfig) -> dict[str, int]:
    """Module -> rank after `step`, from the rows of a gradient profile after step `since`; as they are where those hold no gradient."""
    c = config.reallocation
    by_unit = units(adapter.specs, c.unit)
    scores = unit_scores(profile.filter(pc.field("step") > since), by_unit, c)
    if scores is None:
        return {spec.name: spec.rank for spec in adapter.specs}
    ranks = _allocated(scores, by_unit, c, derived_seed(config.seed, step))
    return {spec.name: ranks[name] for name, unit in by_unit.items() for spec in unit}


def unit_scores(profile: pa.Table, by_unit: Units, c: ReallocationConfig) -> dict[str, float] | None:
    """Unit -> mean share of the gradient norm (see the head of this file), 0 at rank 0, where there is none to measure.

    Steps whose gradient is not finite, or zero everywhere, do not count; None when no step is left.
    """
    row_of = {spec.name: row for row, unit in enumerate(by_unit.values()) for spec in unit}
    divisor = {spec.name: _divisor(spec, c.normalise) for unit in by_unit.values() for spec in unit if spec.rank}
    modules = profile["module"].to_pylist()
    steps, column = np.unique(profile["step"].to_numpy(), return_inverse=True)
    norms = profile["norm"].to_numpy().astype(np.float64) / [divisor[module] for module in modules]
    squares_us = np.zeros((len(by_unit), len(steps)))
    np.add.at(squares_us, (np.array([row_of[module] for module in modules], dtype=np.intp), column), norms**2)
    norms_us = np.sqrt(squares_us)
    total_s = norms_us.sum(0)
    counted_s = np.isfinite(total_s) & (total_s > 0)
    if not counted_s.any():
        return None
    return dict(zip(by_unit, (norms_us[:, counted_s] / total_s[counted_s]).mean(1).tolist(), strict=True))


def _divisor(spec: ModuleSpec, normalise: str) -> float:
    return {"none": 1.0, "sqrt_r": math.sqrt(spec.rank), "s_sqrt_r": spec.scale * math.sqrt(spec.rank)}[normalise]


def _allocated(scores: Mapping[str, float], by_unit: Units, c: ReallocationConfig, seed: int) -> dict[str, int]:
    """Unit -> rank; the sum stays. Raises ConfigError, see `allocate`."""
    budget = sum(unit[0].rank for unit in by_unit.values())
    scores_u = [scores[name] for name in by_unit]
    try:
        ranks = allocate(c.strategy, scores_u, budget, power=c.power, r_min=c.r_min, r_max=c.r_max, granularity=c.granularity, seed=seed)
    except ConfigError as error:
        raise ConfigError(f"[reallocation] of {len(by_unit)} {c.unit}s with ranks that add up to {budget}: {error}") from None
    return dict(zip(by_unit, ranks, strict=True))


@dataclass(frozen=True, slots=True)
class Carried:
    """The adapter and its optimizer at new ranks, in the layout that `lora.packed.attach` will give them."""

    parameters: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    delta_w_error: float
    """‖ΔW − ΔW'‖ / ‖ΔW‖ over the whole adapter (Frobenius): what shrinking cut off; 0 while B = 0."""


def carry(adapter: PackedAdapter, optimizer: AdamW, ranks: Mapping[str, int], *, scaling: str, seed: int) -> Carried:
    """float32 on the CPU, from float64 arithmetic. seed: of new rows of A, which depend on it and on the module's name."""
    specs = with_ranks(adapter.specs, ranks, scaling)
    slots, size = place(specs, adapter.input_groups)
    old = [buffer.detach().cpu() for buffer in (adapter.flat.data, optimizer.exp_avg, optimizer.exp_avg_sq)]
    new = [torch.zeros(size) for _ in old]
    shapes = {shape.name: shape for group in adapter.input_groups for shape in group}
    cut = whole = 0.0
    for spec in specs:
        generator = torch.Generator().manual_seed(derived_seed(seed, zlib.crc32(spec.name.encode())))
        before = _components(adapter.slots.get(spec.name), shapes[spec.name], old)
        resized = resize(before, spec.rank, spec.scale, generator)
        cut, whole = cut + resized.cut, whole + resized.whole
        if spec.rank:
            _store(resized, slots[spec.name], new)
    parameters, exp_avg, exp_avg_sq = new
    return Carried(parameters, exp_avg, exp_avg_sq, math.sqrt(cut / whole) if whole else 0.0)


def _components(slot: Slot | None, shape: ProjectionShape, buffers: Sequence[Tensor]) -> Components:
    """One module of the three buffers; no components where it has no slot."""
    if slot is None:
        empty = Sides(torch.zeros(0, shape.in_features).double(), torch.zeros(0, shape.out_features).double())
        return Components(0.0, empty, empty, empty)
    return Components(slot.scale, *(Sides(slot.a_rd(buffer).double(), slot.b_rn(buffer).double()) for buffer in buffers))


def _store(resized: Resized, slot: Slot, buffers: Sequence[Tensor]) -> None:
    """Rounds to float32."""
    new = resized.components
    for sides, buffer in zip((new.value, new.exp_avg, new.exp_avg_sq), buffers, strict=True):
        slot.a_rd(buffer).copy_(sides.a_rd)
        slot.b_rn(buffer).copy_(sides.b_rn)


def moved_rank(adapter: PackedAdapter, ranks: Mapping[str, int]) -> int:
    """Σ over the modules of what each would gain at these ranks."""
    return sum(max(0, ranks[spec.name] - spec.rank) for spec in adapter.specs)
