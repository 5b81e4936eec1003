"""From rollouts or given completions to the records that the loss reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastlora.model import BaseModel
from fastlora.prompt import encode
from fastlora.rollout.sampler import pad_left, pad_right
from fastlora.types import Example, Rollout, TrainBatch


def policy_batch(rollout: Rollout, advantages: Tensor, *, mask_truncated: bool, sampler_is_trainer: bool = True) -> TrainBatch:
    """The training record of a rollout; advantages [n] or [n,t]. mask_truncated: completions cut off at the limit do not train.

    sampler_is_trainer: what the sampler said of its tokens is what the trainer would say, and is not kept.
    """
    loss_mask = rollout.completion_mask_nt
    if mask_truncated:
        loss_mask = loss_mask & rollout.finished_n[:, None]
    return TrainBatch(
        prompt_ids_np=rollout.prompt_ids_np,
        prompt_mask_np=rollout.prompt_mask_np,
        completion_ids_nt=rollout.completion_ids_nt,
        completion_mask_nt=rollout.completion_mask_nt,
        loss_mask_nt=loss_mask,
        advantages_nt=advantages[:, None] if advantages.dim() == 1 else advantages,
        old_logp_nt=None,
        ref_logp_nt=None,
        sampler_logp_nt=None if sampler_is_trainer else rollout.sampler_logp_nt,
        num_items_in_batch=int(loss_mask.sum()),
    )


def with_policies(batch: TrainBatch, old_logp_nt: Tensor | None, ref_logp_nt: Tensor | None) -> TrainBatch:
    """The batch with the log-probabilities of the behaviour and the reference policy."""
    return replace(batch, old_logp_nt=old_logp_nt, ref_logp_nt=ref_logp_nt)


def completion_batch(examples: Sequence[Example], model: BaseModel) -> TrainBatch:
    """Supervised record: each example's prompt and its completion, ended by eos. Advantages are not used."""
    prompts = [torch.tensor(ids) for ids in encode(model.tokenizer, [example.prompt for example in examples])]
    completions = model.tokenizer([example.completion for example in examples], add_special_tokens=False).input_ids
    targets = [torch.tensor([*ids, model.eos_ids[0]]) for ids in completions]
    prompt_ids, prompt_mask = (tensor.to(model.device) for tensor in pad_left(prompts, model.pad_id))
    ids, mask = (tensor.to(model.device) for tensor in pad_right(targets, model.pad_id, torch.long))
    zeros = torch.zeros(len(examples), 1, device=model.device)
    return TrainBatch(prompt_ids, prompt_mask, ids, mask, mask, zeros, None, None, None, int(mask.sum()))
