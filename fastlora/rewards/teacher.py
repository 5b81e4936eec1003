"""The teacher of the distillation reward: the log-probabilities that another model gives to the student's own tokens.

The student's token ids are the teacher's input, so that the two must number their tokens alike.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastlora.model import BaseModel
from fastlora.prompt import encode
from fastlora.reward_config import DistillationConfig
from fastlora.rewards.deposits import RewardError
from fastlora.rewards.models import Policy, load_reward_model, score_rollout
from fastlora.types import Example, Rollout


class Teacher:
    """log π_teacher of a rollout's tokens."""

    def __init__(self, config: DistillationConfig, policy: Policy) -> None:
        """Raises RewardError for a teacher with another vocabulary; else as load_reward_model."""
        self._policy = policy
        self._teacher = load_reward_model(config, policy, "reward.distillation")
        refuse_other_vocabulary(policy.model, self._teacher.model)

    def score(self, rollout: Rollout) -> Tensor:
        """float32 [n, t] on the CPU; temperature and layout are the student's (rewards.models.score_rollout)."""
        with self._teacher.running() as model:
            return score_rollout(self._policy.config, model, rollout)

    def check(self, examples: Sequence[Example]) -> None:
        """Raises RewardError for a prompt that, with the longest completion, exceeds what the teacher can read."""
        teacher, student = self._teacher.model, self._policy.model
        room = teacher.context_length - self._policy.config.rollout.max_completion_length
        if teacher.context_length >= student.context_length:
            return  # the data were cut to the student's
        for example, ids in zip(examples, encode(student.tokenizer, [example.prompt for example in examples]), strict=True):
            if len(ids) > room:
                raise RewardError(
                    f"reward distillation: the prompt of example {example.index} has {len(ids)} tokens, and {teacher.source} reads "
                    f"{teacher.context_length}, completion included; lower data.max_prompt_length or rollout.max_completion_length"
                )


def refuse_other_vocabulary(student: BaseModel, teacher: BaseModel) -> None:
    """Raises RewardError unless every token of the student has the same id with the teacher (which may have more), and a logit."""
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    odd = sorted((index, token) for token, index in ours.items() if theirs.get(token) != index)
    if odd:
        index, token = odd[0]
        raise RewardError(
            f"reward.distillation: {teacher.source} has another vocabulary than {student.source}: {len(odd)} of {len(ours)} tokens differ, "
            f"the first is {token!r}, {index} here and {theirs.get(token, 'absent')} there. Choose a teacher of the same family"
        )
    rows, needed = (model.module.get_output_embeddings().weight.shape[0] for model in (teacher, student))
    if rows < needed:
        raise RewardError(
            f"reward.distillation: {teacher.source} has logits for {rows} tokens and {student.source}, which samples, for {needed}; "
            "choose a teacher of the same family"
        )
