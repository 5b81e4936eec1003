"""The protocol of every sampler: prompts in, completions with token ids, log-probabilities and the policy's version out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastlora.errors import FastloraError
from fastlora.types import Example, Rollout


class SamplerError(FastloraError):
    """A sampler that cannot deliver; the message says what happened and what to do."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample."""

    num_generations: int
    """Completions per prompt."""
    max_completion_length: int
    """Tokens."""
    temperature: float = 1.0
    """Logits are divided by this; 0 = greedy."""
    top_p: float = 1.0
    """Smallest nucleus whose probability reaches this; 1 = all tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion."""


class Sampler(Protocol):
    """What the trainer and the evaluation need of a sampler."""

    def sample(self, examples: Sequence[Example], params: SamplingParams, *, seed: int, adapter_version: int) -> Rollout:
        """Completions for every example under the current adapter. The same arguments and weights give the same bits."""
        ...


def derived_seed(seed: int, part: int) -> int:
    """Seed of one part (a step of a run, a prompt of a rollout) of what has a seed: a function of the two, so that a resumed run needs no
    state."""
    return int(np.random.SeedSequence([seed, part]).generate_state(1, np.uint64)[0] >> 1)


def pad_right(rows: Sequence[Tensor], value: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Ragged rows -> ([n, longest] filled with `value`, bool mask)."""
    width = max((len(row) for row in rows), default=0)
    padded = torch.full((len(rows), width), value, dtype=dtype)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for n, row in enumerate(rows):
        padded[n, : len(row)] = row
        mask[n, : len(row)] = True
    return padded, mask


def pad_left(rows: Sequence[Tensor], value: int) -> tuple[Tensor, Tensor]:
    """Ragged token rows -> (int64 [n, longest], bool mask), real tokens at the right edge."""
    padded, mask = pad_right([row.flip(0) for row in rows], value, torch.long)
    return padded.flip(1), mask.flip(1)
