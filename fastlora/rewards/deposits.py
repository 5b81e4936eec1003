"""The deposit contract: every reward says where it put how much; nothing after it asks which reward it was.

    one score per completion:   token_rewards_nt[n, last valid token of n] = score[n], 0 elsewhere
    several rewards, weights w: token_rewards_nt = Σ_k w_k · token_rewards_knt     (for advantage.estimator = "deposits")
                                rewards_nk                                         (for advantage.estimator = "trajectory")

n completions, t tokens, k reward functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastlora.errors import FastloraError
from fastlora.types import Deposits, Example, Rollout


class RewardError(FastloraError):
    """A reward that cannot go on; the message names the function, the example and the cause. The caller saves the run."""


class RewardFunction(Protocol):
    """One reward: rollout -> deposits."""

    name: str
    """As in reward.functions; names the reward in metrics and errors."""
    timeouts: int
    """Completions scored 0 so far because their grader hung or died."""

    def __call__(self, rollout: Rollout) -> Deposits:
        """Raises RewardError if the reward's own code fails."""
        ...

    def check(self, examples: Sequence[Example]) -> None:
        """Called once, before training: raises RewardError if the reward cannot start or cannot use a gold answer."""
        ...

    def close(self) -> None:
        """Ends whatever runs for this reward; it may be called again afterwards and starts anew."""
        ...


@dataclass(frozen=True, slots=True)
class Rewarded:
    """A rollout's rewards, k functions."""

    names: tuple[str, ...]
    """k names."""
    weights_k: Tensor
    """float32, reward.weights."""
    rewards_nk: Tensor
    """float32, unweighted; NaN = function k could not score completion n."""
    deposits: Deposits
    """The weighted sum of all functions' deposits."""
    timeouts: int
    """Scores of this rollout that are 0 because a grader hung or died."""

    @property
    def unscorable(self) -> int:
        """Scores of this rollout that are NaN."""
        return int(self.rewards_nk.isnan().sum())


def deposit_at_end(scores: Sequence[float | None], rollout: Rollout) -> Deposits:
    """Each score at its completion's last valid token; None, and a completion without tokens, deposit nothing."""
    mask_nt = rollout.completion_mask_nt.cpu()
    values = [math.nan if score is None else score for score in scores]
    scores_n = torch.tensor(values, dtype=torch.float32)
    valid_from_here_nt = mask_nt.flip(1).cumsum(1).flip(1)  # valid tokens from t on; 1 at the last one
    step_nt = mask_nt & (valid_from_here_nt == 1) & ~scores_n.isnan()[:, None]
    return Deposits(
        token_rewards_nt=torch.where(step_nt, scores_n[:, None], 0.0),
        trajectory_rewards_n=scores_n,
        step_reward_mask_nt=step_nt,
        dense=False,
    )


def check_deposits(name: str, deposits: Deposits, rollout: Rollout) -> None:
    """Raises RewardError, naming the reward, for deposits of a wrong type or shape, at padding, or not finite."""
    mask_nt = rollout.completion_mask_nt.cpu()
    if not isinstance(deposits, Deposits):
        raise RewardError(f"reward {name} returned {type(deposits).__name__}; it must return Deposits (fastlora/types.py)")
    for field, dtype, shape in (
        ("token_rewards_nt", torch.float32, mask_nt.shape),
        ("trajectory_rewards_n", torch.float32, mask_nt.shape[:1]),
        ("step_reward_mask_nt", torch.bool, mask_nt.shape),
    ):
        tensor = getattr(deposits, field)
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device.type != "cpu":
            found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            raise RewardError(f"reward {name} returned {field} as {found}; it must be {dtype} {list(shape)} on the CPU")
    at_nt = deposits.step_reward_mask_nt
    for problem, bad_nt in (
        ("that is no token of it", at_nt & ~mask_nt),
        ("that is not finite", ~deposits.token_rewards_nt.isfinite()),
        ("where it says that it deposits nothing", ~at_nt & (deposits.token_rewards_nt != 0)),
    ):
        if bool(bad_nt.any()):
            sample, token = bad_nt.nonzero()[0].tolist()
            value, index = float(deposits.token_rewards_nt[sample, token]), rollout.examples[sample // rollout.num_generations].index
            raise RewardError(f"reward {name} deposited {value} at token {token} of completion {sample} (example {index}), {problem}")
    if bool(deposits.trajectory_rewards_n.isinf().any()):
        sample = int(deposits.trajectory_rewards_n.isinf().nonzero()[0])
        raise RewardError(f"reward {name} gave completion {sample} an infinite reward; it must be finite, or NaN = cannot be scored")


def combine(deposits: Sequence[Deposits], weights_k: Tensor) -> Deposits:
    """The weighted sum. A trajectory reward leaves out what could not be scored (TRL's nansum); NaN if nothing could.

    Raises RewardError for dense and sparse deposits together: a normalised deposit and a return-to-go cannot share one stream.
    """
    if len({one.dense for one in deposits}) > 1:
        raise RewardError("reward.functions mixes dense rewards (one per token) with sparse ones; train on one kind")
    token_knt = torch.stack([one.token_rewards_nt for one in deposits])
    rewards_nk = torch.stack([one.trajectory_rewards_n for one in deposits], dim=1)
    total_n = (rewards_nk * weights_k).nansum(dim=1)
    return Deposits(
        token_rewards_nt=torch.einsum("k,knt->nt", weights_k, token_knt),
        trajectory_rewards_n=torch.where(rewards_nk.isnan().all(dim=1), torch.nan, total_n),
        step_reward_mask_nt=torch.stack([one.step_reward_mask_nt for one in deposits]).any(dim=0),
        dense=deposits[0].dense,
    )
