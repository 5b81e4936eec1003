"""`distillation`: what the teacher thinks of each token, against what the student does (on-policy distillation, O(N) deposits).

    r_t = log π_teacher(o_t | o_<t) − log π_θ(o_t | o_<t), clipped to ± clip        at every token of a completion

Σ_t r_t of a completion is an estimate of −KL(π_θ ‖ π_teacher) (github gernim/lora-reward-density, after Thinking Machines' On-Policy
Distillation, 2025). π_θ is the policy that is about to train, scored again by the trainer and not by the sampler. Both sides are at
rollout.temperature and over the full softmax (rewards.models.score_rollout).
"""

from __future__ import annotations

from collections.abc import Sequence

from fastlora.reward_config import DistillationConfig
from fastlora.rewards.models import Policy
from fastlora.rewards.teacher import Teacher
from fastlora.types import Deposits, Example, Rollout


class DistillationReward:
    """Dense deposits; a completion's own number is the mean over its tokens, NaN if it has none."""

    name = "distillation"
    timeouts = 0

    def __init__(self, config: DistillationConfig, policy: Policy) -> None:
        """Raises what Teacher raises."""
        self._clip, self._policy = config.clip, policy
        self._teacher = Teacher(config, policy)

    def __call__(self, rollout: Rollout) -> Deposits:
        rewards_nt = self._teacher.score(rollout) - self._policy.score(rollout)
        if self._clip is not None:
            rewards_nt = rewards_nt.clamp(-self._clip, self._clip)
        mask_nt = rollout.completion_mask_nt.cpu()
        rewards_nt = rewards_nt.float().masked_fill(~mask_nt, 0.0)
        return Deposits(
            token_rewards_nt=rewards_nt,
            trajectory_rewards_n=rewards_nt.sum(1) / mask_nt.sum(1),  # 0 / 0 = NaN
            step_reward_mask_nt=mask_nt,
            dense=True,
        )

    def check(self, examples: Sequence[Example]) -> None:
        self._teacher.check(examples)

    def close(self) -> None:
        """Nothing runs."""
