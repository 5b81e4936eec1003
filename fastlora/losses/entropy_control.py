"""The adaptive weight of the entropy bonus (Skywork-OR1, arXiv 2505.22312), with TRL 1.16's rules.

After every optimizer step, with H the mean entropy of the tokens it trained on:

    coef ← min(coef + delta, max)  if H ≤ target,  else  max(coef − delta, min)

and the next step applies coef if H ≤ target, else nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastlora.config import LossConfig


@dataclass(frozen=True, slots=True)
class EntropyControl:
    """State between optimizer steps; part of a checkpoint."""

    coef: float
    """Weight of the entropy bonus, applied or suspended."""
    last_entropy: float = math.inf
    """Mean entropy of the last optimizer step, nats per token; infinite before the first, which therefore has no bonus."""


def applied_entropy_coef(state: EntropyControl, config: LossConfig) -> float:
    """Weight of the entropy bonus in every micro-batch of the next optimizer step."""
    suspended = config.use_adaptive_entropy and state.last_entropy > config.entropy_target
    return 0.0 if suspended else state.coef


def next_entropy_control(state: EntropyControl, entropy_sum: float, num_tokens: float, config: LossConfig) -> EntropyControl:
    """The state after an optimizer step.

    entropy_sum (nats) and num_tokens: `entropy_sum` and `entropy_tokens` of policy_loss, summed over the step's micro-batches.
    """
    if not config.use_adaptive_entropy:
        return state
    entropy = entropy_sum / max(num_tokens, 1.0)
    if entropy <= config.entropy_target:
        return EntropyControl(min(state.coef + config.entropy_coef_delta, config.entropy_coef_max), entropy)
    return EntropyControl(max(state.coef - config.entropy_coef_delta, config.entropy_coef_min), entropy)
