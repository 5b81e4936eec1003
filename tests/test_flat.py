"""Flat parameters: views, alignment, and a whole model as one buffer (full fine-tuning)."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from fastlora.config import OptimConfig
from fastlora.flat import FlatParameters, align, flatten_model
from fastlora.ops.adamw_step import ALIGNMENT, Segment
from fastlora.optim import AdamW
from tests.tiny import make_tiny_model

IDS = torch.arange(3, 24).reshape(3, 7)


@pytest.mark.parametrize(("offset", "expected"), [(0, 0), (1, 16), (15, 16), (16, 16), (17, 32)])
def test_align(offset: int, expected: int) -> None:
    assert align(offset) == expected


def test_a_parameter_is_a_view_of_both_buffers() -> None:
    flat = FlatParameters.zeros(40, (Segment("a", 7, (3, 5), False),), torch.device("cpu"))
    leaf = flat.parameter(7, 3, 5)
    flat.data[7:22] = torch.arange(15.0)
    assert torch.equal(leaf.detach(), torch.arange(15.0).view(3, 5)) and leaf.is_leaf and leaf.requires_grad
    for _ in range(2):
        (leaf * leaf).sum().backward()
    assert torch.equal(flat.grad[7:22], 4 * torch.arange(15.0)) and not flat.grad[:7].any() and not flat.grad[22:].any()
    assert flat.num_trainable == 15


def test_what_trains_is_in_a_segment_and_under_the_mask() -> None:
    """Segments in any order; True in a gap or in a matrix without a segment (a frozen A) counts for nothing."""
    flat = FlatParameters.zeros(40, (Segment("b", 30, (2, 2), True), Segment("a", 7, (3, 5), False)), torch.device("cpu"))
    assert flat.trainable_index() is None and flat.num_trainable == 19
    flat.mask = torch.zeros(40, dtype=torch.bool)
    flat.mask[[0, 6, 7, 21, 22, 29, 31, 33, 34]] = True
    index_k = flat.trainable_index()
    assert index_k is not None and index_k.dtype == torch.int32 and index_k.tolist() == [7, 21, 31, 33]
    assert flat.num_trainable == 4
    flat.mask = torch.zeros(40, dtype=torch.bool)
    assert flat.num_trainable == 0


def test_positions_that_do_not_fit_int32_are_refused() -> None:
    flat = FlatParameters(*(torch.empty(2**31, device="meta") for _ in range(2)), (), torch.empty(2**31, dtype=torch.bool, device="meta"))
    with pytest.raises(ValueError, match=r"up to 2\^31 - 1 parameters, here are 2147483648: lower lora.r"):
        flat.trainable_index()


def test_a_flat_model_is_the_model(tiny_model: PreTrainedModel) -> None:
    """Same logits to the bit, gradients in the buffer; a tied head is stored once; every weight starts aligned."""
    other = make_tiny_model(tiny_model.config.model_type)
    other.requires_grad_(True)
    flat = flatten_model(tiny_model)
    logits, expected = tiny_model(IDS).logits, other(IDS).logits
    assert torch.equal(logits, expected)
    logits.square().mean().backward()
    expected.square().mean().backward()
    parameters = dict(other.named_parameters())
    assert [s.name for s in flat.segments] == list(parameters)
    assert flat.num_trainable == sum(p.numel() for p in parameters.values())
    for segment in flat.segments:
        truth = parameters[segment.name]
        assert segment.offset % ALIGNMENT == 0 and segment.numel == truth.numel()
        assert truth.grad is not None
        assert torch.equal(flat.data[segment.offset :][: segment.numel].view(truth.shape), truth.detach())
        assert torch.equal(flat.grad[segment.offset :][: segment.numel].view(truth.shape), truth.grad)
    assert ("lm_head.weight" in parameters) != tiny_model.config.tie_word_embeddings


def test_a_step_on_the_buffer_moves_the_model(tiny_model: PreTrainedModel) -> None:
    before = tiny_model(IDS).logits.detach()
    flat = flatten_model(tiny_model)
    tiny_model(IDS).logits.square().mean().backward()
    AdamW(flat, OptimConfig()).step(1e-2)
    after = tiny_model(IDS).logits.detach()
    assert float((after - before).abs().max()) > 1e-2
    if tiny_model.config.tie_word_embeddings:
        assert tiny_model.get_output_embeddings().weight is tiny_model.get_input_embeddings().weight


def test_bfloat16_is_refused() -> None:
    model = make_tiny_model("llama", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight is torch.bfloat16; method = 'full' needs model.dtype = 'float32'"):
        flatten_model(model)
