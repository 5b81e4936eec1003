"""From a config to a sampler: which servers, which canary prompts, how much memory. Refuses by name before anything is started."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fastlora.config import RunConfig
from fastlora.lora.packed import PackedAdapter
from fastlora.model import BaseModel, resolve_source
from fastlora.prompt import encode
from fastlora.rollout.vllm.canary import Canary
from fastlora.rollout.vllm.memory import memory_flags
from fastlora.rollout.vllm.process import EngineProcess, engine_flags, memory_folder
from fastlora.rollout.vllm.sampler import VllmSampler
from fastlora.rollout.vllm.servers import ForeignServer, OwnEngine, Server, max_lora_rank
from fastlora.types import Example

CANARY_PROMPTS = 4

CANARY_TOKENS = 40
"""Of one canary prompt, for an engine of our own: more than a block of its prefix cache (32 on CPU, 16 on a GPU)."""

CANARY_TOKENS_FOREIGN = 136
"""The same for servers whose block is not known: more than the largest default, 128 on CPU."""


def build_vllm_sampler(
    config: RunConfig, model: BaseModel, adapter: PackedAdapter, examples: Sequence[Example], console: Console
) -> VllmSampler:
    """The sampler of a run; nothing is started before it is entered. Raises SamplerError: no vLLM, or a rank that it does not serve."""
    foreign = bool(config.vllm.servers)
    length = min(CANARY_TOKENS_FOREIGN if foreign else CANARY_TOKENS, _longest(config, model) - 1)
    prompts = canary_prompts(encode(model.tokenizer, [example.prompt for example in examples[: 16 * CANARY_PROMPTS]]), length)
    name = f"{config.name or 'run'}-{secrets.token_hex(4)}"
    shared = config.vllm.adapter_folder
    return VllmSampler(
        model,
        adapter,
        _servers(config, model, adapter),
        Canary(prompts),
        name=name,
        folder=memory_folder() if shared is None else shared / name,
        max_restarts=config.vllm.max_restarts,
        say=lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True),
    )


def _longest(config: RunConfig, model: BaseModel) -> int:
    """Tokens of the longest prompt and completion."""
    return min(config.data.max_prompt_length + config.rollout.max_completion_length, model.context_length)


def _servers(config: RunConfig, model: BaseModel, adapter: PackedAdapter) -> list[Server]:
    vllm, longest = config.vllm, _longest(config, model)
    if vllm.servers:
        key = os.environ.get(vllm.api_key_variable)
        return [
            ForeignServer(url, key, request_timeout=vllm.request_timeout, needed_length=longest, base_model=model.source)
            for url in vllm.servers
        ]
    sequences = config.rollout.batch_size
    flags = engine_flags(
        model=resolve_source(config.model),
        revision=config.model.revision,
        dtype=config.model.dtype,
        max_model_len=longest,
        max_num_seqs=sequences,
        max_lora_rank=max_lora_rank(max(adapter.rank_pattern.values(), default=1)),
        max_loras=2,  # one that rollouts are still in flight for, one that is new
        on_cpu=model.device.type == "cpu",
        memory=memory_flags(vllm, model.module.config, model.module.dtype, sequences * longest, on_cpu=model.device.type == "cpu"),
    )
    log = Path(tempfile.gettempdir()) / f"fastlora-vllm-{os.getpid()}.log"
    return [OwnEngine(EngineProcess(flags, log=log, start_timeout=vllm.start_timeout, request_timeout=vllm.request_timeout))]


def canary_prompts(prompts: Sequence[Sequence[int]], length: int) -> list[list[int]]:
    """CANARY_PROMPTS prompts of `length` tokens: the data's own, one after another, from different places on."""
    stream = [token for prompt in prompts for token in prompt]
    stream *= -(-CANARY_PROMPTS * length // len(stream))
    stride = (len(stream) - length) // CANARY_PROMPTS
    return [stream[start : start + length] for start in range(0, CANARY_PROMPTS * stride, stride)] if stride else [stream[:length]]
