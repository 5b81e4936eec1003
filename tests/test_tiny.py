"""The tiny models and the tiny tokenizer have the properties that other tests rely on."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.tiny import BOS_ID, EOS_ID, TINY_FAMILIES, VOCAB_SIZE, make_tiny_model


def test_shapes(tiny_model: PreTrainedModel) -> None:
    config, layer = tiny_model.config, tiny_model.model.layers[0].self_attn
    assert (config.vocab_size, config.hidden_size, config.bos_token_id) == (VOCAB_SIZE, 64, BOS_ID)
    assert config.eos_token_id == config.pad_token_id == EOS_ID
    assert layer.q_proj.weight.shape == (4 * 16, 64)
    assert layer.k_proj.weight.shape == (2 * 16, 64)
    assert tiny_model.dtype == torch.float32
    assert not tiny_model.training


def test_what_tells_the_families_apart() -> None:
    qwen2, qwen3 = make_tiny_model("qwen2"), make_tiny_model("qwen3")
    assert qwen2.model.layers[0].self_attn.q_proj.bias.abs().min() > 0
    assert qwen2.lm_head.weight is qwen2.model.embed_tokens.weight
    assert qwen3.model.layers[0].self_attn.q_norm.weight.std() > 0
    assert qwen3.lm_head.weight is not qwen3.model.embed_tokens.weight


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_seeds(family: str) -> None:
    before = torch.random.get_rng_state()
    one, same, other = (make_tiny_model(family, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if "inv_freq" not in name)


def test_logits_are_not_uniform(tiny_model: PreTrainedModel) -> None:
    """Several nats between the likeliest and the median token: ratios and entropies differ from token to token."""
    logits = tiny_model(torch.arange(3, 40)[None]).logits[0]
    assert (logits.amax(-1) - logits.median(-1).values).min() > 1


def test_tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "What is 12 + 345?\nÿ"}]
    text = tiny_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    ids = tiny_tokenizer.encode(text)
    assert tiny_tokenizer.decode(ids) == text
    assert len(tiny_tokenizer) == VOCAB_SIZE
    assert tiny_tokenizer.eos_token_id == tiny_tokenizer.pad_token_id == EOS_ID
    assert tiny_tokenizer.decode([BOS_ID, *tiny_tokenizer.encode("a  b"), EOS_ID], skip_special_tokens=True) == "a  b"
    assert tiny_tokenizer(["a", "abc"], padding=True)["attention_mask"] == [[0, 0, 1], [1, 1, 1]]
