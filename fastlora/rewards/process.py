"""`process`: a process reward model judges every step of a completion (Math-Shepherd, arXiv 2312.08935; O(S) deposits).

    r_s = P(+) = exp l₊ / (exp l₊ + exp l₋)        l: logits of the judge at the tag behind step s

The judge is a causal LM with tokens of its own; it reads text, `prompt_template` and then each step by `step_template`:

    What is 2 + 3 · 4? 3 · 4 = 12 ки⏎2 + 12 = 14 ки⏎

**Steps, in token space.** A completion is cut behind every token whose text holds a newline (`⏎`, `.⏎`, `⏎⏎`, `⏎` and its indentation).
What is white space or special tokens alone (an empty line, the eos) makes no step and belongs to the step before it, or to the first one
where there is none before. So every token belongs to one step, `⏎` `⏎` and `⏎⏎` are the same, and the last step, cut off or not, ends at
the completion's last token. The last token of a step holds its reward.

A completion without a step (no tokens, newlines only), and one whose text the judge cannot read (longer than its context, a tag melted into
the step before it), deposits nothing; its own number is NaN. Otherwise that is the mean over its steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastlora.model import BaseModel
from fastlora.policy import hidden_states
from fastlora.prompt import PromptError, fill_template
from fastlora.reward_config import ProcessConfig
from fastlora.rewards.deposits import RewardError
from fastlora.rewards.models import Policy, load_reward_model
from fastlora.types import Deposits, Example, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a completion."""

    text: str
    """Without white space around it and without special tokens."""
    last: int
    """Its last token, counted in the completion."""


class StepCutter:
    """Token ids of a completion -> its steps, by the rule above."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """tokenizer: the policy's."""
        self._tokenizer = tokenizer
        self._ends_line: dict[int, bool] = {}

    def __call__(self, ids: Sequence[int]) -> list[Step]:
        steps: list[Step] = []
        start = 0
        for end in [i + 1 for i, token in enumerate(ids) if self._newline(token) or i + 1 == len(ids)]:
            text = self._text(ids[start:end]).strip()
            if text:
                steps.append(Step(text, end - 1))
            elif steps:
                steps[-1] = replace(steps[-1], last=end - 1)
            start = end
        return steps

    def _newline(self, token: int) -> bool:
        if token not in self._ends_line:
            self._ends_line[token] = "\n" in self._text([token])
        return self._ends_line[token]

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@dataclass(frozen=True, slots=True)
class Tags:
    """Token ids of the judge's tags."""

    step: int
    positive: int
    negative: int


@dataclass(frozen=True, slots=True)
class Reading:
    """A completion as the judge reads it."""

    ids: list[int]
    """The judge's tokens of the prompt and all steps."""
    tags: list[int]
    """Position in `ids` of the tag behind each step."""


class StepWriter:
    """Steps -> what the judge reads. The text is encoded as a whole, as the judge was trained; tags are found by their place in it, so that
    a completion which writes one itself confuses nobody."""

    def __init__(self, config: ProcessConfig, judge: BaseModel) -> None:
        """Raises RewardError for a step_template without its fields, and for tags that are not single tokens of the judge, by name."""
        head, tag, self._after = config.step_template.partition("{tag}")
        self._before, step, self._between = head.partition("{step}")
        if not (tag and step) or "{tag}" in self._after or "{step}" in self._between + self._after:
            raise RewardError(f"reward.process.step_template = {config.step_template!r} must have {{step}} once and then {{tag}} once")
        self._config, self._judge = config, judge
        self.tags = self._tags()

    def prompt(self, example: Example) -> str:
        """What stands before the first step. Raises PromptError for a field that the example does not have."""
        question = {"question": example.question} if example.question else {}
        return fill_template(self._config.prompt_template, {**example.metadata, **question})

    def __call__(self, example: Example, steps: Sequence[Step]) -> Reading | None:
        """None if the judge cannot read it: longer than its context, or a tag that is not a token of its own there."""
        text, ends = self._write(self.prompt(example), steps)
        encoded = self._judge.tokenizer(text)
        ids, places = encoded["input_ids"], [encoded.char_to_token(end - 1) for end in ends]
        if len(ids) > self._judge.context_length or any(place is None or ids[place] != self.tags.step for place in places):
            return None
        return Reading(ids, places)

    def _write(self, text: str, steps: Sequence[Step]) -> tuple[str, list[int]]:
        """(the text, where each tag in it ends)."""
        ends = []
        for step in steps:
            text += f"{self._before}{step.text}{self._between}{self._config.step_tag}"
            ends.append(len(text))
            text += self._after
        return text, ends

    def _tags(self) -> Tags:
        config, tokenizer = self._config, self._judge.tokenizer
        if not tokenizer.is_fast:
            raise RewardError(f"reward.process: {self._judge.source} has no fast tokenizer, which says where a token stands in the text")
        found = {
            "step_tag": self._step_tag(),
            "positive_tag": tokenizer(config.positive_tag, add_special_tokens=False)["input_ids"],
            "negative_tag": tokenizer(config.negative_tag, add_special_tokens=False)["input_ids"],
        }
        bad = [
            f"{name} = {getattr(config, name)!r} ({len(ids)}: {', '.join(repr(tokenizer.decode([token])) for token in ids)})"
            for name, ids in found.items()
            if len(ids) != 1
        ]
        if bad:
            raise RewardError(
                f"reward.process: not one token of {self._judge.source}, but several: {'; '.join(bad)}. Choose tags that are, or the model "
                "that they are of"
            )
        tags = Tags(*(ids[0] for ids in found.values()))
        if tags.positive == tags.negative:
            raise RewardError("reward.process: positive_tag and negative_tag are the same token; every step would be worth 1/2")
        return tags

    def _step_tag(self) -> list[int]:
        """Tokens of the step tag behind a step. (Alone it may be another token than behind a space.)"""
        text, (end,) = self._write("", [Step("1", 0)])
        encoded = self._judge.tokenizer(text, add_special_tokens=False)
        places = [encoded.char_to_token(i) for i in range(end - len(self._config.step_tag), end)]
        return [encoded["input_ids"][place] for place in sorted({place for place in places if place is not None})]


