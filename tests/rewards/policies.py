"""A policy for the tests of rewards that run a model: exact in fp64, with an uneven adapter; and rollouts of real tokens for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fastlora.config import RunConfig
from fastlora.model import wrap_model
from fastlora.rewards.models import Policy
from fastlora.rollout.sampler import pad_left, pad_right
from fastlora.types import Example, Rollout
from tests.exact import make_exact_model
from tests.lora.adapters import attach_uneven

TEMPERATURE = 0.7


def make_policy(tokenizer: PreTrainedTokenizerBase, name: str = "tiny", **sections: Any) -> Policy:
    """A tiny Llama; `sections` go into the config."""
    rollout = {"num_prompts": 2, "num_generations": 3, "max_completion_length": 60, "temperature": TEMPERATURE, "top_p": 0.9}
    config = RunConfig(**{"model": {"name": name, "dtype": "float32"}, "rollout": rollout, **sections})
    model = wrap_model(make_exact_model("llama"), tokenizer, name)
    return Policy(config, model, attach_uneven(model.module))


def token_rollout(questions: Sequence[str], completions: Sequence[Sequence[int]]) -> Rollout:
    """Equally many completions for each question; the prompt is the question's characters."""
    g = len(completions) // len(questions)
    prompts = [torch.tensor([ord(c) % 90 + 5 for c in question]) for question in questions for _ in range(g)]
    prompt_ids, prompt_mask = pad_left(prompts, 2)
    ids, mask = pad_right([torch.tensor(c, dtype=torch.long) for c in completions], 2, torch.long)
    return Rollout(
        examples=tuple(Example(100 + i, question, "", question=question) for i, question in enumerate(questions)),
        num_generations=g,
        prompt_ids_np=prompt_ids,
        prompt_mask_np=prompt_mask,
        completion_ids_nt=ids,
        completion_mask_nt=mask,
        sampler_logp_nt=torch.zeros(ids.shape),
        finished_n=torch.ones(len(completions), dtype=torch.bool),
        texts=tuple("" for _ in completions),
        adapter_version=0,
    )
