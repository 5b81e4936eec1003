"""How much memory the engine gets.

    KV cache of T tokens        2 · layers · KV heads · head dim · bytes · T

On a CPU the cache is as large as the run can use: `rollout.batch_size` completions of full length. On a GPU vLLM takes a share
of the card for its weights, adapter slots and cache; what remains is the trainer's.
"""

from __future__ import annotations

from typing import Any

import torch

from fastlora.config import VllmConfig

GIB = 1 << 30

CPU_BLOCK = 32
"""Tokens of a block of the cache on CPU (process.engine_flags); every sequence may leave one half-empty."""


def kv_bytes_per_token(model_config: Any, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one token in all layers; model_config: transformers'."""
    text = model_config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * head_dim * dtype.itemsize


def memory_flags(config: VllmConfig, model_config: Any, dtype: torch.dtype, tokens: int, *, on_cpu: bool) -> list[str]:
    """vLLM's flags. tokens: that the run can have in the cache at once."""
    if config.kv_cache_gib is not None:
        return ["--kv-cache-memory-bytes", str(int(config.kv_cache_gib * GIB))]
    if on_cpu:
        return ["--kv-cache-memory-bytes", str(kv_bytes_per_token(model_config, dtype) * (tokens + 64 * CPU_BLOCK))]
    return ["--gpu-memory-utilization", str(config.gpu_share)]
