"""Study S3: which k entries of the B matrices train (arXiv 2605.12207): sums of gradients -> scores -> a mask of exactly k entries.

With g_1 .. g_n the gradients of one entry in n scoring batches, and the sums (Σg, Σ sign g, Σ|g|, Σg²) that the backward pass leaves:

    sign_consistency   |Σ sign g| / n
    signed_sum         |Σg|
    snr                |mean| / std, std Bessel-corrected      = |Σg|/n / √((Σg² − (Σg)²/n) / (n − 1))
    magnitude          Σ|g|
    fisher             Σg²
    random             a seeded hash of the entry, whatever its gradient
    file.py:name       the user's function

The k highest scores win; equal scores go to the larger Σ|g|, and equal ones of these to a seeded hash of module name and position. Never to
the index: of few batches many scores are equal (6 % of the entries at 5 batches), and layer 0 would get them all. Nothing depends on
the order of the modules, and the mask of k entries lies within that of any larger k of the same scope "global".

Shapes: sums_4nr float [4, n, r] in the order above, per module; scores and masks [n, r] as B.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastlora.config import ConfigError
from fastlora.plugins import load_strategy

WHERE = "placement"
"""What the messages call the setting."""

MIN_BATCHES = 16
"""Of 16 fair signs |Σ sign g| / n is 1 by chance for 3e-5 of the entries; of 5 batches for 6 %."""

SNR_LIMIT = 2.0**10
"""Float32 sums cannot tell a smaller deviation from none: Σg² and (Σg)²/n are each known to n · 2^-24 = 1e-6 of themselves, so |mean|/std
above 1e3 is noise. Everything above counts as equal."""

SCOPES = ("global", "module", "projection")


def scores(sums: Mapping[str, Tensor], batches: int, kind: str, *, seed: int = 0) -> dict[str, Tensor]:
    """Module -> score per entry of B [n, r], float64 on the CPU, higher = more worth training.

    sums: module -> sums_4nr. batches: n above. kind: a name of KINDS, or `path/to/file.py:function`, called per module as
    function(sums_4nr, batches) -> Tensor [n, r].

    Raises ConfigError: fewer than MIN_BATCHES batches, no modules, sums of another shape, an unknown kind, a score that is not finite
    (named with its module), a user's function that returns another shape.
    """
    function = load_strategy(kind, (*KINDS, "random"), WHERE)
    if batches < MIN_BATCHES:
        raise ConfigError(f"{WHERE}: {batches} scoring batches; at least {MIN_BATCHES} are needed, of fewer too many signs agree by chance")
    if not sums:
        raise ConfigError(f"{WHERE}: there are no sums to score")
    result = {}
    for name, sums_4nr in sums.items():
        if sums_4nr.ndim != 3 or sums_4nr.shape[0] != 4:
            raise ConfigError(f"{WHERE}: the sums of {name} have shape {list(sums_4nr.shape)}; [4, n, r] is needed")
        if kind == "random":
            score_nr = torch.from_numpy(_hashes(name, sums_4nr[0].numel(), seed) * 2.0**-64).reshape(sums_4nr.shape[1:])
        elif function is None:
            score_nr = KINDS[kind](sums_4nr.cpu(), batches).double()
        else:
            score_nr = _checked_shape(function(sums_4nr, batches), sums_4nr, f"{WHERE}: {kind} of {name}")
        if bad := int((~torch.isfinite(score_nr)).sum()):
            raise ConfigError(f"{WHERE}: {bad} of the {score_nr.numel()} scores ({kind}) of {name} are NaN or infinite")
        result[name] = score_nr
    return result


def _checked_shape(score_nr: object, sums_4nr: Tensor, where: str) -> Tensor:
    needed = sums_4nr.shape[1:]
    if not isinstance(score_nr, Tensor) or score_nr.shape != needed:
        shown = list(score_nr.shape) if isinstance(score_nr, Tensor) else f"a {type(score_nr).__name__}"
        raise ConfigError(f"{where} returned {shown}; a tensor {list(needed)} is needed")
    return score_nr.detach().cpu().double()


def _snr(sums_4nr: Tensor, batches: int) -> Tensor:
    total, squares = sums_4nr[0].double(), sums_4nr[3].double()
    variance = ((squares - total * total / batches) / (batches - 1)).clamp_min(0)
    ratio = (total.abs() / batches / variance.sqrt()).clamp_max(SNR_LIMIT)
    return torch.where(total == 0, 0.0, ratio)  # a gradient that is always 0 has no signal; 0/0 would be NaN


KINDS: Mapping[str, Callable[[Tensor, int], Tensor]] = {
    "sign_consistency": lambda sums_4nr, batches: sums_4nr[1].abs() / batches,
    "signed_sum": lambda sums_4nr, batches: sums_4nr[0].abs(),
    "snr": _snr,
    "magnitude": lambda sums_4nr, batches: sums_4nr[2],
    "fisher": lambda sums_4nr, batches: sums_4nr[3],
}
"""Name -> (sums_4nr, n) -> score_nr; `random` needs names and a seed and stands in `scores`."""


def top_k_mask(
    score: Mapping[str, Tensor], magnitude: Mapping[str, Tensor], k: int, *, scope: str = "global", seed: int = 0
) -> dict[str, Tensor]:
    """Module -> bool [n, r], True for exactly k entries in all; every module is there, also one without an entry.

    score: as `scores` returns. magnitude: Σ|g| per entry, the first to settle equal scores. scope: where entries compete,
        global       all of them for all k
        module       within each module, k divided by the modules' share of entries
        projection   within each type of projection (the last part of the name: q_proj), k divided by the types' share of entries
    Shares are made whole by the largest remainder, exactly (`divide`).

    Raises ConfigError: k outside 1..entries, scores that are not finite, magnitudes of other modules or shapes, an unknown scope.
    """
    if scope not in SCOPES:
        raise ConfigError(f"{WHERE}: the scope {scope!r} is unknown; there are {', '.join(SCOPES)}")
    _check_same_entries(score, magnitude)
    entries = sum(tensor.numel() for tensor in score.values())
    if not 1 <= k <= entries:
        raise ConfigError(f"{WHERE}: k = {k} entries cannot be chosen of {entries}")
    groups: dict[str, list[str]] = {}
    for name in sorted(score):
        group = {"global": "", "module": name, "projection": projection_of(name)}[scope]
        groups.setdefault(group, []).append(name)
    sizes = {group: sum(score[name].numel() for name in names) for group, names in groups.items()}
    masks: dict[str, Tensor] = {}
    for group, share in divide(k, sizes, seed).items():
        masks.update(_top_of_group(groups[group], score, magnitude, share, seed))
    return {name: masks[name] for name in score}


def projection_of(module: str) -> str:
    """Type of a module's projection: the last part of its name."""
    return module.rpartition(".")[2]


