"""[vllm] of a run's config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from fastlora.section import NonNegative, Section


class VllmConfig(Section):
    """Sampling by vLLM (rollout.sampler = "vllm")."""

    servers: tuple[str, ...] = ()
    """URLs of running servers (http://host:8000), prompts are spread over them; () = an engine of our own, started, watched and stopped."""
    api_key_variable: str = "VLLM_API_KEY"
    """Environment variable with the servers' API key; unset = none is sent."""
    adapter_folder: Path | None = None
    """Folder that the servers see under the same path, for adapters on their way; None = one on this machine's tmpfs."""
    weights: Literal["adapter", "merged", "auto"] = "adapter"
    """adapter = loaded beside the base; merged = W + s B A replaces the engine's matrices at every step (no cost per token, a longer swap);
    auto = the faster one of a short trial, which a resumed run makes anew. With method = "full" every weight is replaced."""
    staleness: Annotated[int, Field(ge=0, le=1)] = 0
    """1 = sample step t + 1 while step t trains, from the policy before that step; 0 = sample, then train."""
    kv_cache_gib: Annotated[float, Field(gt=0.0)] | None = None
    """GiB of the engine's KV cache; None = rollout.batch_size prompts and completions of full length."""
    device: NonNegative | None = None
    """GPU of the engine, as torch counts them (1 = cuda:1); None = the trainer's own: there it sleeps while the trainer updates."""
    gpu_share: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Part of the GPU's memory for the engine (weights, KV cache, adapter slots); None = what the plan finds that it needs."""
    max_restarts: NonNegative = 3
    """Times that one rollout is saved from a dead, hung or refusing engine (or server) before the run stops, saved and resumable."""
    start_timeout: Annotated[float, Field(gt=0.0)] = 600.0
    """Seconds until an engine that is started must answer."""
    request_timeout: Annotated[float, Field(gt=0.0)] = 3600.0
    """Seconds until a request to a server counts as hung; an engine of our own does after 300 (or these) without a sign of life."""
