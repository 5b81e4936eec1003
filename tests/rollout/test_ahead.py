"""Which step's rollout is sampled when, and what a checkpoint must keep; the sampler is a list of what it was asked (a stand-in)."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
import torch

from fastlora.rollout.ahead import Ahead, OnTime, Request
from fastlora.rollout.sampler import SamplerError, SamplingParams
from fastlora.types import Example, Rollout

PARAMS = SamplingParams(num_generations=1, max_completion_length=1)


def request(step: int) -> Request:
    return Request((Example(step, f"step {step}", ""),), PARAMS, seed=100 + step)


def rollout(step: int, version: int) -> Rollout:
    empty = torch.zeros(1, 0)
    return Rollout(request(step).examples, 1, empty, empty, empty, empty, empty, torch.zeros(1), ("",), version)


class Diary:
    """Notes (seed, adapter version) of every request and answers at once."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.asked: list[tuple[int, int]] = []
        self.fails_at = fails_at

    def sample(self, examples, params, *, seed: int, adapter_version: int) -> Rollout:
        return self.begin(examples, params, seed=seed, adapter_version=adapter_version).result()

    def begin(self, examples, params, *, seed: int, adapter_version: int) -> Future[Rollout]:
        self.asked.append((seed - 100, adapter_version))
        future: Future[Rollout] = Future()
        if seed - 100 == self.fails_at:
            self.fails_at = None
            future.set_exception(SamplerError("planted"))
        else:
            future.set_result(rollout(seed - 100, adapter_version))
        return future


def versions(rollouts: dict[int, Rollout]) -> dict[int, int]:
    return {step: one.adapter_version for step, one in rollouts.items()}


def test_on_time_samples_with_the_policy_of_the_step() -> None:
    diary = Diary()
    rollouts = OnTime(diary, request)
    assert [rollouts.take(step, step - 1).adapter_version for step in (1, 2, 3)] == [0, 1, 2]
    assert diary.asked == [(1, 0), (2, 1), (3, 2)] and rollouts.kept() == {}
    with pytest.raises(SamplerError, match=r"vllm\.staleness = 1"):
        rollouts.put(4, rollout(4, 3))


def test_ahead_samples_with_the_policy_of_the_step_before_and_nothing_after_the_last() -> None:
    diary = Diary()
    rollouts = Ahead(diary, request, last_step=3)
    assert [rollouts.take(step, step - 1).adapter_version for step in (1, 2, 3)] == [0, 0, 1]
    assert diary.asked == [(1, 0), (2, 0), (3, 1)]


def test_what_is_kept_makes_a_resumed_run_the_same_whenever_it_stopped() -> None:
    whole = Ahead(Diary(), request, last_step=9)
    taken = [whole.take(step, step - 1) for step in (1, 2, 3)]
    kept = whole.kept()
    assert versions(kept) == {3: 1, 4: 2}, "the one that trains now, and the next"
    for first, expected in ((3, [1, 2, 3]), (4, [2, 3, 4])):  # stopped inside step 3, or after it
        diary = Diary()
        resumed = Ahead(diary, request, last_step=9)
        for step, one in kept.items():
            resumed.put(step, one)
        again = [resumed.take(step, step - 1) for step in range(first, first + 3)]
        assert [one.adapter_version for one in again] == expected
        assert diary.asked == [(step + 1, step - 1) for step in range(4, first + 3)]
    assert taken[2] is kept[3]


def test_a_failure_in_the_background_is_raised_when_it_is_taken_and_not_kept() -> None:
    rollouts = Ahead(Diary(fails_at=2), request, last_step=9)
    rollouts.take(1, 0)
    assert versions(rollouts.kept()) == {1: 0}
    with pytest.raises(SamplerError, match="planted"):
        rollouts.take(2, 1)
