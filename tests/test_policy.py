"""policy.score: packed and padded layouts against one sequence at a time through the plain model, in fp64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastlora.attention import ATTENTION
from fastlora.ops.registry import use_implementation
from fastlora.policy import score, score_packed, score_padded
from fastlora.types import TrainBatch
from tests.batches import GROUPS, RAGGED, make_batch, make_group_batch
from tests.exact import make_exact_model, score_one_by_one
from tests.lora.adapters import attach_uneven
from tests.tiny import EOS_ID, TINY_FAMILIES, make_tiny_model
from tests.tolerances import FP64_EXACT

MODELS: dict[str, tuple[str, dict[str, Any]]] = {family: (family, {}) for family in TINY_FAMILIES}
MODELS |= {
    "mistral, window 4": ("mistral", {"sliding_window": 4}),  # shorter than most sequences
    "mistral, window 14": ("mistral", {"sliding_window": 14}),  # one sequence is exactly as long, the others shorter
    "mistral, window 64": ("mistral", {"sliding_window": 64}),
    "qwen2, odd widths": (
        "qwen2",
        {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8},
    ),
}
TEMPERATURE = 0.7
BATCHES = {"lone": make_batch(), "groups": make_group_batch()}
"""Samples with prompts of their own, and groups that share one."""
LAYOUTS: dict[str, Callable[[PreTrainedModel, TrainBatch, float], tuple[Tensor, Tensor]]] = {"packed": score_packed, "padded": score_padded}


def _exact(case: str) -> PreTrainedModel:
    family, overrides = MODELS[case]
    model = make_exact_model(family, **overrides)
    model.set_attn_implementation(ATTENTION)
    return model


def _close(got: Tensor, expected: Tensor) -> bool:
    return got.shape == expected.shape and bool(((got - expected).abs() <= FP64_EXACT * expected.abs().max().clamp(min=1)).all())


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", MODELS)
def test_log_probabilities_and_entropies(case: str, layout: str, batch: TrainBatch) -> None:
    """Ragged prompts and completions, empty ones and single tokens among them; 0 where there is no token."""
    model = _exact(case)
    with torch.no_grad():
        expected = score_one_by_one(model, batch, TEMPERATURE)
        got = LAYOUTS[layout](model, batch, TEMPERATURE)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == torch.float64 and _close(ours, theirs)
        assert not ours[~batch.completion_mask_nt].any()
    assert got[0][batch.completion_mask_nt].all()


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("case", MODELS)
def test_gradients(case: str, batch: TrainBatch) -> None:
    """Of both outputs, through the whole model, in fp64; the embedding's gradient has passed through everything."""
    model = _exact(case)
    model.requires_grad_(False)
    leaf = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    if head.weight is leaf:  # tied: the op's head is frozen, so the leaf must not be
        head.weight = nn.Parameter(leaf.detach().clone(), requires_grad=False)
    leaf.requires_grad_(True)
    weights = torch.randn(2, *batch.completion_ids_nt.shape, dtype=torch.float64)
    gradients = []
    for run in (score_one_by_one, score_packed, score_padded):
        logp, entropy = run(model, batch, TEMPERATURE)
        gradients.append(torch.autograd.grad((weights[0] * logp + weights[1] * entropy).sum(), leaf)[0])
    assert gradients[0].any() and all(_close(gradient, gradients[0]) for gradient in gradients[1:])


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_the_adapters_gradients_do_not_depend_on_the_layout(batch: TrainBatch) -> None:
    """float32 buffers under an fp64 model: what the layouts add up in another order is rounded once."""
    model = _exact("llama")
    adapter = attach_uneven(model)
    gradients = []
    for run in LAYOUTS.values():
        run(model, batch, TEMPERATURE)[0].sum().backward()
        gradients.append(adapter.flat.grad.clone())
        adapter.flat.grad.zero_()
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < torch.finfo(torch.float32).eps


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_score_picks_the_layout_by_implementation(implementation: str) -> None:
    model, batch = make_tiny_model("llama"), make_batch()
    model.set_attn_implementation(ATTENTION)
    shapes: list[tuple[int, ...]] = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, __: shapes.append(tuple(args[0].shape)))
    with use_implementation(implementation), torch.no_grad():
        logp, entropy = score(model, batch, 1.0, implementation)
    assert logp.dtype == entropy.dtype == torch.float32
    real = sum(p + c - 1 for p, c in RAGGED if c)  # the cost of packing: real tokens, a completion's last one never an input
    assert shapes == [(1, real) if implementation == "auto" else (len(RAGGED), 12 + 11)]


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_sequences_do_not_see_each_other(family: str) -> None:
    """Other tokens of the neighbours leave a sequence's bits alone: attention never crosses a border.

    The neighbours keep the number of rows, so that every GEMM has the same shape.
    """
    model = make_tiny_model(family)
    model.set_attn_implementation(ATTENTION)
    batch = make_batch()
    with torch.no_grad():
        logp, entropy = score_packed(model, batch, 1.0)
        for n in (0, 2, 4):
            other = make_batch(seed=1)
            ids, prompts = other.completion_ids_nt.clone(), other.prompt_ids_np.clone()
            ids[n], prompts[n] = batch.completion_ids_nt[n], batch.prompt_ids_np[n]
            changed = score_packed(model, replace(batch, completion_ids_nt=ids, prompt_ids_np=prompts), 1.0)
            assert torch.equal(changed[0][n], logp[n]) and torch.equal(changed[1][n], entropy[n])
            assert not torch.equal(changed[0], logp)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_completions_of_a_group_do_not_see_each_other(family: str) -> None:
    """They share the prompt and nothing else."""
    model, batch = make_tiny_model(family), make_group_batch()
    model.set_attn_implementation(ATTENTION)
    with torch.no_grad():
        logp, entropy = score_packed(model, batch, 1.0)
        for n in range(len(batch)):
            ids = make_group_batch(seed=1).completion_ids_nt.clone()
            ids[n] = batch.completion_ids_nt[n]
            changed = score_packed(model, replace(batch, completion_ids_nt=ids), 1.0)
            assert torch.equal(changed[0][n], logp[n]) and torch.equal(changed[1][n], entropy[n])
            assert not torch.equal(changed[0], logp)


