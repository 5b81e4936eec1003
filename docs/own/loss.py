"""A loss: loss.function = "docs/own/loss.py:reinforce"."""

import torch

from fastlora.types import TrainBatch


def reinforce(logp_nt: torch.Tensor, batch: TrainBatch) -> torch.Tensor:
    """−A log π of each token (Williams 1992, eq. 11): on-policy, its gradient is that of the clipped surrogate."""
    return -batch.advantages_nt * logp_nt
