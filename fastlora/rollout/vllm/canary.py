"""Does the engine hold the policy that the trainer holds? Asked after every swap, before the first sample.

Two questions, as exact as the engine allows:

1. Which bits lie in the slots that the kernels read? Checksums per module, exact in every dtype; only of an engine of our own.
2. What does it say? log π of the most likely next tokens after a few fixed prompts, by the path that sampling takes (the prefix cache
   included: a prompt is longer than one of its blocks), against the trainer's own forward pass of the same prompts.

    difference = max |log π_engine − log π_trainer|        tolerance = MARGIN × the same maximum for the base model, measured at the start

The base model has no adapter to get wrong: its difference is what two correct implementations in this dtype make of the same weights.
Whether the second question could have told the new policy from the one before it is measured as well: `effect`, the largest difference
between the trainer's two policies at the tokens that were compared. An effect below DECIDABLE × tolerance decides nothing: in bfloat16 a
step moves log-probabilities by less than the dtype's own gap. Then only checksums decide; without them the answer is "undecidable at
this precision", never "passed".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora.rollout.sampler import SamplerError

MARGIN = 4.0
"""Tolerance over the base model's own maximum, which is the largest of forty numbers: the next forty may lie further out."""

DECIDABLE = 2.0
"""An engine on the old policy differs by the effect, give or take the tolerance; from twice the tolerance on it is caught for certain."""

SMALLEST_TOLERANCE = 2e-5
"""Nats; 20 float32 roundings of a log-probability of −8, for models so small that both sides agree almost to the bit."""


LARGEST_GAP = {torch.float32: 1e-3, torch.bfloat16: 1.5}
"""Nats that two correct implementations of one base model may differ by at those tokens. SmolLM2-135M: 3e-5 and .25. Another checkpoint
with the same vocabulary differs by several."""


class CanaryError(SamplerError):
    """The engine does not hold the trainer's policy. Nothing was sampled from it; no retry would help."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a comparison that did not fail found."""

    max_abs: float
    """Largest |log π_engine − log π_trainer|, nats."""
    tolerance: float
    effect: float
    """Largest change of the trainer's own log-probabilities since the policy before, at the same tokens; nats."""
    decided: bool
    """The comparison, or the checksums, would have seen the policy before."""

    def undecided(self) -> str:
        """For a person."""
        return (
            f"undecidable at this precision: the policy moved by {self.effect:.2g} nats, the sides may differ by {self.tolerance:.2g}, "
            "and this server cannot show its weights"
        )


class Canary:
    """Fixed prompts and the tolerance on them, of every server its own."""

    def __init__(self, prompts: Sequence[Sequence[int]], dtype: torch.dtype) -> None:
        """dtype: of the base model, on both sides."""
        self.prompts = [list(prompt) for prompt in prompts]
        self._dtype = dtype
        self.tolerances: dict[str, float] = {}

    def calibrate(self, base_pv: Tensor, said: Sequence[Mapping[int, float]], *, who: str) -> float:
        """Makes the base model's own gap on a server the measure of its tolerance; returns the gap. base_pv: the trainer's, [prompts, v].

        Raises CanaryError when no precision explains the gap: the server has another base model.
        """
        gap = _largest(base_pv, said)
        if not gap <= LARGEST_GAP[self._dtype]:  # NaN too
            raise CanaryError(
                f"{who} serves another base model than the trainer's: without any adapter its log-probabilities differ by up to {gap:.3g} "
                f"nats, and {self._dtype} explains no more than {LARGEST_GAP[self._dtype]:g}. Compare model.name, dtype and revision"
            )
        self.tolerances[who] = max(SMALLEST_TOLERANCE, MARGIN * gap)
        return gap

    def check(
        self, expected_pv: Tensor, before_pv: Tensor, said: Sequence[Mapping[int, float]], *, who: str, version: int, exact: bool
    ) -> Finding:
        """expected_pv, before_pv: see Policy. said: per prompt, token -> the server's log-probability. exact: bits were compared already.

        Raises CanaryError when they are further off than the tolerance.
        """
        difference = _largest(expected_pv, said)
        tolerance = self.tolerances[who]
        if not difference <= tolerance:  # NaN too
            old = _largest(before_pv, said) <= tolerance
            raise CanaryError(
                f"{who} does not sample from version {version}: its log-probabilities differ from the trainer's by up to "
                f"{difference:.3g} nats, and {tolerance:.3g} is what the precision explains. "
                f"{'They are those of the policy before: the swap did not reach it. ' if old else ''}Nothing was sampled"
            )
        moved = [(expected_pv[p] - before_pv[p])[list(tokens)].abs().max() for p, tokens in enumerate(said)]
        effect = float(torch.stack(moved).max())
        return Finding(difference, tolerance, effect, exact or effect >= DECIDABLE * tolerance)


def _largest(expected_pv: Tensor, said: Sequence[Mapping[int, float]]) -> float:
    """max |log π_engine − log π_trainer| over all prompts and tokens; NaN when one of them is NaN."""
    gaps = [torch.tensor(list(logp.values())) - expected_pv[p][list(logp)] for p, logp in enumerate(said)]
    return float(torch.cat(gaps).abs().max())


def compare_checksums(expected: Mapping[str, tuple[int, int]], found: Mapping[str, Sequence[int]], *, who: str, version: int) -> None:
    """Module -> (checksum of A, of s B), both sides. Raises CanaryError that names the modules."""
    wrong = [
        f"{name}: {_what(expected.get(name), found.get(name))}"
        for name in sorted(expected.keys() | found.keys())
        if tuple(found.get(name, ())) != expected.get(name)
    ]
    if wrong:
        shown = "; ".join(wrong[:4]) + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        raise CanaryError(
            f"{who} holds other weights than version {version} of the trainer in {len(wrong)} of {len(expected)} modules: {shown}. "
            "Nothing was sampled"
        )


def _what(expected: tuple[int, int] | None, found: Sequence[int] | None) -> str:
    if expected is None:
        return "adapted there, not here"
    if found is None:
        return "not adapted there"
    if tuple(found) == (-1, -1):
        return "entries beyond its rank"
    return " and ".join(which for which, a, b in zip(("A", "B"), expected, found, strict=True) if a != b) + " differs"
