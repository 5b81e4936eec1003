"""When a step's rollout is sampled: right before it trains, or one step ahead, while the step before trains.

    on time (staleness 0)    sample 1 │ train 1 │ sample 2 │ train 2 │ ...
    ahead   (staleness 1)    sample 1 │ train 1 + sample 2 │ train 2 + sample 3 │ ...      step 2 by the policy that step 1 began with

Ahead, step t + 1 trains a policy that is one step younger than the one that sampled; `loss.sampler_correction` weighs by their ratio. What
has been sampled ahead belongs to a checkpoint: the policy that made it is gone when a run resumes.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from fastlora.rollout.sampler import Sampler, SamplerError, SamplingParams
from fastlora.types import Example, Rollout


@dataclass(frozen=True, slots=True)
class Request:
    """What one step samples."""

    examples: tuple[Example, ...]
    params: SamplingParams
    seed: int


class BackgroundSampler(Sampler, Protocol):
    """A sampler that leaves the trainer's process free."""

    def begin(self, examples: tuple[Example, ...], params: SamplingParams, *, seed: int, adapter_version: int) -> Future[Rollout]:
        """As `sample`; once it returns, the adapter may change."""
        ...


class Rollouts(Protocol):
    """Rollouts by step."""

    def take(self, step: int, adapter_version: int) -> Rollout:
        """The rollout that step `step` trains on; adapter_version: of the policy now."""
        ...

    def kept(self) -> dict[int, Rollout]:
        """By step: what was sampled ahead, and the rollout that trains now, whose step may not be finished. Waits for what is in flight."""
        ...

    def put(self, step: int, rollout: Rollout) -> None:
        """What another process kept."""
        ...


class OnTime:
    """Samples what is asked for, when it is asked for."""

    def __init__(self, sampler: Sampler, request: Callable[[int], Request]) -> None:
        self._sampler, self._request = sampler, request

    def take(self, step: int, adapter_version: int) -> Rollout:
        """See Rollouts."""
        request = self._request(step)
        return self._sampler.sample(request.examples, request.params, seed=request.seed, adapter_version=adapter_version)

    def kept(self) -> dict[int, Rollout]:
        """Nothing: the same policy samples it again."""
        return {}

    def put(self, step: int, rollout: Rollout) -> None:
        """Never called by a run of this config."""
        raise SamplerError("the checkpoint holds a rollout that was sampled ahead; resume with vllm.staleness = 1")


class Ahead:
    """Begins the next step's rollout when this step's is taken."""

    def __init__(self, sampler: BackgroundSampler, request: Callable[[int], Request], last_step: int) -> None:
        """last_step: after which nothing is sampled ahead."""
        self._sampler, self._request, self._last_step = sampler, request, last_step
        self._rollouts: dict[int, Future[Rollout]] = {}

    def take(self, step: int, adapter_version: int) -> Rollout:
        """See Rollouts. Raises what the sampler raised in the background."""
        if step not in self._rollouts:  # the first step; or its sampling failed, and the run was saved and resumed
            self._begin(step, adapter_version)
        rollout = self._rollouts[step].result()
        self._rollouts = {other: future for other, future in self._rollouts.items() if other >= step}
        if step < self._last_step and step + 1 not in self._rollouts:
            self._begin(step + 1, adapter_version)
        return rollout

    def _begin(self, step: int, adapter_version: int) -> None:
        request = self._request(step)
        future = self._sampler.begin(request.examples, request.params, seed=request.seed, adapter_version=adapter_version)
        self._rollouts[step] = future

    def kept(self) -> dict[int, Rollout]:
        """See Rollouts; without what the sampler failed at: the next `take` will say so."""
        return {step: future.result() for step, future in self._rollouts.items() if future.exception() is None}

    def put(self, step: int, rollout: Rollout) -> None:
        """See Rollouts."""
        self._rollouts[step] = Future()
        self._rollouts[step].set_result(rollout)
