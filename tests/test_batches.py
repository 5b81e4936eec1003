"""batches: rollouts and given completions as training records."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fastlora.batches import completion_batch, policy_batch, with_policies
from fastlora.model import wrap_model
from fastlora.rollout.sampler import pad_left, pad_right
from fastlora.types import Example, Rollout
from tests.tiny import EOS_ID

LENGTHS = (5, 1, 2, 3)


def _rollout() -> Rollout:
    ids, mask = pad_right([torch.arange(3, 3 + length) for length in LENGTHS], EOS_ID, torch.long)
    prompts, prompt_mask = pad_left([torch.arange(4), torch.arange(4), torch.arange(2), torch.arange(2)], EOS_ID)
    finished = torch.tensor([False, True, True, False])
    examples = (Example(0, "a", ""), Example(1, "b", ""))
    return Rollout(examples, 2, prompts, prompt_mask, ids, mask, torch.zeros(ids.shape), finished, ("",) * 4, 0)


def test_a_rollout_becomes_a_batch() -> None:
    rollout, advantages = _rollout(), torch.randn(4)
    batch = policy_batch(rollout, advantages, mask_truncated=False)
    assert batch.advantages_nt.shape == (4, 1) and torch.equal(batch.advantages_nt[:, 0], advantages)
    assert torch.equal(batch.loss_mask_nt, batch.completion_mask_nt) and batch.num_items_in_batch == sum(LENGTHS)
    assert batch.old_logp_nt is batch.ref_logp_nt is batch.sampler_logp_nt is None
    per_token = torch.randn(4, 5)
    assert torch.equal(policy_batch(rollout, per_token, mask_truncated=False).advantages_nt, per_token)


def test_truncated_completions_can_be_masked() -> None:
    """They stay in the attention and leave loss, gradient and normaliser."""
    batch = policy_batch(_rollout(), torch.zeros(4), mask_truncated=True)
    assert batch.loss_mask_nt.sum(1).tolist() == [0, 1, 2, 0] and batch.num_items_in_batch == 3
    assert batch.completion_mask_nt.sum(1).tolist() == list(LENGTHS)


def test_policies_are_added_without_touching_the_batch() -> None:
    batch = policy_batch(_rollout(), torch.zeros(4), mask_truncated=False)
    old, ref = torch.randn(2, 4, 5)
    both = with_policies(batch, old, ref)
    assert both.old_logp_nt is old and both.ref_logp_nt is ref and batch.old_logp_nt is None


def test_micro_batches_are_consecutive_samples_and_keep_the_normaliser() -> None:
    batch = with_policies(policy_batch(_rollout(), torch.arange(4.0), mask_truncated=False), torch.randn(4, 5), None)
    parts = batch.split(2)
    assert [part.advantages_nt[:, 0].tolist() for part in parts] == [[0.0, 1.0], [2.0, 3.0]]
    assert all(part.num_items_in_batch == sum(LENGTHS) and part.ref_logp_nt is None and len(part) == 2 for part in parts)
    assert torch.equal(torch.cat([part.old_logp_nt for part in parts if part.old_logp_nt is not None]), batch.old_logp_nt)


def test_given_completions_end_in_eos(tiny_llama: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Ragged prompts and completions, one of them empty: its eos alone is trained."""
    examples = [Example(0, "2 + 2 =", "", " 4"), Example(1, "x", "", ""), Example(2, "abc", "", "defghi")]
    batch = completion_batch(examples, wrap_model(tiny_llama, tiny_tokenizer, "tiny"))
    for n, example in enumerate(examples):
        assert tiny_tokenizer.decode(batch.prompt_ids_np[n][batch.prompt_mask_np[n]]) == example.prompt
        completion = batch.completion_ids_nt[n][batch.completion_mask_nt[n]]
        assert tiny_tokenizer.decode(completion[:-1]) == example.completion and completion[-1] == EOS_ID
    assert torch.equal(batch.loss_mask_nt, batch.completion_mask_nt) and batch.num_items_in_batch == 3 + 1 + 7