def divide(k: int, sizes: Mapping[str, int], seed: int) -> dict[str, int]:
    """k in proportion to sizes, exactly, by the largest remainder (Hamilton); equal remainders by a seeded hash of the name.

    In whole numbers, so that no rounding decides. A part is at most its size, since k ≤ Σ sizes.
    """
    entries = sum(sizes.values())
    parts = {name: k * size // entries for name, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda name: (-(k * sizes[name] % entries), _hashes(name, 1, seed)[0]))
    for name in by_remainder[: k - sum(parts.values())]:
        parts[name] += 1
    return parts


def _check_same_entries(score: Mapping[str, Tensor], magnitude: Mapping[str, Tensor]) -> None:
    for name, tensor in score.items():
        if name not in magnitude or magnitude[name].shape != tensor.shape:
            has = f"shape {list(magnitude[name].shape)}" if name in magnitude else "no magnitudes"
            raise ConfigError(f"{WHERE}: {name} has scores of shape {list(tensor.shape)} and {has}")
        for what, values in (("score", tensor), ("magnitude", magnitude[name])):
            if bad := int((~torch.isfinite(values)).sum()):
                raise ConfigError(f"{WHERE}: {bad} of the {values.numel()} {what}s of {name} are NaN or infinite")


def _top_of_group(
    names: Sequence[str], score: Mapping[str, Tensor], magnitude: Mapping[str, Tensor], k: int, seed: int
) -> Iterator[tuple[str, Tensor]]:
    def keys() -> Iterator[NDArray[np.generic]]:  # one after another: the later ones are seldom needed
        yield np.concatenate([score[name].cpu().numpy().ravel() for name in names])
        yield np.concatenate([magnitude[name].cpu().numpy().ravel() for name in names])
        yield np.concatenate([_hashes(name, score[name].numel(), seed) for name in names])

    chosen = _choose(keys(), k)
    ends = np.cumsum([score[name].numel() for name in names])
    for name, part in zip(names, np.split(chosen, ends[:-1]), strict=True):
        yield name, torch.from_numpy(part.copy()).reshape(score[name].shape)


def _choose(keys: Iterator[NDArray[np.generic]], k: int) -> NDArray[np.bool_]:
    """The k largest by the first key, equal ones by the next; bool [entries]. Linear in the entries: selects, never sorts."""
    key = next(keys)
    chosen = np.zeros(len(key), dtype=np.bool_)
    tied = np.arange(len(key))
    while 0 < k < len(tied):
        values = key[tied]
        threshold = np.partition(values, len(values) - k)[len(values) - k]
        above = tied[values > threshold]
        chosen[above] = True
        k -= len(above)
        tied = tied[values == threshold]
        following = next(keys, None)
        if following is None:  # two entries of one 64-bit hash; some entry must give way
            tied = tied[:k]
        else:
            key = following
    chosen[tied[:k]] = True
    return chosen


def _hashes(name: str, size: int, seed: int) -> NDArray[np.uint64]:
    """A 64-bit hash of (seed, name, position) for positions 0..size-1: SplitMix64 (Steele, Lea & Flood 2014), no two alike in a module."""
    start = np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(1, np.uint64)
    z = start + np.arange(size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@dataclass(frozen=True, slots=True)
class Overlap:
    """Of two masks over the same entries."""

    shared: int
    """Entries in both."""
    jaccard: float
    """shared / entries in either; NaN of two empty masks."""
    chance: float
    """Jaccard at the expected `shared` of two masks drawn at random, with as many entries in all: k₁k₂/N."""
    chance_within_modules: float
    """The same with as many entries in each module: what is above it is agreement on entries, not on modules."""


def overlap(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Overlap:
    """How far two masks choose the same entries. Raises ConfigError when they are not over the same modules and shapes."""
    shapes, others = ({name: tuple(mask.shape) for name, mask in masks.items()} for masks in (first, second))
    if shapes != others:
        name = next(name for name in [*shapes, *others] if shapes.get(name) != others.get(name))
        raise ConfigError(f"{WHERE}: two masks differ in {name}: {shapes.get(name)} and {others.get(name)}; they are of different models")
    counts_m3 = np.array([[int(a.sum()), int(second[name].sum()), a.numel()] for name, a in first.items()], dtype=np.int64)
    one, two, entries = counts_m3.sum(axis=0).tolist()
    shared = sum(int((mask & second[name]).sum()) for name, mask in first.items())
    by_module = sum(a * b / n for a, b, n in counts_m3.tolist() if n)

    def jaccard(common: float) -> float:
        return common / (one + two - common) if one + two else float("nan")

    return Overlap(shared, jaccard(shared), jaccard(one * two / entries if entries else 0), jaccard(by_module))


@dataclass(frozen=True, slots=True)
class ProjectionShare:
    """What one type of projection has of a mask."""

    chosen: int
    entries: int
    share_of_chosen: float
    share_of_entries: float
    """What `share_of_chosen` would be by chance."""


def projection_shares(masks: Mapping[str, Tensor]) -> dict[str, ProjectionShare]:
    """Type of projection -> its share of the chosen entries, and of all. Raises ConfigError when the mask has no chosen entry."""
    chosen, entries = Counter[str](), Counter[str]()
    for name, mask in masks.items():
        chosen[projection_of(name)] += int(mask.sum())
        entries[projection_of(name)] += mask.numel()
    if not chosen.total():
        raise ConfigError(f"{WHERE}: the mask has no chosen entry")
    return {kind: ProjectionShare(chosen[kind], n, chosen[kind] / chosen.total(), n / entries.total()) for kind, n in entries.items()}
