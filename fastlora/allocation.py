"""Study S1: a budget of ranks, spread over the layers by what a profile says of them (arXiv 2605.07366).

    proportional   q_l = budget · s_l^p / Σ s^p          the quota of layer l
                   r_l = clip(round(q_l), r_min, r_max)  then repaired to Σ r = budget: unit by unit where r_l is furthest from q_l

Every unit goes where it lowers Σ (r − q)² most, so the result is the vector within the bounds and of this sum that is nearest to q;
where no bound is met, that is the method of the largest remainder. Ranks are multiples of `granularity` throughout, and equal claims are
settled by the seed: settled by index they would favour the first layers. What cannot be met is an error; nothing is bent to fit.

Shapes: l layers; scores_l any non-negative measure of a layer (a share, a norm), one per layer in the model's order.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from fastlora.config import MAX_RANK, ConfigError
from fastlora.lora.patterns import scale_of
from fastlora.lora.peft_format import anchored
from fastlora.metrics import layer_of
from fastlora.plugins import load_strategy

WHERE = "allocation"
"""What the messages call the setting."""


@dataclass(frozen=True, slots=True)
class _Grid:
    """The problem in units of `granularity`: layers numbers within low..high that add up to total."""

    layers: int
    total: int
    low: int
    high: int
    granularity: int


def allocate(
    strategy: str,
    scores_l: Sequence[float],
    budget: int,
    *,
    power: float = 1.0,
    r_min: int = 1,
    r_max: int = MAX_RANK,
    granularity: int = 1,
    seed: int = 0,
    fraction: float = 0.7,
) -> tuple[int, ...]:
    """A rank per layer: Σ = budget, each a multiple of granularity within r_min..r_max.

    strategy: a name of STRATEGIES, or `path/to/file.py:function`, called as
        function(scores_l, budget, r_min=, r_max=, granularity=, seed=) -> one rank per layer
    and held to the same conditions. `reduced` spends round(fraction · budget) instead, to the nearest multiple of granularity.
    power: p ≥ 0 above; 0 = every layer alike. seed: of random, of the shuffle, and of equal claims.

    Raises ConfigError with the numbers: no layers, scores that are negative, not finite, or all zero (any zero for the inverse), bounds or
    a budget that are no multiples of granularity, a budget below layers × r_min or above layers × r_max, an unknown strategy.
    """
    function = load_strategy(strategy, tuple(STRATEGIES), WHERE)
    scores = _checked_scores(scores_l)
    if not (math.isfinite(power) and power >= 0):
        raise ConfigError(f"{WHERE}: power = {power} must be a finite number >= 0 (`inverse-proportional` is the other direction)")
    if strategy == "reduced":
        budget = reduced_budget(budget, fraction, granularity)
    grid = _checked_grid(len(scores), budget, r_min, r_max, granularity)
    if function is not None:
        ranks = function(tuple(scores.tolist()), budget, r_min=r_min, r_max=r_max, granularity=granularity, seed=seed)
        return _checked_ranks(strategy, ranks, grid)
    units_l = STRATEGIES[strategy](scores, power, grid, seed)
    return tuple(granularity * int(units) for units in units_l)


def reduced_budget(budget: int, fraction: float, granularity: int = 1) -> int:
    """fraction · budget, rounded to the nearest multiple of granularity (halves to the even one)."""
    if not 0 < fraction <= 1:
        raise ConfigError(f"{WHERE}: fraction = {fraction} of the budget must lie above 0 and at most at 1")
    return granularity * round(fraction * budget / granularity)


def _checked_scores(scores_l: Sequence[float]) -> NDArray[np.float64]:
    scores = np.asarray(scores_l, dtype=np.float64)
    if scores.ndim != 1 or scores.size == 0:
        raise ConfigError(f"{WHERE}: the scores have shape {list(scores.shape)}; one number per layer is needed")
    bad = np.flatnonzero(~(np.isfinite(scores) & (scores >= 0)))
    if bad.size:
        raise ConfigError(f"{WHERE}: the score of layer {bad[0]} is {scores[bad[0]]}; scores must be finite and not negative")
    return scores


def _checked_grid(layers: int, budget: int, r_min: int, r_max: int, granularity: int) -> _Grid:
    if granularity < 1 or not 0 <= r_min <= r_max:
        raise ConfigError(f"{WHERE}: granularity = {granularity}, r_min = {r_min}, r_max = {r_max}: 1 <= granularity, 0 <= r_min <= r_max")
    for name, value in (("r_min", r_min), ("r_max", r_max), ("the budget", budget)):
        if value % granularity:
            raise ConfigError(f"{WHERE}: {name} = {value} is no multiple of granularity = {granularity}")
    if budget < layers * r_min:
        raise ConfigError(
            f"{WHERE}: a budget of {budget} ranks is below {layers} layers × r_min {r_min} = {layers * r_min}. Raise it or lower r_min"
        )
    if budget > layers * r_max:
        raise ConfigError(
            f"{WHERE}: a budget of {budget} ranks is above {layers} layers × r_max {r_max} = {layers * r_max}. Lower it or raise r_max"
        )
    return _Grid(layers, budget // granularity, r_min // granularity, r_max // granularity, granularity)


def _checked_ranks(strategy: str, ranks: object, grid: _Grid) -> tuple[int, ...]:
    """What a user's function returned, held to the conditions of every other strategy."""
    where = f"{WHERE}: {strategy}"
    if not isinstance(ranks, Sequence | np.ndarray) or len(ranks) != grid.layers:
        shown = f"{len(ranks)} of them" if isinstance(ranks, Sequence | np.ndarray) else f"a {type(ranks).__name__}"
        raise ConfigError(f"{where} returned {shown} where {grid.layers} ranks are needed, one per layer")
    low, high = grid.low * grid.granularity, grid.high * grid.granularity
    for layer, rank in enumerate(ranks):
        if not isinstance(rank, int | np.integer) or rank % grid.granularity or not low <= rank <= high:
            needed = f"a multiple of {grid.granularity} within {low}..{high}"
            raise ConfigError(f"{where} gave layer {layer} the rank {rank!r}; it must be {needed}")
    if (total := int(sum(ranks))) != grid.total * grid.granularity:
        raise ConfigError(f"{where} returned ranks that add up to {total}, the budget is {grid.total * grid.granularity}")
    return tuple(int(rank) for rank in ranks)


