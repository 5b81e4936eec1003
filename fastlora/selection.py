"""Study S2: which layers get an adapter, from a score per layer (Aletheia, arXiv 2604.15351), and the controls its authors left out.

    how many    top_fraction   round(fraction · L), halves up
                above_median   layers whose score is strictly above the median
    which       top            the k highest scores: with either count, the published method
                bottom         the k lowest scores
                random         k layers by the seed
                first, last    the k layers nearest to the embedding, to the head
                middle         the k layers around the middle of the depth
                file.py:name   the user's function

Every choice has the same number of layers, so that a control differs from the method in nothing else. Equal scores are settled by the
seed. Shapes: l layers of the model, in its order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastlora.allocation import layer_scores, modules_by_layer
from fastlora.config import ConfigError
from fastlora.lora.peft_format import anchored
from fastlora.plugins import load_strategy

WHERE = "selection"
"""What the messages call the setting."""

COUNTS = ("top_fraction", "above_median")


def layer_count(rule: str, scores_l: Sequence[float], fraction: float = 0.5) -> int:
    """How many layers `top_fraction` or `above_median` choose.

    Raises ConfigError for another rule, a fraction outside (0, 1], scores that are not finite, and where no layer would be chosen.
    """
    scores = _checked_scores(scores_l)
    if rule not in COUNTS:
        raise ConfigError(f"{WHERE}: the count {rule!r} is unknown; there are {', '.join(COUNTS)}")
    if rule == "above_median":
        count = int((scores > np.median(scores)).sum())
        if count == 0:
            raise ConfigError(f"{WHERE}: above_median chooses nothing: no score lies above the median {np.median(scores)}")
        return count
    if not 0 < fraction <= 1:
        raise ConfigError(f"{WHERE}: fraction = {fraction} of the layers must lie above 0 and at most at 1")
    count = math.floor(fraction * len(scores) + 0.5)
    if count == 0:
        raise ConfigError(f"{WHERE}: fraction = {fraction} of {len(scores)} layers is none of them")
    return count


def select_layers(strategy: str, scores_l: Sequence[float], count: int, seed: int = 0) -> tuple[int, ...]:
    """`count` layers, ascending.

    strategy: a name of STRATEGIES, or `path/to/file.py:function`, called as function(scores_l, count, seed=) -> layer numbers.

    Raises ConfigError: count outside 1..L, scores that are not finite, an unknown strategy, a user's function that returns anything but
    `count` different layers.
    """
    function = load_strategy(strategy, tuple(STRATEGIES), WHERE)
    scores = _checked_scores(scores_l)
    if not 1 <= count <= len(scores):
        raise ConfigError(f"{WHERE}: {count} of {len(scores)} layers cannot be chosen")
    if function is not None:
        return _checked_layers(strategy, function(tuple(scores.tolist()), count, seed=seed), count, len(scores))
    return tuple(sorted(int(layer) for layer in STRATEGIES[strategy](scores, count, seed)))


def _checked_scores(scores_l: Sequence[float]) -> NDArray[np.float64]:
    scores = np.asarray(scores_l, dtype=np.float64)
    if scores.ndim != 1 or scores.size == 0:
        raise ConfigError(f"{WHERE}: the scores have shape {list(scores.shape)}; one number per layer is needed")
    if bad := np.flatnonzero(~np.isfinite(scores)).tolist():
        raise ConfigError(f"{WHERE}: the score of layer {bad[0]} is {scores[bad[0]]}")
    return scores


def _checked_layers(strategy: str, layers: object, count: int, num_layers: int) -> tuple[int, ...]:
    where = f"{WHERE}: {strategy} returned"
    if not isinstance(layers, Iterable):
        raise ConfigError(f"{where} a {type(layers).__name__} where {count} layer numbers are needed")
    chosen = list(layers)
    for layer in chosen:
        if not isinstance(layer, int | np.integer) or not 0 <= layer < num_layers:
            raise ConfigError(f"{where} the layer {layer!r}; layers are 0 to {num_layers - 1}")
    if len(chosen) != count or len(set(chosen)) != count:
        raise ConfigError(f"{where} {len(chosen)} layers, {len(set(chosen))} of them different; {count} are needed")
    return tuple(sorted(int(layer) for layer in chosen))


def _ranked(scores_l: NDArray[np.float64], seed: int) -> NDArray[np.int64]:
    """Layers by falling score; equal ones by the seed."""
    turn_l = np.random.default_rng(seed).permutation(len(scores_l))
    return np.lexsort((turn_l, -scores_l))


def _middle(scores_l: NDArray[np.float64], count: int, seed: int) -> Iterable[int]:
    start = (len(scores_l) - count) // 2
    return range(start, start + count)


STRATEGIES: Mapping[str, Callable[[NDArray[np.float64], int, int], Iterable[int]]] = {
    "top": lambda scores_l, count, seed: _ranked(scores_l, seed)[:count],
    "bottom": lambda scores_l, count, seed: _ranked(-scores_l, seed)[:count],
    "random": lambda scores_l, count, seed: np.random.default_rng(seed).permutation(len(scores_l))[:count],
    "first": lambda scores_l, count, seed: range(count),
    "middle": _middle,
    "last": lambda scores_l, count, seed: range(len(scores_l) - count, len(scores_l)),
}
"""Name -> (scores_l, count, seed) -> layers."""


def selected_rank_pattern(layers: Iterable[int], modules: Iterable[str], *, attention_rank: int, mlp_rank: int) -> dict[str, int]:
    """`lora.rank_pattern` of the chosen layers, one anchored, escaped key per module; for `lora.r = 0`, which leaves every other module
    without an adapter.

    modules: the full names of all adapted modules, of all layers. Attention is what lies in a `self_attn`, MLP what lies in an `mlp`.
    Raises ConfigError for a layer that the model lacks and a module that is neither.
    """
    by_layer = modules_by_layer(modules)
    pattern = {}
    for layer in layers:
        if not 0 <= layer < len(by_layer):
            raise ConfigError(f"{WHERE}: layer {layer} is chosen and this model has {len(by_layer)}: the choice is of another model")
        for module in by_layer[layer]:
            pattern[anchored(module)] = _rank_of(module, attention_rank, mlp_rank)
    return pattern


def _rank_of(module: str, attention_rank: int, mlp_rank: int) -> int:
    parts = module.split(".")
    if "self_attn" in parts:
        return attention_rank
    if "mlp" in parts:
        return mlp_rank
    raise ConfigError(f"{WHERE}: {module} lies in no self_attn and no mlp: it is not known which of the two ranks it gets")


def read_layer_scores(path: Path, modules: Iterable[str]) -> tuple[float, ...]:
    """The scores per layer of a `probe.json` for the model with these modules.

    Raises ConfigError: no such file, not a probe's, or of another model (other layers, or scored modules that this one lacks).
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; a probe writes it")
    try:
        probe = json.loads(path.read_text())
        layers = {int(layer): float(score) for layer, score in probe["layers"].items()}
        scored = list(probe["modules"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no probe.json with `layers` and `modules`: {type(error).__name__}: {error}") from None
    names = list(modules)
    if missing := [name for name in names if name not in scored]:
        raise ConfigError(
            f"{path}: the probe has no score of {missing[0]} ({len(missing)} of {len(names)} modules): it is of another model"
        )
    return layer_scores(layers, names, str(path))
