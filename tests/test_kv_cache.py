"""GroupCache: logits of prompts and of one token at a time, against a full forward pass of each prompt and its completion."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastlora.attention import ATTENTION, PREPARED_MASK
from fastlora.fused_layers import fuse_layers
from fastlora.kv_cache import GroupCache
from fastlora.lora.groups import frozen_adapters
from fastlora.ops.registry import implementation_counts
from tests.exact import make_exact_model
from tests.lora.adapters import attach_uneven
from tests.ops.implementations import needs_extension
from tests.tiny import TINY_FAMILIES, VOCAB_SIZE, make_tiny_model
from tests.tolerances import FP32_LOGPROB, FP64_EXACT

MODELS: dict[str, tuple[str, dict[str, Any]]] = {family: (family, {}) for family in TINY_FAMILIES}
MODELS |= {
    "mistral, window 5": ("mistral", {"sliding_window": 5}),  # ends in prompts, in completions, and never reached by the shortest
    "qwen2, windows in some layers": ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
    "llama, heads of 32": ("llama", {"head_dim": 32}),  # what the C++ kernel takes
}
PROMPTS = (4, 1, 9)
COMPLETIONS = ((6, 1), (3, 8), (0, 2))
"""Tokens of each of a prompt's samples that are fed; the sample with 0 ends with the token that its prompt predicts."""


def _tokens() -> tuple[list[Tensor], list[Tensor]]:
    """(prompts, completions of all samples)."""
    draw = lambda length: torch.randint(3, VOCAB_SIZE, (length,))  # noqa: E731
    return [draw(length) for length in PROMPTS], [draw(length) for lengths in COMPLETIONS for length in lengths]


def _full(model: PreTrainedModel, prompts: Sequence[Tensor], completions: Sequence[Tensor]) -> list[Tensor]:
    """Logits [1 + C, v] of every sample: at its prompt's end and at each of its tokens."""
    model.set_attn_implementation("sdpa")
    samples = zip([prompt for prompt in prompts for _ in COMPLETIONS[0]], completions, strict=True)
    return [model(torch.cat([p, c])[None], use_cache=False).logits[0, len(p) - 1 :] for p, c in samples]


def _decoded(model: PreTrainedModel, prompts: Sequence[Tensor], completions: Sequence[Tensor]) -> list[Tensor]:
    """The same from a cache. Samples leave when they have no more tokens, and are named in another order at every step."""
    model.set_attn_implementation(ATTENTION)
    cache = GroupCache([len(prompt) for prompt in prompts], len(COMPLETIONS[0]), max(map(len, completions)), torch.device("cpu"))

    def feed(ids: Tensor, positions: Tensor) -> Tensor:
        call = {"position_ids": positions[None], "attention_mask": PREPARED_MASK, "use_cache": False, "cache": cache}
        return model.get_output_embeddings()(model.base_model(input_ids=ids[None], **call).last_hidden_state[0])

    prefill = feed(torch.cat(list(prompts)), torch.cat([torch.arange(len(prompt)) for prompt in prompts]))
    at_end = prefill[torch.tensor(cache.cu_seqlens[1:]) - 1].repeat_interleave(len(COMPLETIONS[0]), 0)
    rows = [[row] for row in at_end]
    for t in range(max(map(len, completions))):
        running = [n for n, completion in enumerate(completions) if len(completion) > t][:: 1 if t % 2 else -1]
        cache.slots_t = torch.tensor(running)
        logits = feed(torch.stack([completions[n][t] for n in running]), cache.position_ids_t)
        cache.own_tokens += 1
        for n, row in zip(running, logits, strict=True):
            rows[n].append(row)
    return [torch.stack(logits) for logits in rows]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("case", MODELS)
@torch.no_grad()
def test_in_fp64(case: str, fused: bool) -> None:
    family, overrides = MODELS[case]
    plain, model, tokens = make_exact_model(family, **overrides), make_exact_model(family, **overrides), _tokens()
    model.set_attn_implementation(ATTENTION)
    if fused:
        fuse_layers(model)
    for ours, theirs in zip(_decoded(model, *tokens), _full(plain, *tokens), strict=True):
        assert ours.shape == theirs.shape and float((ours - theirs).abs().max()) <= FP64_EXACT * float(theirs.abs().max())


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("case", MODELS)
@torch.no_grad()
def test_in_fp32_with_an_adapter(case: str, frozen: bool) -> None:
    """Fused layers, uneven ranks, as a run samples; frozen_adapters replaces every grouped projection inside it, and only there."""
    family, overrides = MODELS[case]
    plain, model, tokens = make_tiny_model(family, **overrides), make_tiny_model(family, **overrides), _tokens()
    model.set_attn_implementation(ATTENTION)
    fuse_layers(model)
    attach_uneven(plain), attach_uneven(model)
    before = implementation_counts.copy()
    with frozen_adapters(model) if frozen else nullcontext():
        decoded = _decoded(model, *tokens)
    assert any(op == "lora_linear" for op, _ in implementation_counts - before) == (not frozen)
    full = _full(plain, *tokens)
    largest = max(float(theirs.abs().max()) for theirs in full)
    for ours, theirs in zip(decoded, full, strict=True):
        assert ours.shape == theirs.shape and float((ours - theirs).abs().max()) < FP32_LOGPROB * largest


@needs_extension
def test_heads_of_32_are_attended_in_cpp() -> None:
    model = make_tiny_model("llama", head_dim=32)
    before = implementation_counts.copy()
    with torch.no_grad():
        _decoded(model, *_tokens())
    ran = implementation_counts - before
    assert ran["decode_attention", "cpp"] == 2 * max(map(max, COMPLETIONS)) and ran["packed_attention", "cpp"] == 2


def test_frozen_adapters_end_with_the_block() -> None:
    """Also after an error; what trained since is seen afterwards, and the adapter can be switched off inside."""
    model, base, ids = make_tiny_model("qwen2"), make_tiny_model("qwen2"), torch.arange(3, 24).reshape(3, 7)
    adapter = attach_uneven(model)
    with torch.no_grad():
        expected = model(ids).logits
        try:
            with frozen_adapters(model):
                inside = model(ids).logits
                with adapter.disabled():
                    assert torch.equal(model(ids).logits, base(ids).logits)
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        assert float((inside - expected).abs().max()) < FP32_LOGPROB * float(expected.abs().max())
        assert torch.equal(model(ids).logits, expected) and all(group.frozen is None for group in adapter.groups)
        adapter.flat.data.mul_(1.5)
        with frozen_adapters(model):
            changed = model(ids).logits
        assert float((changed - model(ids).logits).abs().max()) < FP32_LOGPROB * float(changed.abs().max())
        assert float((changed - expected).abs().max()) > 0.1


def test_an_adapter_in_its_own_dtype_is_not_frozen() -> None:
    """The reference path computes the adapter in float32 whatever the activations are."""
    model = make_tiny_model("llama")
    adapter = attach_uneven(model, cast_to_input=False)
    with frozen_adapters(model):
        assert all(group.frozen is None for group in adapter.groups)