class ProcessReward:
    """Sparse deposits, one a step."""

    name = "process"
    timeouts = 0

    def __init__(self, config: ProcessConfig, policy: Policy) -> None:
        """Raises RewardError for tags or templates that cannot work; else as load_reward_model."""
        self._judge = load_reward_model(config, policy, "reward.process")
        self._cut, self._write = StepCutter(policy.model.tokenizer), StepWriter(config, self._judge.model)
        self._batch_size = config.batch_size

    def __call__(self, rollout: Rollout) -> Deposits:
        mask_nt, ids_nt = rollout.completion_mask_nt.cpu(), rollout.completion_ids_nt.cpu()
        steps = [self._cut(ids_t[mask_t].tolist()) for ids_t, mask_t in zip(ids_nt, mask_nt, strict=True)]
        readings = {}
        for n in range(len(steps)):
            reading = self._write(rollout.examples[n // rollout.num_generations], steps[n]) if steps[n] else None
            if reading is not None:
                readings[n] = reading
        rewards_nt, at_nt = torch.zeros(mask_nt.shape), torch.zeros_like(mask_nt)
        means_n = torch.full((len(steps),), torch.nan)
        for n, rewards_s in zip(readings, self.judge(list(readings.values())), strict=True):
            last_s = torch.tensor([step.last for step in steps[n]])
            rewards_nt[n, last_s], at_nt[n, last_s] = rewards_s, True
            means_n[n] = rewards_s.mean()
        return Deposits(rewards_nt, means_n, at_nt, dense=False)

    def judge(self, readings: Sequence[Reading]) -> list[Tensor]:
        """P(+) float32 [steps], on the CPU, of each completion."""
        tags, rewards = self._write.tags, []
        with self._judge.running() as model:
            head = model.module.get_output_embeddings()
            ids_2 = torch.tensor([tags.positive, tags.negative], device=head.weight.device)
            weight_2d, bias_2 = head.weight[ids_2].double(), 0.0 if head.bias is None else head.bias[ids_2].double()
            for first in range(0, len(readings), self._batch_size):
                part = readings[first : first + self._batch_size]
                hidden_td = hidden_states(model.module, [reading.ids for reading in part])
                starts = accumulate((len(reading.ids) for reading in part), initial=0)
                rows = [start + tag for start, reading in zip(starts, part, strict=False) for tag in reading.tags]
                logits_s2 = hidden_td[rows].double() @ weight_2d.t() + bias_2
                rewards_s = logits_s2.softmax(1)[:, 0].float().cpu()
                rewards += rewards_s.split([len(reading.tags) for reading in part])
        return rewards

    def check(self, examples: Sequence[Example]) -> None:
        for example in examples:
            try:
                self._write.prompt(example)
            except PromptError as error:
                raise RewardError(f"reward.process.prompt_template: example {example.index}: {error}") from error

    def close(self) -> None:
        """Nothing runs."""
