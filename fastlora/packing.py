"""Padding stripped and prompts shared: the tokens of a batch in one row, with what is needed to attend, to score and to put results back.

Samples of one prompt that follow each other are a family: the prompt is one segment, computed once, and each completion without its last
token (nothing is predicted from it) is a segment that continues it: P + Σ (C − 1) tokens instead of Σ (P + C − 1). A completion
token is predicted by the token before it, the first one of every completion by the prompt's last. Masks decide what is a
token, never ids: an eos that ends a completion trains even when pad = eos.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora.types import TrainBatch


@dataclass(frozen=True, slots=True)
class PackedTokens:
    """T model tokens in one row; C (prediction, completion token) pairs."""

    input_ids_t: Tensor
    """int64 [T]."""
    position_ids_t: Tensor
    """int64 [T], from 0 in every prompt; a completion goes on where its prompt ends."""
    cu_seqlens: tuple[int, ...]
    """First token of every segment, and T: [segments + 1]."""
    roots: tuple[int, ...]
    """Segment that each segment continues, or itself: ops.packed_attention."""
    predictors_c: Tensor
    """int64 [C], the tokens whose hidden state predicts a completion token."""
    targets_c: Tensor
    """int64 [C], the completion tokens."""
    cells_c: Tensor
    """int64 [C], where each result belongs in the flattened [n,t] rectangle."""
    shape_nt: tuple[int, int]

    def unpack(self, values_c: Tensor, pairs: slice = slice(None)) -> Tensor:
        """values of all pairs, or of `pairs` -> [n,t], zeros elsewhere; differentiable."""
        rectangle = values_c.new_zeros(self.shape_nt[0] * self.shape_nt[1])
        return rectangle.index_put((self.cells_c[pairs],), values_c).view(self.shape_nt)


def pack(batch: TrainBatch) -> PackedTokens:
    """The batch without its padding; samples without completion tokens vanish, and so do prompts that only they have.

    Raises ValueError for a sample without prompt tokens: nothing would predict its first completion token.
    """
    if bool((batch.prompt_mask_np.sum(1) == 0).any()):
        raise ValueError("a sample has no prompt token: nothing predicts its first completion token")
    device, width = batch.completion_ids_nt.device, batch.completion_ids_nt.shape[1]
    lengths = batch.completion_mask_nt.sum(1).tolist()
    ids, positions, predictors, targets, cells, cu_seqlens = [], [], [], [], [], [0]
    roots: list[int] = []
    for samples in _families(batch):
        # Shorter completions first: neighbours of one length attend as one batch in the torch implementation.
        samples = sorted((n for n in samples if lengths[n]), key=lengths.__getitem__)
        if not samples:
            continue
        root, prompt = len(roots), batch.prompt_ids_np[samples[0]][batch.prompt_mask_np[samples[0]]]
        segments = [prompt]
        for n in samples:
            columns = batch.completion_mask_nt[n].nonzero().squeeze(1)
            completion, start = batch.completion_ids_nt[n][columns], cu_seqlens[-1] + sum(map(len, segments))
            predictors += [torch.tensor([cu_seqlens[-1] + len(prompt) - 1]), torch.arange(start, start + len(completion) - 1)]
            targets.append(completion)
            cells.append(n * width + columns)
            segments += [completion[:-1]] * (len(completion) > 1)
        for segment in segments:
            first = 0 if segment is prompt else len(prompt)
            ids.append(segment)
            positions.append(torch.arange(first, first + len(segment)))
            cu_seqlens.append(cu_seqlens[-1] + len(segment))
            roots.append(root)
    empty = torch.zeros(0, dtype=torch.long)
    input_ids, target, cell = (torch.cat([empty.to(device), *parts]) for parts in (ids, targets, cells))
    position_ids, predictor = (torch.cat([empty, *parts]).to(device) for parts in (positions, predictors))
    return PackedTokens(input_ids, position_ids, tuple(cu_seqlens), tuple(roots), predictor, target, cell, (len(batch), width))


def _families(batch: TrainBatch) -> Iterator[list[int]]:
    """Runs of neighbouring samples with the same prompt."""
    same = (batch.prompt_ids_np == batch.prompt_ids_np.roll(1, 0)) | ~batch.prompt_mask_np
    same &= batch.prompt_mask_np == batch.prompt_mask_np.roll(1, 0)
    family: list[int] = []
    for n, continues in enumerate(same.all(1).tolist()):
        if family and not continues:
            yield family
            family = []
        family.append(n)
    if family:
        yield family
