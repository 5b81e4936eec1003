"""Sampled tokens to the record that travels on: padding, masks, texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastlora.model import BaseModel
from fastlora.rollout.sampler import pad_left, pad_right
from fastlora.types import Example, Rollout


def assemble(
    model: BaseModel,
    examples: Sequence[Example],
    prompts: Sequence[Tensor],
    completions: Sequence[tuple[Tensor, Tensor, bool]],
    adapter_version: int,
    metrics: Mapping[str, float] | None = None,
) -> Rollout:
    """The rollout, on the model's device. prompts: int64 [P] per example; completions: (token ids, log-probabilities, finished) per
    sample, those of one prompt adjacent; metrics: see Rollout.
    """
    num_generations = len(completions) // max(1, len(prompts))
    prompt_ids, prompt_mask = pad_left([p for p in prompts for _ in range(num_generations)], model.pad_id)
    completion_ids, completion_mask = pad_right([ids for ids, _, _ in completions], model.pad_id, torch.long)
    sampler_logp, _ = pad_right([logp for _, logp, _ in completions], 0.0, torch.float32)
    return Rollout(
        examples=tuple(examples),
        num_generations=num_generations,
        prompt_ids_np=prompt_ids.to(model.device),
        prompt_mask_np=prompt_mask.to(model.device),
        completion_ids_nt=completion_ids.to(model.device),
        completion_mask_nt=completion_mask.to(model.device),
        sampler_logp_nt=sampler_logp.to(model.device),
        finished_n=torch.tensor([done for _, _, done in completions], device=model.device),
        texts=tuple(model.tokenizer.batch_decode([ids for ids, _, _ in completions], skip_special_tokens=True)),
        adapter_version=adapter_version,
        metrics=metrics or {},
    )
