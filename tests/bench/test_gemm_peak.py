"""The list of products against torch's own FLOP counter, on a tiny Llama with PEFT's layers; attention against a counted mask."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from bench.gemm_peak import ATTENTION_BACKWARD, Group, Model, Work, full_work, lora_work, measure_rates, peak_rate
from bench.workload import COMPLETION_TOKENS
from fastlora.config import LoraConfig
from tests.parity.twins import make_twins
from tests.tiny import VOCAB_SIZE, make_tiny_model

RANK = 3
GROUPS = (Group(7, (5,)), Group(2, (1,)), Group(11, (9,)))
"""One sample a group: then sharing the prompt saves nothing, and a plain model does exactly the useful work."""


def dimensions(model: PreTrainedModel) -> Model:
    return Model(**{name: getattr(model.config, name) for name in Model.__slots__})


def counted_flops(model: torch.nn.Module) -> int:
    """FLOPs of the matrix products in forward and backward of every sample of GROUPS; attention is one op that is not among them."""
    products = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
    with FlopCounterMode(display=False) as counter:
        for group in GROUPS:
            (completion,) = group.completions
            ids = torch.randint(3, VOCAB_SIZE, (1, group.prompt + completion))
            logits = model(input_ids=ids[:, :-1], logits_to_keep=completion, use_cache=False).logits
            cross_entropy(logits[0], ids[0, -completion:]).backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(counts.get(op, 0) for op in products)


@pytest.mark.parametrize("layers", [None, (0,), (1,), (1, 3), (2, 3)], ids=str)
def test_lora_products(layers: tuple[int, ...] | None) -> None:
    """On all layers, on some: nothing runs backward below the lowest, nothing of an adapter in the others."""
    model = make_tiny_model("llama", num_hidden_layers=4)
    targets = {} if layers is None else {"target_modules": tuple(rf"model\.layers\.{layer}\..*" for layer in layers)}
    adapted = make_twins(model, LoraConfig(r=RANK, **targets)).theirs
    work = lora_work(dimensions(model), GROUPS, RANK, layers)
    assert work.gemm_flops == counted_flops(adapted)
    backward_layers = 4 if layers is None else 4 - min(layers)
    pairs = sum(group.pairs for group in GROUPS)
    assert work.attention_flops == pytest.approx((4 + ATTENTION_BACKWARD * backward_layers) * 4 * pairs * 64)


def test_full_products() -> None:
    model = make_tiny_model("llama")
    assert full_work(dimensions(model), GROUPS).gemm_flops == counted_flops(model.requires_grad_(True))


@pytest.mark.parametrize("group", [Group(5, (3, 1, 4)), Group(1, (1,)), Group(115, (COMPLETION_TOKENS,) * 4)])
def test_pairs_of_a_group(group: Group) -> None:
    """The mask of a packed group, written out: own segment or the prompt's, and not later."""
    lengths = [group.prompt, *(c - 1 for c in group.completions)]
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    order = torch.arange(len(segment))
    visible = ((segment[:, None] == segment) | (segment == 0)) & (order <= order[:, None])
    assert group.inputs == len(segment)
    assert group.pairs == int(visible.sum())


def test_attention_flops() -> None:
    """Two products of 2·e FLOPs a pair and head; backward by the stated factor; 2 layers, 4 heads of 16."""
    model = dimensions(make_tiny_model("llama"))
    pairs = sum(group.pairs for group in GROUPS)
    assert lora_work(model, GROUPS, RANK).attention_flops == (1 + ATTENTION_BACKWARD) * pairs * 2 * 2 * 16 * 4 * 2


def test_a_shared_prompt_is_computed_once() -> None:
    model = dimensions(make_tiny_model("llama"))
    shared, alone = [Group(100, (10, 10))], [Group(100, (10,)), Group(100, (10,))]
    assert shared[0].inputs == 118
    assert lora_work(model, shared, RANK).flops < 0.6 * lora_work(model, alone, RANK).flops


def test_the_peak_is_the_mean_weighted_by_time() -> None:
    slow, fast = (10, 10, 10), (10, 10, 20)  # 2,000 and 4,000 FLOPs
    work = Work(Counter({slow: 2, fast: 1}), attention_flops=0.0)
    assert peak_rate(work, {slow: 1000.0, fast: 4000.0}) == pytest.approx(8000 / (4.0 + 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rates_are_measured_for_every_shape(dtype: torch.dtype) -> None:
    shapes = [(1, 1, 1), (5, 3, 7)]
    rates = measure_rates(shapes, dtype, lambda shape: None)
    assert list(rates) == shapes
    assert all(rate > 0 for rate in rates.values())
