"""What an engine of our own holds, counted before it starts, and what it is told to take.

A model of L layers has width d, H query heads and K key heads of width e, an MLP of width m, vocabulary v; w bytes a number:

    weights          w (L Σ n d of the seven projections + v d, twice unless embedding and head are one matrix)
    adapter slots    w · max_loras · max_lora_rank · (L Σ (d + n) + 2 (v + d)): every projection, the embedding and the head have slots,
                     adapted or not
    KV cache         2 w L K e tokens: every sequence that may be sampled at once (of one run: `rollout.batch_size`) at full length, in
                     whole blocks
    working memory   w · (2 d + 3 m) of a batch of max_num_batched_tokens, and four float32 copies of every sequence's logits (processed
                     log-probabilities, sorted for the nucleus)

On one card the engine sleeps while the trainer updates (level 1: weights and slots in the computer's memory, the cache dropped); what is
left is its CUDA context and graphs. vLLM allocates the slots with the weights, so adapters outlive the sleep; the canary asks again after
waking. A CPU has no such allocator: there vLLM ignores sleep, and is not asked for it.

Read in vLLM 0.32's source. Slots and cache have these sizes on a CPU, to the byte; not run on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastlora.config import RunConfig
from fastlora.rollout.sampler import SamplerError

GIB = 1 << 30

MAX_LORAS = 2
"""Adapters of a run in slots: one that rollouts are still in flight for, one that is new."""

BATCHED_TOKENS = 8192
"""Of one forward pass, unless a sequence is longer."""

BLOCK = {True: 32, False: 16}
"""Tokens of a block of the cache: on a CPU (process.engine_flags), on a GPU (vLLM's default)."""

SPARE_BLOCKS = 64
"""Beyond those of the sequences: vLLM's null block, and some for prefixes."""

OUTSIDE_POOL = {True: int(1.75 * GIB), False: int(2.0 * GIB)}
"""Libraries of server, core and worker on a CPU, measured: 2.16 GiB with .43 of weights, slots and cache (SmolLM2). CUDA context, graphs
and workspaces on a GPU: an allowance, not measured."""


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What an engine must take at once."""

    sequences: int
    """Completions."""
    longest: int
    """Tokens of the longest prompt and completion."""
    max_lora_rank: int
    """Of a slot, vLLM's; 0 = no adapters, the weights themselves are updated."""
    max_loras: int
    """Slots."""
    sleeps: bool
    """It makes room for the trainer's update."""


def run_load(config: RunConfig, model_config: Any, slot_rank: int, *, on_cpu: bool) -> EngineLoad:
    """Of one run on an engine of its own. model_config: transformers'; slot_rank: vLLM's max_lora_rank."""
    longest = longest_sequence(config, model_config)
    return EngineLoad(config.rollout.batch_size, longest, slot_rank, MAX_LORAS, sleeps(config, on_cpu=on_cpu))


def shared_load(loads: Sequence[EngineLoad], at_once: int) -> EngineLoad:
    """Of any `at_once` of several runs on one engine, which samples for one while another updates and so never sleeps."""
    largest = sorted((load.sequences for load in loads), reverse=True)[:at_once]
    longest, slot_rank = max(load.longest for load in loads), max(load.max_lora_rank for load in loads)
    return EngineLoad(sum(largest), longest, slot_rank, MAX_LORAS * at_once, sleeps=False)


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Bytes of an engine."""

    parts: tuple[tuple[str, int], ...]
    """What holds memory while it samples, and how much."""
    at_rest: int
    """Of them while the trainer updates: all, unless it sleeps then."""
    beside: bool
    """On the trainer's own device."""

    @property
    def total(self) -> int:
        """While it samples."""
        return sum(size for _, size in self.parts)


def sleeps(config: RunConfig, *, on_cpu: bool) -> bool:
    """The engine makes room for the trainer's update: on the trainer's own card, and not while it samples ahead."""
    return not on_cpu and config.vllm.device is None and config.vllm.staleness == 0


def longest_sequence(config: RunConfig, model_config: Any) -> int:
    """Tokens of the longest prompt and completion; model_config: transformers'."""
    context = int(model_config.get_text_config().max_position_embeddings)
    return min(config.data.max_prompt_length + config.rollout.max_completion_length, context)


def engine_card(config: RunConfig, device: torch.device) -> torch.device | None:
    """Where the engine runs beside a trainer on `device`; None = on a CPU. Raises SamplerError when there is no such card."""
    if device.type == "cpu":
        if config.vllm.device is not None:
            raise SamplerError(f"vllm.device = {config.vllm.device} is a GPU, and the trainer is on the CPU; leave it out")
        return None
    if config.vllm.device is None:
        return device
    cards, own = torch.cuda.device_count(), torch.cuda.current_device() if device.index is None else device.index
    if config.vllm.device >= cards or config.vllm.device == own:
        raise SamplerError(
            f"vllm.device = {config.vllm.device}: there are {cards} GPUs here, and the trainer has number {own}; name another, or leave it "
            "out: then both share that one"
        )
    return torch.device("cuda", config.vllm.device)


def engine_memory(config: RunConfig, model_config: Any, load: EngineLoad, card_bytes: int | None) -> EngineMemory:
    """The plan of an engine of our own. model_config: transformers'; card_bytes: memory of its card, None = on a CPU.

    Raises SamplerError when vllm.gpu_share leaves nothing for the cache.
    """
    on_cpu = card_bytes is None
    text, w = model_config.get_text_config(), 2 if config.model.dtype == "bfloat16" else 4
    d, m, v, sequences = text.hidden_size, text.intermediate_size, text.vocab_size, load.sequences
    shapes = _projections(text)
    heads = 1 if model_config.tie_word_embeddings else 2
    slots = load.max_loras * load.max_lora_rank * (text.num_hidden_layers * sum(n + k for n, k in shapes) + 2 * (v + d))
    tokens = max(BATCHED_TOKENS, load.longest)
    parts: tuple[tuple[str, int], ...] = (
        ("weights", w * (text.num_hidden_layers * sum(n * k for n, k in shapes) + heads * v * d)),
        (f"adapter slots, {load.max_loras} of rank {load.max_lora_rank}", w * slots),
        (f"KV cache of {sequences:,} × {load.longest:,} tokens", kv_cache_bytes(config, model_config, load, on_cpu=on_cpu)),
        ("working memory", w * tokens * (2 * d + 3 * m) + 4 * 4 * sequences * v),
        ("libraries" if on_cpu else "CUDA context and graphs", OUTSIDE_POOL[on_cpu]),
    )
    if card_bytes is not None and config.vllm.gpu_share is not None:
        parts = _within(config.vllm.gpu_share, card_bytes, parts)
    total = sum(size for _, size in parts)
    return EngineMemory(parts, OUTSIDE_POOL[on_cpu] if load.sleeps else total, on_cpu or config.vllm.device is None)


def _within(share: float, card_bytes: int, parts: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...]:
    """The parts of an engine that is told its share: the cache (the third) gets what the others leave."""
    others = sum(size for place, (_, size) in enumerate(parts) if place != 2)
    left = int(share * card_bytes) - others
    if left <= 0:
        raise SamplerError(
            f"vllm.gpu_share = {share} of {card_bytes / GIB:.1f} GiB leaves no KV cache: the engine's other parts need "
            f"{others / GIB:.1f} GiB"
        )
    return (*parts[:2], ("KV cache, what vllm.gpu_share leaves", left), *parts[3:])


def _projections(text: Any) -> list[tuple[int, int]]:
    """(n, d) of a layer's seven."""
    d, m, query, key = (
        text.hidden_size,
        text.intermediate_size,
        text.num_attention_heads * _head_dim(text),
        _key_heads(text) * _head_dim(text),
    )
    return [(query, d), (key, d), (key, d), (d, query), (m, d), (m, d), (d, m)]


def _head_dim(text: Any) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _key_heads(text: Any) -> int:
    return getattr(text, "num_key_value_heads", None) or text.num_attention_heads


def kv_cache_bytes(config: RunConfig, model_config: Any, load: EngineLoad, *, on_cpu: bool) -> int:
    """vllm.kv_cache_gib, or what the load can use: all of its sequences at full length."""
    if config.vllm.kv_cache_gib is not None:
        return int(config.vllm.kv_cache_gib * GIB)
    text, block = model_config.get_text_config(), BLOCK[on_cpu]
    blocks = load.sequences * math.ceil(load.longest / block) + SPARE_BLOCKS
    per_token = 2 * text.num_hidden_layers * _key_heads(text) * _head_dim(text) * (2 if config.model.dtype == "bfloat16" else 4)
    return per_token * block * blocks


def memory_flags(config: RunConfig, model_config: Any, load: EngineLoad, engine: EngineMemory, card_bytes: int | None) -> list[str]:
    """vLLM's flags. engine: the plan of this load. card_bytes: memory of the engine's card; None = on a CPU.

    The cache is told in bytes. The share of the card is what vLLM then wants to find free when it starts; with vllm.gpu_share it is
    everything that it takes, and the cache gets what weights and slots leave.
    """
    cache = ["--kv-cache-memory-bytes", str(kv_cache_bytes(config, model_config, load, on_cpu=card_bytes is None))]
    if card_bytes is None:
        return cache
    sleep = ["--enable-sleep-mode"] if load.sleeps else []
    if (share := config.vllm.gpu_share) is not None:
        return [*sleep, "--gpu-memory-utilization", str(share), *(cache if config.vllm.kv_cache_gib is not None else [])]
    return [*sleep, *cache, "--gpu-memory-utilization", f"{math.ceil(1e4 * engine.total / card_bytes) / 1e4:.4f}"]
