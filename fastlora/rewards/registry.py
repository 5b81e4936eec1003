"""Names of rewards -> reward functions: the built-in ones and users' own (`path/to/file.py:function`).

To add one: write fastlora/rewards/NAME.py with `score(texts, examples)` and `gold_problems(answers)`, name it in `_make`. A reward that
runs a language model takes its section of the config and the policy, and is named in `_make_with_model`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from fastlora.config import RewardConfig
from fastlora.reward_config import MODEL_REWARDS
from fastlora.rewards import exact_match, first_integer, gsm8k
from fastlora.rewards.deposits import Rewarded, RewardError, RewardFunction, check_deposits, combine
from fastlora.rewards.sandbox import Sandbox
from fastlora.rewards.text import SandboxedReward, TextReward
from fastlora.types import Example, Rollout

if TYPE_CHECKING:
    from fastlora.rewards.models import Policy

IN_PROCESS = {"exact_match": exact_match, "first_integer": first_integer, "gsm8k": gsm8k}
BUILT_IN = ("outcome", *IN_PROCESS, "format")
"""Those that read a completion's text. `MODEL_REWARDS` come on top."""

OUTCOME_MEMORY_LIMIT = 4 << 30
"""Bytes of address space for math-verify; it maps about .3 GiB, and a completion may ask it for 10^10^9."""

_HERE = Path(__file__).parent


class Rewards:
    """All reward functions of a run, called together; a context manager that ends their processes."""

    def __init__(
        self, functions: Sequence[RewardFunction], weights: Sequence[float] | None = None, grader: RewardFunction | None = None
    ) -> None:
        """weights: one per function; None = 1 each. grader: see `grader`; None = the first of the functions."""
        self.functions = tuple(functions)
        self.names = tuple(function.name for function in functions)
        self.weights_k = torch.tensor([1.0] * len(functions) if weights is None else list(weights), dtype=torch.float32)
        self._grader = grader

    @property
    def grader(self) -> RewardFunction:
        """What judges held-out answers: right = it gives 1."""
        return self._grader or self.functions[0]

    def __call__(self, rollout: Rollout) -> Rewarded:
        """The rollout's rewards. Raises RewardError if a function raises or returns something else than its scores."""
        before = self._timeouts()
        deposits = [function(rollout) for function in self.functions]
        for name, one in zip(self.names, deposits, strict=True):
            check_deposits(name, one, rollout)
        return Rewarded(
            names=self.names,
            weights_k=self.weights_k,
            rewards_nk=torch.stack([one.trajectory_rewards_n for one in deposits], dim=1),
            deposits=combine(deposits, self.weights_k),
            timeouts=self._timeouts() - before,
        )

    def check(self, examples: Sequence[Example]) -> None:
        """Before training: every function starts, and can use every gold answer; RewardError names the first that cannot."""
        for function in self._all():
            function.check(examples)

    def close(self) -> None:
        """Ends the functions' processes."""
        for function in self._all():
            function.close()

    def __enter__(self) -> Rewards:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _all(self) -> tuple[RewardFunction, ...]:
        return self.functions if self._grader is None or self._grader in self.functions else (*self.functions, self._grader)

    def _timeouts(self) -> int:
        return sum(function.timeouts for function in self.functions)


def load_rewards(config: RewardConfig, policy: Policy | None = None) -> Rewards:
    """The rewards that a config names; no process is started yet. policy: what rewards with a language model need.

    Raises RewardError for an unknown name, a name given twice, a file that is not there, an invalid format_pattern, a teacher with another
    vocabulary, a judge without the tags, no policy where one is needed; else what load_reward_model raises.
    """
    twice = {name for name in config.functions if config.functions.count(name) > 1}
    if twice:
        raise RewardError(f"reward.functions names {', '.join(sorted(twice))} twice; give it once, with a weight")
    functions = {name: _make(name, config, policy) for name in config.functions}
    grader = None if config.grader is None else functions.get(config.grader) or _make(config.grader, config, policy)
    return Rewards(list(functions.values()), config.weights, grader)


def load_grader(config: RewardConfig) -> Rewards:
    """Only what judges held-out answers, which needs no model. Raises RewardError as load_rewards does."""
    return Rewards([_make(config.grader or config.functions[0], config, None)])


def _make_with_model(name: str, config: RewardConfig, policy: Policy | None) -> RewardFunction:
    if policy is None:
        raise RewardError(f"reward {name} runs a language model beside the one that trains, and there is none here")
    from fastlora.rewards.distillation import DistillationReward  # these two import transformers: 5 s for those who need no model
    from fastlora.rewards.process import ProcessReward

    return ProcessReward(config.process, policy) if name == "process" else DistillationReward(config.distillation, policy)


def _make(name: str, config: RewardConfig, policy: Policy | None) -> RewardFunction:
    if name in MODEL_REWARDS:
        return _make_with_model(name, config, policy)
    if name in IN_PROCESS:
        module = IN_PROCESS[name]
        return TextReward(name, module.score, module.gold_problems)
    if name == "outcome":
        sandbox = Sandbox(_HERE / "outcome.py", {"score": {}, "gold_problems": {}}, name, memory_limit=OUTCOME_MEMORY_LIMIT)
        return SandboxedReward(name, sandbox, function="score", timeout=config.timeout, together=False, gold_function="gold_problems")
    if name == "format":
        try:
            re.compile(config.format_pattern)
        except re.error as error:
            raise RewardError(f"reward.format_pattern = {config.format_pattern!r} is no regular expression: {error}") from None
        sandbox = Sandbox(_HERE / "format.py", {"score": {"pattern": config.format_pattern}}, name)
        return SandboxedReward(name, sandbox, function="score", timeout=config.timeout, together=False, gold_function=None)
    path, _, function = name.rpartition(":")
    if Path(path).suffix != ".py" or not function:
        near = get_close_matches(name, (*BUILT_IN, *MODEL_REWARDS))
        hint = f"did you mean {', '.join(near)}?" if near else f"built in are {', '.join((*BUILT_IN, *MODEL_REWARDS))};"
        raise RewardError(f"reward.functions: {name!r} is unknown; {hint} one's own is written path/to/file.py:function")
    if not Path(path).is_file():
        raise RewardError(f"reward.functions: {name!r}: no such file as {Path(path).resolve()}")
    sandbox = Sandbox(Path(path), {function: {}}, name)
    return SandboxedReward(name, sandbox, function=function, timeout=config.timeout, together=True, gold_function=None)