def _nearest(weights_l: NDArray[np.float64], grid: _Grid, seed: int) -> NDArray[np.int64]:
    """The module docstring's rule: the units nearest to quotas in the proportion of weights_l (≥ 0, not all 0)."""
    quota_l = grid.total * (weights_l / weights_l.sum())
    units_l = np.clip(np.rint(quota_l), grid.low, grid.high).astype(np.int64)
    turn_l = np.random.default_rng(seed).permutation(grid.layers)
    while missing := grid.total - int(units_l.sum()):
        step = 1 if missing > 0 else -1
        # (x + step − q)² − (x − q)² = 1 + 2 step (x − q)
        cost_l = np.where(units_l == (grid.high if step > 0 else grid.low), np.inf, step * (units_l - quota_l))
        units_l[np.lexsort((turn_l, cost_l))[0]] += step
    return units_l


def _uniform(scores_l: NDArray[np.float64], power: float, grid: _Grid, seed: int) -> NDArray[np.int64]:
    return _nearest(np.ones(grid.layers), grid, seed)


def _proportional(scores_l: NDArray[np.float64], power: float, grid: _Grid, seed: int) -> NDArray[np.int64]:
    if not scores_l.any():
        raise ConfigError(f"{WHERE}: the scores of all {grid.layers} layers are 0: there is nothing to be proportional to")
    return _nearest((scores_l / scores_l.max()) ** power, grid, seed)


def _inverse_proportional(scores_l: NDArray[np.float64], power: float, grid: _Grid, seed: int) -> NDArray[np.int64]:
    if not scores_l.all():
        raise ConfigError(f"{WHERE}: the score of layer {np.flatnonzero(scores_l == 0)[0]} is 0, which has no inverse")
    return _nearest((scores_l.min() / scores_l) ** power, grid, seed)


def _shuffled_proportional(scores_l: NDArray[np.float64], power: float, grid: _Grid, seed: int) -> NDArray[np.int64]:
    """The ranks of `proportional`, dealt out to the layers at random: what is left of it if the layers did not matter."""
    return np.random.default_rng(seed).permutation(_proportional(scores_l, power, grid, seed))


def _random(scores_l: NDArray[np.float64], power: float, grid: _Grid, seed: int) -> list[int]:
    """One of all vectors within the bounds and of this sum, every one equally likely: counted exactly, then drawn layer by layer."""
    free, span = grid.total - grid.layers * grid.low, grid.high - grid.low
    ways_ls = [[1] + [0] * free]  # [l][s]: in how many ways l layers take s units above their minimum
    for _ in range(grid.layers):
        sums = list(accumulate(ways_ls[-1]))
        ways_ls.append([sums[s] - (sums[s - span - 1] if s > span else 0) for s in range(free + 1)])
    generator = random.Random(seed)
    units = []
    for others in reversed(ways_ls[:-1]):
        drawn = generator.randrange(sum(others[max(0, free - span) : free + 1]))
        own = 0
        while drawn >= others[free - own]:
            drawn -= others[free - own]
            own += 1
        units.append(grid.low + own)
        free -= own
    return units


