"""The deposit contract: where scores go for ragged completions, and how several rewards are merged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastlora.rewards.deposits import RewardError, check_deposits, combine, deposit_at_end
from fastlora.rewards.registry import Rewards
from fastlora.types import Deposits, Example, Rollout
from tests.rewards.rollouts import make_rollout

SCORES = st.one_of(st.none(), st.floats(-3, 3, width=32))


@given(st.lists(st.tuples(st.integers(0, 6), SCORES), min_size=1, max_size=9))
def test_score_lands_on_the_last_valid_token(rows: list[tuple[int, float | None]]) -> None:
    rollout = make_rollout(["x"] * len(rows), ["1"] * len(rows), [length for length, _ in rows])
    deposits = deposit_at_end([score for _, score in rows], rollout)
    width = max(length for length, _ in rows)
    assert deposits.token_rewards_nt.shape == deposits.step_reward_mask_nt.shape == (len(rows), width)
    assert deposits.token_rewards_nt.dtype == deposits.trajectory_rewards_n.dtype == torch.float32
    assert not deposits.dense
    for n, (length, score) in enumerate(rows):
        wanted, holds = [0.0] * width, [False] * width
        if length and score is not None:
            wanted[length - 1], holds[length - 1] = score, True
        assert deposits.token_rewards_nt[n].tolist() == wanted
        assert deposits.step_reward_mask_nt[n].tolist() == holds
        total = float(deposits.trajectory_rewards_n[n])
        assert math.isnan(total) if score is None else total == score


def test_combine_is_the_weighted_sum_and_leaves_out_what_could_not_be_scored() -> None:
    rollout = make_rollout(["x"] * 4, ["1"] * 4, [1, 3, 0, 2])
    one = deposit_at_end([1.0, None, 1.0, None], rollout)
    two = deposit_at_end([0.5, 4.0, 1.0, None], rollout)
    merged = combine([one, two], torch.tensor([2.0, -1.0]))
    assert merged.token_rewards_nt.tolist() == [[1.5, 0, 0], [0, 0, -4.0], [0, 0, 0], [0, 0, 0]]
    assert merged.step_reward_mask_nt.tolist() == [[True, False, False], [False, False, True], [False] * 3, [False] * 3]
    assert merged.trajectory_rewards_n[:3].tolist() == [1.5, -4.0, 1.0]
    assert merged.trajectory_rewards_n[3].isnan()
    assert not merged.dense


def test_combine_refuses_dense_with_sparse() -> None:
    sparse = deposit_at_end([1.0], make_rollout(["x"], ["1"]))
    with pytest.raises(RewardError, match="mixes dense"):
        combine([sparse, replace(sparse, dense=True)], torch.ones(2))


class Given:
    """A reward that deposits what it was given."""

    name = "given"
    timeouts = 0

    def __init__(self, deposits: object) -> None:
        self._deposits = deposits

    def __call__(self, rollout: Rollout) -> Deposits:
        return self._deposits  # type: ignore[return-value]

    def check(self, examples: Sequence[Example]) -> None: ...

    def close(self) -> None: ...


def _put(name: str, place: tuple[int, ...], value: float) -> Callable[[Deposits], Deposits]:
    def damaged(deposits: Deposits) -> Deposits:
        tensor = getattr(deposits, name).clone()
        tensor[place] = value
        return replace(deposits, **{name: tensor})

    return damaged


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: None, "reward given returned NoneType; it must return Deposits"),
        (_put("token_rewards_nt", (2, 1), math.nan), r"deposited nan at token 1 of completion 2 \(example 101\), that is not finite"),
        (_put("token_rewards_nt", (0, 0), math.inf), "deposited inf at token 0 of completion 0 .* not finite"),
        (_put("token_rewards_nt", (0, 0), 2.0), "deposited 2.0 at token 0 .* where it says that it deposits nothing"),
        (_put("step_reward_mask_nt", (3, 2), True), "at token 2 of completion 3 .* that is no token of it"),
        (_put("trajectory_rewards_n", (1,), -math.inf), "gave completion 1 an infinite reward"),
        (
            lambda d: replace(d, token_rewards_nt=d.token_rewards_nt[:, :2]),
            r"token_rewards_nt as torch.float32 \[4, 2\] on cpu; .*\[4, 3\]",
        ),
        (lambda d: replace(d, token_rewards_nt=d.token_rewards_nt.double()), "token_rewards_nt as torch.float64"),
        (lambda d: replace(d, trajectory_rewards_n=d.trajectory_rewards_n[:, None]), r"trajectory_rewards_n as torch.float32 \[4, 1\]"),
        (lambda d: replace(d, step_reward_mask_nt=d.token_rewards_nt), "step_reward_mask_nt as torch.float32"),
    ],
)
def test_a_reward_that_breaks_the_contract_is_named(damage: Callable[[Deposits], Deposits], message: str) -> None:
    rollout = make_rollout(["x"] * 4, ["1", "2"], [3, 2, 3, 1])
    deposits = deposit_at_end([1.0, None, 0.5, 0.0], rollout)
    check_deposits("given", deposits, rollout)
    good = Given(deposits)
    assert Rewards([good])(rollout).unscorable == 1
    with pytest.raises(RewardError, match=message):
        Rewards([good, Given(damage(deposits))])(rollout)
