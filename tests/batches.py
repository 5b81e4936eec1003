"""Training batches for tests: ragged prompts and completions in the padded layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fastlora.rollout.sampler import pad_left, pad_right
from fastlora.types import TrainBatch
from tests.tiny import EOS_ID, VOCAB_SIZE

RAGGED = ((5, 7), (1, 1), (12, 3), (2, 0), (3, 11), (4, 10), (9, 1))
"""(prompt, completion) lengths: single tokens, an empty completion, longest prompt and longest completion in different rows,
two neighbours of equal length."""

GROUPS = ((5, (7, 1, 0, 7)), (1, (3,)), (12, (0, 0)), (3, (11, 2, 1)), (3, (4, 4)), (9, (1, 1)))
"""(prompt length, completion lengths) of groups that share a prompt: ragged, alone, empty, with another group's prompt length, predicted
by the prompt alone; no group is sorted by length."""


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


def families(groups: Sequence[tuple[int, Sequence[int]]] = GROUPS) -> list[list[int]]:
    """Samples of each group."""
    samples = iter(range(sum(len(completions) for _, completions in groups)))
    return [[next(samples) for _ in completions] for _, completions in groups]


def make_group_batch(groups: Sequence[tuple[int, Sequence[int]]] = GROUPS, seed: int = 0) -> TrainBatch:
    """As `make_batch`; the samples of a group have one prompt."""
    batch = make_batch([(prompt, completion) for prompt, completions in groups for completion in completions], seed)
    first = [samples[0] for samples in families(groups) for _ in samples]
    return replace(batch, prompt_ids_np=batch.prompt_ids_np[first])
