"""packing.pack: which token stands where, and the way back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastlora.packing import pack
from tests.batches import RAGGED, make_batch
from tests.tiny import EOS_ID

PACKED_ORDER = sorted((n for n, (_, completion) in enumerate(RAGGED) if completion), key=lambda n: sum(RAGGED[n]))
"""Samples with completion tokens, shorter ones first, equal ones as they came."""


def test_rows_are_concatenated_without_padding() -> None:
    """Each sequence is its prompt and its completion without the last token, at positions from 0; empty completions vanish."""
    batch = make_batch()
    packed = pack(batch)
    assert packed.cu_seqlens == tuple(torch.tensor([0, *(sum(RAGGED[n]) - 1 for n in PACKED_ORDER)]).cumsum(0).tolist())
    for start, end, n in zip(packed.cu_seqlens, packed.cu_seqlens[1:], PACKED_ORDER, strict=False):
        prompt = batch.prompt_ids_np[n][batch.prompt_ids_np.shape[1] - RAGGED[n][0] :]
        tokens = [*prompt.tolist(), *batch.completion_ids_nt[n][: RAGGED[n][1] - 1].tolist()]
        assert packed.input_ids_t[start:end].tolist() == tokens
        assert packed.position_ids_t[start:end].tolist() == list(range(len(tokens)))
    assert len(packed.input_ids_t) == len(packed.position_ids_t) == packed.cu_seqlens[-1]


def test_each_target_is_predicted_by_the_token_before_it() -> None:
    """In the whole sequence, the token after predictor c is target c; cells name the target's place in the rectangle."""
    batch = make_batch()
    packed = pack(batch)
    flat_ids, flat_mask = batch.completion_ids_nt.flatten(), batch.completion_mask_nt.flatten()
    assert sorted(packed.cells_c.tolist()) == flat_mask.nonzero().squeeze(1).tolist()
    assert torch.equal(packed.targets_c, flat_ids[packed.cells_c])
    whole = [
        [*batch.prompt_ids_np[n][batch.prompt_mask_np[n]].tolist(), *batch.completion_ids_nt[n][: RAGGED[n][1]].tolist()]
        for n in PACKED_ORDER
    ]
    following = torch.tensor([token for sequence in whole for token in sequence[1:]])
    assert torch.equal(following[packed.predictors_c], packed.targets_c)


def test_the_eos_that_ends_a_completion_is_a_target_and_padding_is_not() -> None:
    batch = make_batch()
    packed = pack(batch)
    ended = [n for n, (_, length) in enumerate(RAGGED) if length and n != 2]
    assert int((packed.targets_c == EOS_ID).sum()) == len(ended)
    assert int((batch.completion_ids_nt == EOS_ID).sum()) > len(ended)  # the padding is made of the same token


def test_unpack_puts_values_back_and_lets_gradients_through() -> None:
    batch = make_batch()
    packed = pack(batch)
    values = torch.arange(1.0, 1 + len(packed.targets_c), requires_grad=True)
    rectangle = packed.unpack(values)
    assert rectangle.shape == batch.completion_mask_nt.shape
    assert torch.equal(rectangle.flatten()[packed.cells_c], values) and not rectangle[~batch.completion_mask_nt].any()
    rectangle.square().sum().backward()
    assert torch.equal(values.grad, 2 * values.detach())


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
    assert packed.cu_seqlens == (0,) and len(packed.input_ids_t) == len(packed.targets_c) == 0
    assert packed.unpack(torch.zeros(0)).shape == (len(lengths), 0)


def test_a_sample_without_a_prompt_is_refused() -> None:
    batch = make_batch()
    mask = batch.prompt_mask_np.clone()
    mask[1] = False
    with pytest.raises(ValueError, match="a sample has no prompt token: nothing predicts its first completion token"):
        pack(replace(batch, prompt_mask_np=mask))
