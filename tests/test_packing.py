"""packing.pack: which token stands where, what continues what, and the way back."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastlora.packing import PackedTokens, pack
from fastlora.types import TrainBatch
from tests.batches import GROUPS, RAGGED, families, make_batch, make_group_batch
from tests.tiny import EOS_ID

BATCHES = {"lone": (make_batch(), [[n] for n in range(len(RAGGED))]), "groups": (make_group_batch(), families())}
"""Batch, and its samples by prompt."""


def _prompt(batch: TrainBatch, n: int) -> list[int]:
    return batch.prompt_ids_np[n][batch.prompt_mask_np[n]].tolist()


def _completion(batch: TrainBatch, n: int) -> list[int]:
    return batch.completion_ids_nt[n][batch.completion_mask_nt[n]].tolist()


def _expected_segments(batch: TrainBatch, samples_of: list[list[int]]) -> list[tuple[int, int, list[int]]]:
    """(root, first position, tokens): each prompt once, then its completions without their last token, shorter ones first."""
    segments: list[tuple[int, int, list[int]]] = []
    for samples in samples_of:
        completions = sorted((_completion(batch, n) for n in samples if _completion(batch, n)), key=len)
        if completions:
            prompt, root = _prompt(batch, samples[0]), len(segments)
            segments.append((root, 0, prompt))
            segments += [(root, len(prompt), tokens[:-1]) for tokens in completions if len(tokens) > 1]
    return segments


def _segments(packed: PackedTokens) -> list[tuple[int, int, list[int]]]:
    spans = itertools.pairwise(packed.cu_seqlens)
    return [
        (root, int(packed.position_ids_t[start]), packed.input_ids_t[start:end].tolist())
        for root, (start, end) in zip(packed.roots, spans, strict=True)
    ]


@pytest.mark.parametrize("kind", BATCHES)
def test_segments(kind: str) -> None:
    """No padding, a prompt once for its group, empty completions (and prompts that have no other) nowhere."""
    batch, samples_of = BATCHES[kind]
    packed = pack(batch)
    assert _segments(packed) == _expected_segments(batch, samples_of)
    for start, end in itertools.pairwise(packed.cu_seqlens):
        assert (packed.position_ids_t[start:end].diff() == 1).all()
    assert len(packed.input_ids_t) == len(packed.position_ids_t) == packed.cu_seqlens[-1]


def test_the_cost_of_groups() -> None:
    """P + Σ (C − 1) tokens a prompt."""
    paid = [(prompt, [c for c in completions if c]) for prompt, completions in GROUPS]
    assert len(pack(make_group_batch()).input_ids_t) == sum(p + sum(c - 1 for c in cs) for p, cs in paid if cs)


@pytest.mark.parametrize("kind", BATCHES)
def test_each_target_is_predicted_by_the_token_before_it(kind: str) -> None:
    """Pair c: a completion token, its cell in the rectangle, and the token before it, in its own segment or at the prompt's end."""
    batch, _ = BATCHES[kind]
    packed = pack(batch)
    assert sorted(packed.cells_c.tolist()) == batch.completion_mask_nt.flatten().nonzero().squeeze(1).tolist()
    assert torch.equal(packed.targets_c, batch.completion_ids_nt.flatten()[packed.cells_c])
    spans = list(itertools.pairwise(packed.cu_seqlens))
    width, seen = batch.completion_ids_nt.shape[1], []
    for predictor, cell in zip(packed.predictors_c.tolist(), packed.cells_c.tolist(), strict=True):
        n, column = divmod(cell, width)
        (segment,) = (s for s, (start, end) in enumerate(spans) if start <= predictor < end)
        root_start, root_end = spans[packed.roots[segment]]
        assert packed.input_ids_t[root_start:root_end].tolist() == _prompt(batch, n)
        assert packed.position_ids_t[predictor] == len(_prompt(batch, n)) + column - 1
        if column:
            start, end = spans[segment]
            assert packed.input_ids_t[start:end].tolist() == _completion(batch, n)[:-1] and predictor == start + column - 1
            seen.append((segment, n))
        else:
            assert predictor == root_end - 1
    assert len({segment for segment, _ in seen}) == len({n for _, n in seen}) == len(set(seen))  # nobody reads another's segment