STRATEGIES: Mapping[str, Callable[[NDArray[np.float64], float, _Grid, int], Iterable[int]]] = {
    "uniform": _uniform,
    "random": _random,
    "reduced": _proportional,
    "proportional": _proportional,
    "inverse-proportional": _inverse_proportional,
    "shuffled-proportional": _shuffled_proportional,
}
"""Name -> (scores_l, power, grid, seed) -> units_l."""


def modules_by_layer(modules: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """The adapted modules of layer 0, 1, …. Raises ConfigError for a module outside the layers and for a layer without modules."""
    layers: dict[int, list[str]] = {}
    for module in modules:
        layers.setdefault(layer_of(module), []).append(module)
    if -1 in layers:
        raise ConfigError(f"{WHERE}: {layers[-1][0]} lies in no layer, and ranks are given by layer; take it out of lora.target_modules")
    if gaps := sorted(set(range(max(layers, default=-1) + 1)) - layers.keys()):
        raise ConfigError(f"{WHERE}: layer {gaps[0]} has no module that lora.target_modules adapts; the last layer is {max(layers)}")
    return tuple(tuple(layers[layer]) for layer in range(len(layers)))


def layer_scores(profile: Mapping[int, float], modules: Iterable[str], where: str) -> tuple[float, ...]:
    """The scores of a profile (layer -> score) in the order of the model with these modules.

    where: the profile's file, for the message. Raises ConfigError unless it has exactly the model's layers.
    """
    layers = len(modules_by_layer(modules))
    if set(profile) != set(range(layers)):
        has = f"{len(profile)} layers, {min(profile)} to {max(profile)}" if profile else "no layers"
        raise ConfigError(f"{where}: the profile has {has}; this model has {layers}, 0 to {layers - 1}: it is of another model")
    return tuple(profile[layer] for layer in range(layers))


def rank_pattern(ranks_l: Sequence[int], modules: Iterable[str]) -> dict[str, int]:
    """`lora.rank_pattern` by which all modules of layer l have rank ranks_l[l]: one anchored, escaped key per module.

    modules: the full names of all adapted modules. Raises ConfigError when their layers are not as many as the ranks.
    """
    layers = modules_by_layer(modules)
    if len(layers) != len(ranks_l):
        raise ConfigError(f"{WHERE}: {len(ranks_l)} ranks for a model of {len(layers)} layers: they are of another model")
    return {anchored(module): rank for rank, names in zip(ranks_l, layers, strict=True) for module in names}


def sqrt_rank_shares(
    share_l: Sequence[float], ranks_l: Sequence[int], new_ranks_l: Sequence[int], scaling: str = "constant"
) -> tuple[float, ...]:
    """The shares of gradient norm that new ranks would show if a rank did nothing but add rows of the same size.

        share'_l ∝ share_l · (s'_l √r'_l) / (s_l √r_l)

    A matrix of rank r has r rows of like size and each carries the factor s, so its gradient's norm goes as s √r. With s the same for every
    rank (`constant`: also alpha/r where alpha_pattern keeps it) that is √r. scaling: `lora.scaling`, one alpha for all layers, so
    alpha/r predicts 1/√r and alpha/sqrt(r) no change at all. The amplification claim of arXiv 2605.07366 is that shares move further.

    share_l: measured at ranks_l (all ≥ 1), their sum is free; the result adds up to 1; a new rank of 0 has share 0.
    Raises ValueError for lengths that differ or a rank below these.
    """
    if not len(share_l) == len(ranks_l) == len(new_ranks_l) or min(ranks_l, default=0) < 1 or min(new_ranks_l) < 0 or not any(new_ranks_l):
        raise ValueError(f"shares {len(share_l)}, ranks {list(ranks_l)} and new ranks {list(new_ranks_l)} do not fit together")

    def gain(rank: int) -> float:
        return scale_of(1.0, rank, scaling) * math.sqrt(rank) if rank else 0.0

    grown = [share * gain(new) / gain(old) for share, old, new in zip(share_l, ranks_l, new_ranks_l, strict=True)]
    return tuple(value / sum(grown) for value in grown)


def share_ratio(share_l: Sequence[float]) -> float:
    """Largest share over smallest, of the layers that have any."""
    shares = [share for share in share_l if share > 0]
    return max(shares) / min(shares)
