"""Padding stripped: the tokens of a batch in one row, with what is needed to attend, to score and to put results back.

Sequence i contributes its prompt and its completion without the last token (nothing is predicted from it). A completion token
is predicted by the token before it, so that the first one is predicted by the prompt's last. Masks decide what is a token,
never ids: an eos that ends a completion trains even when pad = eos.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora.types import TrainBatch


@dataclass(frozen=True, slots=True)
class PackedTokens:
    """T model tokens in one row, C of which predict completion tokens."""

    input_ids_t: Tensor
    """int64 [T]."""
    position_ids_t: Tensor
    """int64 [T], from 0 in every sequence."""
    cu_seqlens: tuple[int, ...]
    """First token of every sequence, and T: [sequences + 1]."""
    predictors_c: Tensor
    """int64 [C], the tokens whose hidden state predicts a completion token."""
    targets_c: Tensor
    """int64 [C], the completion tokens."""
    cells_c: Tensor
    """int64 [C], where each result belongs in the flattened [n,t] rectangle."""
    shape_nt: tuple[int, int]

    def unpack(self, values_c: Tensor) -> Tensor:
        """values [C] -> [n,t], zeros where there is no completion token; differentiable."""
        rectangle = values_c.new_zeros(self.shape_nt[0] * self.shape_nt[1])
        return rectangle.index_put((self.cells_c,), values_c).view(self.shape_nt)


def pack(batch: TrainBatch) -> PackedTokens:
    """The batch without its padding, shorter samples first (equal lengths attend as one batch); those without completion tokens vanish.

    Raises ValueError for a sample without prompt tokens: nothing would predict its first completion token.
    """
    if bool((batch.prompt_mask_np.sum(1) == 0).any()):
        raise ValueError("a sample has no prompt token: nothing predicts its first completion token")
    device = batch.completion_ids_nt.device
    ids, positions, predictors, targets, cells, cu_seqlens = [], [], [], [], [], [0]
    width = batch.completion_ids_nt.shape[1]
    lengths = (batch.prompt_mask_np.sum(1) + batch.completion_mask_nt.sum(1)).tolist()
    for n in sorted(range(len(batch)), key=lengths.__getitem__):
        prompt = batch.prompt_ids_np[n][batch.prompt_mask_np[n]]
        columns = batch.completion_mask_nt[n].nonzero().squeeze(1)
        if not len(columns):
            continue
        completion = batch.completion_ids_nt[n][columns]
        start, length = cu_seqlens[-1], len(prompt) + len(completion) - 1
        ids += [prompt, completion[:-1]]
        positions.append(torch.arange(length, device=device))
        predictors.append(torch.arange(start + len(prompt) - 1, start + length, device=device))
        targets.append(completion)
        cells.append(n * width + columns)
        cu_seqlens.append(start + length)
    empty = torch.zeros(0, dtype=torch.long, device=device)
    input_ids, position_ids, predictor, target, cell = (
        torch.cat([empty, *parts]) for parts in (ids, positions, predictors, targets, cells)
    )
    return PackedTokens(input_ids, position_ids, tuple(cu_seqlens), predictor, target, cell, (len(batch), width))
