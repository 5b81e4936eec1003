"""Tiny random models and a tiny tokenizer, made from configs: what tests train on instead of a download.

Import from here (`from tests.tiny import make_tiny_model`) or ask for the fixtures of conftest.py.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE = 131
"""A prime, so that no chunk size divides it: 3 special tokens, newline, 95 printable ASCII, 32 letters of Latin-1."""
BOS, EOS = "<|im_start|>", "<|im_end|>"
BOS_ID, EOS_ID = 1, 2
"""pad = eos, as in SmolLM2: the case in which a mask made by comparing with pad loses the eos."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nDefault system turn.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML with an uninvited system turn, as SmolLM2's and Qwen2.5's own templates."""

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,  # logits spread over several nats; the usual 0.02 gives an almost uniform softmax
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": EOS_ID,
}

TINY_FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"tie_word_embeddings": False}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True, "num_hidden_layers": 3}),  # biases on q, k, v
    "qwen3": (Qwen3Config, {"tie_word_embeddings": False}),  # norms on q and k
    "mistral": (MistralConfig, {"tie_word_embeddings": False, "sliding_window": None}),
}
"""Family -> config class and what differs from `_SHAPE`."""


def make_tiny_config(family: str = "llama", **overrides: Any) -> PreTrainedConfig:
    """Config of a tiny model; `overrides` are fields of its config class."""
    config_class, own = TINY_FAMILIES[family]
    return config_class(**{**_SHAPE, **own, **overrides})


def make_tiny_model(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A random model in eval mode; the same seed gives the same weights and leaves the global RNG as it was.

    Biases and norm weights get noise too: with their usual 0 and 1 a path that forgets them would still agree.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(make_tiny_config(family, **overrides), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def make_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character (131 of them), left padding, `CHAT_TEMPLATE`; digits are single tokens, as in SmolLM2."""
    characters = ["\n", *map(chr, range(0x20, 0x7F)), *map(chr, range(0xE0, 0x100))]
    vocabulary = {token: index for index, token in enumerate(["<unk>", BOS, EOS, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
