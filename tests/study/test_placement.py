"""What scoring costs, of times that are planted."""

from __future__ import annotations

import numpy as np
import pytest

from fastlora.study.placement import Structured, _cost_claim
from fastlora.turns import Turns


@pytest.mark.parametrize(
    ("of_a_step", "silent", "percent", "verdict"),
    [
        (0.8, 0, 0.4, "supported"),
        (0.8, 9, 0.625, "not supported"),  # batches without a gradient cost something too
        (1.2, 0, 0.6, "not supported"),
        (1.0, 0, 0.5, "undecided"),
    ],
)
def test_scoring_is_said_to_cost_less_than_half_a_percent(of_a_step: float, silent: int, percent: float, verdict: str) -> None:
    """16 batches of 3,200 steps; a machine that is twice as slow in some rounds slows both."""
    slow_r = np.tile([1.0, 2.0, 1.1], 5)
    noise_r = np.exp(np.random.default_rng(0).normal(0, 0.02, 15))
    turns = Turns({"scoring": (of_a_step * slow_r * noise_r).tolist(), "step": slow_r.tolist()})
    claim = _cost_claim(Structured("grpo", 0, np.eye(16), 21.0, 16, silent), turns, 8)
    assert claim.verdict == verdict
    assert float(claim.measured.split()[0]) == pytest.approx(percent, rel=0.02)
    assert "(grpo: 21 s, " in claim.text and "% of the 8 steps here)" in claim.text
