"""A choice of layers: layer_selection.selections = ["all", "docs/own/selection.py:every_other"]."""

from collections.abc import Sequence


def every_other(scores_l: Sequence[float], count: int, *, seed: int) -> list[int]:
    """`count` layers, evenly spaced over the depth."""
    return [round(i * (len(scores_l) - 1) / max(count - 1, 1)) for i in range(count)]
