"""Rewards that read a completion's text and give it one number: the two ways to run such a scorer.

    scorer(texts, examples) -> list of float or None (None = cannot be scored), one per text

Built-in scorers and users' functions have this one shape. `TextReward` calls it here, `SandboxedReward` in
a process that can be killed. Both deposit the number at the completion's last token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from fastlora.rewards.deposits import RewardError, deposit_at_end
from fastlora.rewards.sandbox import NoAnswer, Sandbox
from fastlora.types import Deposits, Example, Rollout

Scorer = Callable[[Sequence[str], Sequence[Example]], list[float | None]]
GoldProblems = Callable[[Sequence[str]], list[str | None]]
"""Gold answers -> what is wrong with each, None = nothing."""

HOPELESS = 3
"""A user's function that hung on a prompt's completions and then on this many of them singly is broken, not unlucky."""


class TextReward:
    """A scorer whose time is bounded by the length of the text, called in this process."""

    def __init__(self, name: str, scorer: Scorer, gold_problems: GoldProblems) -> None:
        self.name = name
        self.timeouts = 0
        self._scorer = scorer
        self._gold_problems = gold_problems

    def __call__(self, rollout: Rollout) -> Deposits:
        examples = [example for example in rollout.examples for _ in range(rollout.num_generations)]
        return deposit_at_end(self._scorer(rollout.texts, examples), rollout)

    def check(self, examples: Sequence[Example]) -> None:
        refuse_gold(self.name, examples, self._gold_problems([example.answer for example in examples]))

    def close(self) -> None:
        """Nothing runs."""


class SandboxedReward:
    """The function `score` of a file, called in a process that is killed when a completion takes longer than `timeout` seconds.

    together: the function sees all completions of a prompt in one call, limited to `timeout` for each of them; if that call
    hangs or dies, they are scored one by one, so that only the guilty ones score 0. Otherwise one completion a call.
    """

    def __init__(self, name: str, sandbox: Sandbox, *, function: str, timeout: float, together: bool, gold_function: str | None) -> None:
        self.name = name
        self.timeouts = 0
        self._sandbox = sandbox
        self._function = function
        self._timeout = timeout
        self._together = together
        self._gold_function = gold_function

    def __call__(self, rollout: Rollout) -> Deposits:
        scores: list[float | None] = []
        for i, example in enumerate(rollout.examples):
            texts = rollout.texts[i * rollout.num_generations : (i + 1) * rollout.num_generations]
            scores += self._score_together(texts, example) if self._together else self._score_singly(texts, example)
        return deposit_at_end(scores, rollout)

    def check(self, examples: Sequence[Example]) -> None:
        self._sandbox.start()
        if self._gold_function is None:
            return
        answers = sorted({example.answer for example in examples})
        problems = dict(zip(answers, [self._gold_problem(answer) for answer in answers], strict=True))
        refuse_gold(self.name, examples, [problems[example.answer] for example in examples])

    def close(self) -> None:
        self._sandbox.close()

    def _score_together(self, texts: Sequence[str], example: Example) -> list[float | None]:
        try:
            return self._ask(texts, example)
        except NoAnswer:
            return self._score_singly(texts, example, hopeless=HOPELESS)

    def _score_singly(self, texts: Sequence[str], example: Example, hopeless: int | None = None) -> list[float | None]:
        scores: list[float | None] = []
        lost = 0
        for text in texts:
            try:
                scores += self._ask([text], example)
            except NoAnswer:
                scores.append(0.0)
                lost += 1
            if lost == len(scores) == hopeless:
                raise RewardError(
                    f"reward {self.name} hangs or dies: no answer within {self._timeout} s per completion, for those of "
                    f"example {example.index}, together or one by one. Repair the function, or raise reward.timeout"
                )
        self.timeouts += lost
        return scores

    def _ask(self, texts: Sequence[str], example: Example) -> list[float | None]:
        """Scores of some completions of one example; raises NoAnswer, or RewardError that names function and example."""
        args: list[list[Any]] = [list(texts), [asdict(example)] * len(texts)]
        try:
            scores = self._sandbox.call(self._function, args, self._timeout * len(texts))
        except RewardError as error:
            raise RewardError(f"{error}, scoring completions of example {example.index}") from error
        if len(scores) != len(texts) or any(isinstance(score, str) for score in scores):
            raise RewardError(
                f"reward {self.name} gave {scores!r} for {len(texts)} completions of example {example.index}; "
                "it must return a list of one number (or None) per completion"
            )
        return scores

    def _gold_problem(self, answer: str) -> str | None:
        assert self._gold_function is not None
        try:
            return self._sandbox.call(self._gold_function, [[answer]], self._timeout)[0]
        except NoAnswer:
            return f"no answer from the parser within reward.timeout = {self._timeout} s"


def refuse_gold(name: str, examples: Sequence[Example], problems: Sequence[str | None]) -> None:
    """Raises RewardError for the first gold answer that has a problem, and counts the others."""
    bad = [(example, problem) for example, problem in zip(examples, problems, strict=True) if problem is not None]
    if bad:
        example, problem = bad[0]
        raise RewardError(
            f"reward {name} cannot use the gold answer {example.answer!r} of example {example.index}: {problem} "
            f"({len(bad)} of {len(examples)} rows are affected). Correct the rows, or choose another of reward.functions"
        )
