"""Training batches for tests: ragged prompts and completions in the padded layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastlora.rollout.sampler import pad_left, pad_right
from fastlora.types import TrainBatch
from tests.tiny import EOS_ID, VOCAB_SIZE

RAGGED = ((5, 7), (1, 1), (12, 3), (2, 0), (3, 11), (4, 10), (9, 1))
"""(prompt, completion) lengths: single tokens, an empty completion, longest prompt and longest completion in different rows,
two neighbours of equal length."""


def make_batch(lengths: Sequence[tuple[int, int]] = RAGGED, seed: int = 0) -> TrainBatch:
    """Random tokens padded with eos; every completion but the third ends in eos, which is a real token there."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(3, VOCAB_SIZE, (p,), generator=generator) for p, _ in lengths]
    completions = [torch.randint(3, VOCAB_SIZE, (c,), generator=generator) for _, c in lengths]
    for n, completion in enumerate(completions):
        if len(completion) and n != 2:
            completion[-1] = EOS_ID
    prompt_ids, prompt_mask = pad_left(prompts, EOS_ID)
    ids, mask = pad_right(completions, EOS_ID, torch.long)
    advantages = torch.randn(len(lengths), 1, generator=generator)
    return TrainBatch(prompt_ids, prompt_mask, ids, mask, mask, advantages, None, None, None, int(mask.sum()))