def test_a_group_pays_for_its_prompt_once() -> None:
    model = make_tiny_model("llama")
    shapes: list[tuple[int, ...]] = []
    model.set_attn_implementation(ATTENTION)
    model.get_input_embeddings().register_forward_hook(lambda _, args, __: shapes.append(tuple(args[0].shape)))
    with torch.no_grad():
        score_packed(model, make_group_batch(), 1.0)
    prompts = sum(p for p, completions in GROUPS if any(completions))
    assert shapes == [(1, prompts + sum(c - 1 for _, completions in GROUPS for c in completions if c))]


def test_eos_gets_gradient_and_padding_does_not() -> None:
    """pad = eos: the eos that ends a completion has a log-probability, the padding behind it has none."""
    model, batch = _exact("llama"), make_batch()
    for run in LAYOUTS.values():
        logp, _ = run(model, batch, 1.0)
        last = batch.completion_mask_nt.sum(1) - 1
        ends = [n for n, (_, length) in enumerate(RAGGED) if length and n != 2]
        assert all(batch.completion_ids_nt[n, last[n]] == EOS_ID and logp[n, last[n]] != 0 for n in ends)
        assert not logp[~batch.completion_mask_nt].any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_without_completion_tokens(layout: str) -> None:
    model = make_tiny_model("llama")
    model.set_attn_implementation(ATTENTION)
    logp, entropy = LAYOUTS[layout](model, make_batch(((3, 0), (5, 0))), 1.0)
    assert logp.shape == entropy.shape == (2, 0)
    batch = make_batch(((3, 2), (5, 4)))
    batch = replace(batch, completion_mask_nt=torch.zeros_like(batch.completion_mask_nt))
    logp, _ = LAYOUTS[layout](model, batch, 1.0)
    assert logp.shape == (2, 4) and not logp.any()
