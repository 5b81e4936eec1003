"""Held-out evaluation: greedy pass@1 and unbiased pass@k on a fixed split, an interval with each.

python -m fastlora.evaluate runs/NAME                        the adapter that the run trained
python -m fastlora.evaluate runs/NAME --adapter FOLDER       any PEFT adapter, on the run's problems
python -m fastlora.evaluate runs/NAME --adapter none         the base model
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fastlora.atomic import atomic_write_text
from fastlora.config import RolloutConfig, RunConfig
from fastlora.rewards.deposits import RewardFunction
from fastlora.rollout.sampler import Sampler, SamplingParams
from fastlora.statistics import PassAtK, Proportion, pass_at_k, proportion_interval
from fastlora.types import Example

EVALUATION_SEED = 20_261_121
"""Of the samples behind pass@k: the same for every run, so that two evaluations differ by the policy alone."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One held-out problem, answered greedily."""

    index: int
    prompt: str
    completion: str
    gold: str
    correct: bool


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All held-out problems, answered greedily; and, if asked for, how often samples of them are right."""

    answers: tuple[Answer, ...]
    pass_at_k: tuple[PassAtK, ...] = ()

    @property
    def correct(self) -> list[bool]:
        """One per problem, in the split's order."""
        return [answer.correct for answer in self.answers]

    @property
    def accuracy(self) -> Proportion:
        """Fraction right with its Wilson interval."""
        return proportion_interval(sum(self.correct), len(self.answers))

    @property
    def pass_at_k_intervals(self) -> dict[int, tuple[float, float, float]]:
        """k -> (estimate, low, high)."""
        return {estimate.k: (estimate.value, estimate.low, estimate.high) for estimate in self.pass_at_k}

    def write(self, path: Path) -> None:
        """One answer a line; the pass@k estimates beside them, in `<stem>.pass_at_k.json`, if there are any."""
        if self.pass_at_k:
            estimates = json.dumps([asdict(estimate) for estimate in self.pass_at_k], indent=2)
            atomic_write_text(path.with_suffix(".pass_at_k.json"), estimates + "\n")
        atomic_write_text(path, "".join(json.dumps(asdict(answer)) + "\n" for answer in self.answers))

    @classmethod
    def read(cls, path: Path) -> Evaluation:
        """What `write` wrote."""
        answers = tuple(Answer(**json.loads(line)) for line in path.read_text().splitlines())
        estimates = path.with_suffix(".pass_at_k.json")
        return cls(answers, tuple(PassAtK(**one) for one in json.loads(estimates.read_text())) if estimates.exists() else ())


def evaluate(
    sampler: Sampler,
    grade: RewardFunction,
    examples: Sequence[Example],
    config: RunConfig,
    *,
    adapter_version: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Greedy answers to every example, and the config's pass@k estimates; progress is told the problems answered so far."""
    answers = answer_greedily(sampler, grade, examples, config.rollout, adapter_version=adapter_version, progress=progress)
    return Evaluation(answers, _pass_at_k(sampler, grade, examples, config, adapter_version))


def answer_greedily(
    sampler: Sampler,
    grade: RewardFunction,
    examples: Sequence[Example],
    rollout: RolloutConfig,
    *,
    adapter_version: int,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[Answer, ...]:
    """The most likely completion of every example; right = the reward `grade` gives 1. progress is told the problems done so far."""
    params = SamplingParams(1, rollout.max_completion_length, temperature=0.0, stop=rollout.stop)
    answers: list[Answer] = []
    for first in range(0, len(examples), rollout.batch_size):
        block = examples[first : first + rollout.batch_size]
        sampled = sampler.sample(block, params, seed=EVALUATION_SEED, adapter_version=adapter_version)
        rewards = grade(sampled).trajectory_rewards_n.tolist()
        answers += [
            Answer(example.index, example.prompt, text, example.answer, reward == 1.0)
            for example, text, reward in zip(block, sampled.texts, rewards, strict=True)
        ]
        progress(len(answers))
    return tuple(answers)


def _pass_at_k(
    sampler: Sampler, grade: RewardFunction, examples: Sequence[Example], config: RunConfig, adapter_version: int
) -> tuple[PassAtK, ...]:
    """One estimate per k of `eval.pass_at_k`, all from the same samples at the training temperature (Chen et al. 2021, eq. 1)."""
    wanted, rollout = config.eval, config.rollout
    if not wanted.pass_at_k:
        return ()
    params = SamplingParams(wanted.num_samples, rollout.max_completion_length, rollout.temperature, rollout.top_p, rollout.stop)
    num_correct: list[int] = []
    per_batch = max(1, rollout.batch_size // wanted.num_samples)
    for first in range(0, len(examples), per_batch):
        block = examples[first : first + per_batch]
        sampled = sampler.sample(block, params, seed=EVALUATION_SEED + first, adapter_version=adapter_version)
        right = (grade(sampled).trajectory_rewards_n == 1.0).view(len(block), wanted.num_samples)
        num_correct += right.sum(1).to(torch.int64).tolist()
    return tuple(pass_at_k(wanted.num_samples, num_correct, k) for k in wanted.pass_at_k)