def _prompts(*rows: tuple[tuple[int, ...], int]) -> TrainBatch:
    """A batch of two-token completions; rows: (ids, how many of the last ones are real)."""
    ids = torch.tensor([row for row, _ in rows])
    mask = torch.arange(ids.shape[1]) >= ids.shape[1] - torch.tensor([[real] for _, real in rows])
    return replace(make_batch([(ids.shape[1], 2)] * len(rows)), prompt_ids_np=ids, prompt_mask_np=mask)


@pytest.mark.parametrize(
    ("batch", "roots"),
    [
        (_prompts(((7, 8, 9), 3), ((7, 8, 9), 3)), (0, 0, 0)),
        (_prompts(((7, 8, 9), 2), ((5, 8, 9), 2)), (0, 0, 0)),  # they differ where nothing is a token
        (_prompts(((7, 8, 9), 3), ((7, 8, 9), 2)), (0, 0, 2, 2)),  # the same ids, one token less
        (_prompts(((7, 8, 9), 3), ((6, 8, 9), 3)), (0, 0, 2, 2)),
        (_prompts(((7, 8, 9), 3), ((1, 8, 9), 3), ((7, 8, 9), 3)), (0, 0, 2, 2, 4, 4)),  # not neighbours
    ],
    ids=["same", "padding", "length", "token", "apart"],
)
def test_neighbours_with_one_prompt_are_a_family(batch: TrainBatch, roots: tuple[int, ...]) -> None:
    assert pack(batch).roots == roots


def test_the_eos_that_ends_a_completion_is_a_target_and_padding_is_not() -> None:
    batch = make_batch()
    packed = pack(batch)
    ended = [n for n, (_, length) in enumerate(RAGGED) if length and n != 2]
    assert int((packed.targets_c == EOS_ID).sum()) == len(ended)
    assert int((batch.completion_ids_nt == EOS_ID).sum()) > len(ended)  # the padding is made of the same token


@pytest.mark.parametrize("kind", BATCHES)
def test_unpack_puts_values_back_and_lets_gradients_through(kind: str) -> None:
    batch, _ = BATCHES[kind]
    packed = pack(batch)
    values = torch.arange(1.0, 1 + len(packed.targets_c), requires_grad=True)
    rectangle = packed.unpack(values)
    assert rectangle.shape == batch.completion_mask_nt.shape
    assert torch.equal(rectangle.flatten()[packed.cells_c], values) and not rectangle[~batch.completion_mask_nt].any()
    rectangle.square().sum().backward()
    assert torch.equal(values.grad, 2 * values.detach())


def test_parts_unpack_to_the_whole() -> None:
    packed = pack(make_group_batch())
    values: Tensor = torch.arange(1.0, 1 + len(packed.targets_c))
    slices = [slice(0, 4), slice(4, 5), slice(5, len(values))]
    assert torch.equal(sum(packed.unpack(values[part], part) for part in slices), packed.unpack(values))


def test_holes_in_a_mask_are_not_tokens() -> None:
    """A mask decides what is a token, wherever it stands."""
    batch = make_batch(((3, 4),))
    mask = torch.tensor([[True, False, True, True]])
    packed = pack(replace(batch, completion_mask_nt=mask))
    assert packed.targets_c.tolist() == batch.completion_ids_nt[mask].tolist()
    assert packed.position_ids_t.tolist() == [0, 1, 2, 3, 4] and packed.cells_c.tolist() == [0, 2, 3]


@pytest.mark.parametrize("lengths", [((3, 0), (1, 0)), ((2, 0),)], ids=str)
def test_a_batch_without_completions_packs_to_nothing(lengths: tuple[tuple[int, int], ...]) -> None:
    packed = pack(make_batch(lengths))
    assert packed.cu_seqlens == (0,) and packed.roots == () and len(packed.input_ids_t) == len(packed.targets_c) == 0
    assert packed.unpack(torch.zeros(0)).shape == (len(lengths), 0)


def test_a_sample_without_a_prompt_is_refused() -> None:
    batch = make_batch()
    mask = batch.prompt_mask_np.clone()
    mask[1] = False
    with pytest.raises(ValueError, match="a sample has no prompt token: nothing predicts its first completion token"):
        pack(replace(batch, prompt_mask_np=mask))
