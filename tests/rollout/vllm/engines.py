"""A real vLLM engine on a tiny model, shared by the tests of a session: it takes half a minute to start."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastlora.lora.groups import projections, shapes
from fastlora.lora.packed import PackedAdapter, attach
from fastlora.lora.patterns import ModuleSpec, ProjectionShape, scale_of
from fastlora.model import BaseModel, wrap_model
from fastlora.rollout.sampler import SamplingParams
from fastlora.rollout.vllm.build import canary_prompts
from fastlora.rollout.vllm.canary import Canary
from fastlora.rollout.vllm.memory import EngineLoad
from fastlora.rollout.vllm.policy import AdapterSource, Policy
from fastlora.rollout.vllm.process import EngineProcess, engine_flags, memory_folder
from fastlora.rollout.vllm.sampler import VllmSampler
from fastlora.rollout.vllm.servers import OwnEngine, Server
from fastlora.types import Example
from tests.tiny import make_tiny_model, make_tiny_tokenizer

LENGTH = 128
"""Tokens of the longest prompt and completion."""

RANKS = (1, 3, 17, 0, 8, 5, 30)
"""In turn over the modules: no multiple of anything, one module in seven without an adapter."""

EXAMPLES = tuple(Example(i, f"What is {i} + {7 * i % 23}? Think of apples and pears, {i} of them.", "") for i in range(5))

PARAMS = SamplingParams(num_generations=3, max_completion_length=24, temperature=0.7)


def tiny_model(dtype: torch.dtype = torch.float32) -> BaseModel:
    """Qwen2 (biases on q, k, v) with heads of 32: vLLM's CPU attention has no 16."""
    module = make_tiny_model("qwen2", dtype=dtype, hidden_size=128, head_dim=32, intermediate_size=160, max_position_embeddings=512)
    return wrap_model(module.requires_grad_(False), make_tiny_tokenizer(), "tiny")


def write_model(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The same as files."""
    model = tiny_model(dtype)
    model.module.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


def specs(modules: list[ProjectionShape], scaling: str = "alpha/r", ranks: tuple[int, ...] = RANKS) -> list[ModuleSpec]:
    """Uneven ranks and alphas, hence a different s in every module."""
    rows = [(shape.name, ranks[i % len(ranks)], 4.0 + i % 5) for i, shape in enumerate(modules)]
    return [ModuleSpec(name, rank, alpha, scale_of(alpha, rank, scaling) if rank else 0.0) for name, rank, alpha in rows]


def adapted(model: BaseModel, module_specs: list[ModuleSpec] | None = None, *, strength: float = 0.1, seed: int = 0) -> PackedAdapter:
    """The model with an adapter whose B is not 0; strength 0: B = 0, as at the start of a run."""
    if module_specs is None:
        module_specs = specs(shapes(projections(model.module)))
    adapter = attach(model.module, module_specs, seed=seed, cast_to_input=True)
    move(adapter, seed, strength)
    return adapter


def move(adapter: PackedAdapter, seed: int, strength: float = 0.1) -> None:
    """Another B, as after an optimizer step."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in adapter.slots:
            b_rn = adapter.b_rn(name)
            b_rn.copy_(strength * torch.randn(b_rn.shape, generator=generator))


MEMORY = ("--kv-cache-memory-bytes", str(64 << 20))


def engine_process(
    model: Path,
    log: Path,
    *,
    dtype: str = "float32",
    request_timeout: float = 60.0,
    max_lora_rank: int = 32,
    memory: Sequence[str] = MEMORY,
    socket: Path | None = None,
) -> EngineProcess:
    """An engine that is not started yet."""
    load = EngineLoad(sequences=32, longest=LENGTH, max_lora_rank=max_lora_rank, max_loras=2, sleeps=False)
    flags = engine_flags(model=str(model), revision=None, dtype=dtype, load=load, on_cpu=True, memory=memory)
    return EngineProcess(flags, log=log, start_timeout=200, request_timeout=request_timeout, socket=socket)


class KeptEngine(OwnEngine):
    """Stays up when a sampler ends."""

    def start(self) -> None:
        if not self.alive():
            super().start()

    def stop(self, held: Sequence[Policy] = ()) -> None:
        """The fixture does."""
        for policy in held:
            self.unload(policy)


def kill_in_mid_batch(server: Server, kill: Callable[[], None]) -> None:
    """Calls `kill` when the server's next batch has been under way for 50 ms; LONG ones of the tiny model take some 200."""
    sample = server.sample

    def sample_and_die(*arguments: Any) -> None:
        server.sample = sample
        threading.Timer(0.05, kill).start()
        sample(*arguments)

    server.sample = sample_and_die


@contextmanager
def sampler_on(servers: Server | list[Server], model: BaseModel, adapter: PackedAdapter, **changes: Any):
    """A sampler of its own on running servers, with what it said in `sampler.said`."""
    prompts = model.tokenizer([example.prompt for example in EXAMPLES])["input_ids"]
    said: list[str] = []
    settings: Mapping[str, Any] = {"folder": memory_folder(), "max_restarts": 2, "say": said.append} | changes
    source = AdapterSource(adapter, model, name=f"t{secrets.token_hex(4)}")
    servers = servers if isinstance(servers, list) else [servers]
    with VllmSampler(model, source, servers, Canary(canary_prompts(prompts, 40), model.module.dtype), **settings) as sampler:
        sampler.said = said
        yield sampler
