"""From a config to a sampler: which servers, which canary prompts, how much memory. Refuses by name before anything is started."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fastlora.config import RunConfig
from fastlora.lora.packed import PackedAdapter
from fastlora.model import BaseModel, resolve_source
from fastlora.prompt import encode
from fastlora.rollout.sampler import SamplerError, SamplingParams
from fastlora.rollout.vllm.canary import Canary
from fastlora.rollout.vllm.client import VllmClient
from fastlora.rollout.vllm.memory import EngineLoad, engine_card, engine_memory, longest_sequence, memory_flags, run_load
from fastlora.rollout.vllm.policy import AdapterSource, FullSource, MergedSource, Source
from fastlora.rollout.vllm.process import EngineProcess, engine_flags, memory_folder
from fastlora.rollout.vllm.sampler import Trial, VllmSampler
from fastlora.rollout.vllm.servers import ForeignServer, OwnEngine, Server, max_lora_rank
from fastlora.rollout.vllm.shared import SharedEngine, shared_folder
from fastlora.types import Example

CANARY_PROMPTS = 2
"""Both sides compute them after every swap: .15 s each for SmolLM2 on two cores. Three took 3.006 % of a step in bfloat16."""

TRIAL_TOKENS = 32
"""Of a completion in the trial of vllm.weights = "auto"."""

CANARY_TOKENS = 40
"""Of one canary prompt, for an engine of our own: more than a block of its prefix cache (32 on CPU, 16 on a GPU)."""

CANARY_TOKENS_FOREIGN = 136
"""The same for servers whose block is not known: more than the largest default, 128 on CPU."""


def build_vllm_sampler(
    config: RunConfig, model: BaseModel, adapter: PackedAdapter | None, flat: Tensor, examples: Sequence[Example], console: Console
) -> VllmSampler:
    """The sampler of a run; nothing is started before it is entered. Raises SamplerError: no vLLM, or a rank that it does not serve."""
    foreign = bool(config.vllm.servers)
    length = min(CANARY_TOKENS_FOREIGN if foreign else CANARY_TOKENS, longest_sequence(config, model.module.config) - 1)
    prompts = canary_prompts(encode(model.tokenizer, [example.prompt for example in examples[: 16 * CANARY_PROMPTS]]), length)
    name = f"{config.name or 'run'}-{secrets.token_hex(4)}"
    shared = shared_folder(config) or config.vllm.adapter_folder
    folder = memory_folder() if shared is None else shared / name
    source, trial = _sources(config, model, adapter, flat, name, folder / "weights", examples)
    return VllmSampler(
        model,
        source,
        _servers(config, model, adapter, folder),
        Canary(prompts, model.module.dtype),
        folder=folder,
        max_restarts=config.vllm.max_restarts,
        say=lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True),
        trial=trial,
    )


def _sources(
    config: RunConfig, model: BaseModel, adapter: PackedAdapter | None, flat: Tensor, name: str, memory: Path, examples: Sequence[Example]
) -> tuple[Source, Trial | None]:
    """What is published, and what may be published instead."""
    if adapter is None:
        return FullSource(flat, model, memory), None
    if config.vllm.weights == "adapter":
        return AdapterSource(adapter, model, name), None
    merged = MergedSource(adapter, model, memory)
    if config.vllm.weights == "merged":
        return merged, None
    r = config.rollout
    params = SamplingParams(r.num_generations, min(r.max_completion_length, TRIAL_TOKENS), r.temperature, r.top_p)
    tokens = r.num_prompts * r.num_generations * r.max_completion_length
    return AdapterSource(adapter, model, name), Trial(merged, tuple(examples[: r.num_prompts]), params, tokens)


def _servers(config: RunConfig, model: BaseModel, adapter: PackedAdapter | None, scratch: Path) -> list[Server]:
    vllm, longest = config.vllm, longest_sequence(config, model.module.config)
    if (shared := shared_folder(config)) is not None:
        return [SharedEngine(shared, vllm, needed_length=longest)]
    if vllm.servers:
        key = os.environ.get(vllm.api_key_variable)
        return [
            ForeignServer(VllmClient(url, api_key=key, request_timeout=vllm.request_timeout), needed_length=longest) for url in vllm.servers
        ]
    card = engine_card(config, model.device)
    ranks = [] if adapter is None or vllm.weights == "merged" else [1, *adapter.rank_pattern.values()]
    slot_rank = max_lora_rank(max(ranks)) if ranks else 0
    load = run_load(config, model.module.config, slot_rank, on_cpu=card is None)
    log = Path(tempfile.gettempdir()) / f"fastlora-vllm-{os.getpid()}.log"
    return [OwnEngine(engine_process(config, model.module.config, load, card, log=log, scratch=scratch), sleeps=load.sleeps)]


def engine_process(
    config: RunConfig,
    model_config: Any,
    load: EngineLoad,
    card: torch.device | None,
    *,
    log: Path,
    scratch: Path,
    socket: Path | None = None,
) -> EngineProcess:
    """An engine of our own, not started yet. model_config: transformers'; card: its GPU, None = on a CPU; the rest: see EngineProcess.

    Raises SamplerError: vllm.gpu_share without a GPU, or too small; no vLLM.
    """
    vllm = config.vllm
    if card is None and vllm.gpu_share is not None:
        raise SamplerError("vllm.gpu_share is set, and the engine runs on a CPU; remove it (vllm.kv_cache_gib bounds its cache)")
    card_bytes = None if card is None else torch.cuda.get_device_properties(card).total_memory
    memory = engine_memory(config, model_config, load, card_bytes)
    flags = engine_flags(
        model=resolve_source(config.model),
        revision=config.model.revision,
        dtype=config.model.dtype,
        load=load,
        on_cpu=card is None,
        memory=memory_flags(config, model_config, load, memory, card_bytes),
    )
    return EngineProcess(
        flags,
        log=log,
        start_timeout=vllm.start_timeout,
        request_timeout=vllm.request_timeout,
        device=None if card is None else card.index,
        scratch=scratch,
        socket=socket,
    )


def canary_prompts(prompts: Sequence[Sequence[int]], length: int) -> list[list[int]]:
    """CANARY_PROMPTS prompts of `length` tokens: the data's own, one after another, from different places on."""
    stream = [token for prompt in prompts for token in prompt]
    stream *= -(-CANARY_PROMPTS * length // len(stream))
    stride = (len(stream) - length) // CANARY_PROMPTS
    return [stream[start : start + length] for start in range(0, CANARY_PROMPTS * stride, stride)] if stride else [stream[:length]]
