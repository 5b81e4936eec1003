"""Hand-made rollouts for the tests of rewards."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastlora.types import Example, Rollout


def make_rollout(texts: Sequence[str], golds: Sequence[str], lengths: Sequence[int] | None = None) -> Rollout:
    """texts: completions, equally many for each gold answer. lengths: valid tokens of each (3), right-padded to the longest."""
    lengths = [3] * len(texts) if lengths is None else lengths
    n, t = len(texts), max(lengths, default=0)
    mask_nt = torch.arange(t) < torch.tensor(lengths)[:, None]
    return Rollout(
        examples=tuple(Example(index, f"prompt {index}", gold) for index, gold in enumerate(golds, 100)),
        num_generations=n // len(golds),
        prompt_ids_np=torch.zeros(n, 1, dtype=torch.int64),
        prompt_mask_np=torch.ones(n, 1, dtype=torch.bool),
        completion_ids_nt=torch.full((n, t), 7),
        completion_mask_nt=mask_nt,
        sampler_logp_nt=torch.zeros(n, t),
        finished_n=torch.ones(n, dtype=torch.bool),
        texts=tuple(texts),
        adapter_version=0,
    )
