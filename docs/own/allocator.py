"""An allocator of ranks: rank_allocation.strategies = ["uniform", "docs/own/allocator.py:two_levels"]."""

from collections.abc import Sequence


def two_levels(scores_l: Sequence[float], budget: int, *, r_min: int, r_max: int, granularity: int, seed: int) -> list[int]:
    """r_min everywhere, and what is left to the layers with the highest scores, each filled up to r_max before the next."""
    ranks, left = [r_min] * len(scores_l), budget - r_min * len(scores_l)
    for layer in sorted(range(len(scores_l)), key=lambda layer: -scores_l[layer]):
        more = min(r_max - r_min, left)
        ranks[layer] += more
        left -= more
    return ranks
