"""fastlora with rollouts from vLLM as a contender: its own Trainer and its own engine, which is a process below this one.

What the engine takes is reported as metrics: engine_cpu_seconds of a command, engine_peak_bytes (the sum of its processes' largest
resident sets: shared pages count twice, and the peaks may be of different moments).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
from rich.console import Console
from torch import Tensor

from bench.contender import Clock, Commands, Contender, Report, peak_bytes
from bench.fastlora_side import sampling, serve_rollouts, serve_steps
from bench.nucleus import agreement, nucleus_edge
from bench.workload import run_config
from fastlora.batches import policy_batch
from fastlora.build import Parts, build
from fastlora.config import RunConfig
from fastlora.ops.registry import use_implementation
from fastlora.packing import pack
from fastlora.policy import _predictors, score
from fastlora.rollout.sampler import SamplingParams
from fastlora.rollout.vllm import build as vllm_build
from fastlora.rollout.vllm import client as vllm_client
from fastlora.rollout.vllm import process as vllm_process
from fastlora.rollout.vllm.client import _sampling
from fastlora.rollout.vllm.sampler import VllmSampler
from fastlora.run_folder import RunFolder
from fastlora.trainer import Trainer
from fastlora.types import Rollout, TrainBatch

LOGPROB_TEMPERATURE, LOGPROB_TOP_P = 0.7, 0.9
"""Issue 5's."""

SMALLEST_MOVE = 1e-6
"""Added to every entry of A and B before a swap: other bits in every module."""


def without_end(params: SamplingParams, stop_token_ids: Sequence[int]) -> dict[str, Any]:
    """fastlora's request, but that no completion ends before its last token, as in every other contender."""
    return _sampling(params, ()) | {"ignore_eos": True}


def serve(contender: Contender, folder: Path, commands: Commands, report: Report) -> None:
    """See contender.Serve."""
    config = run_config(folder, contender.dtype, micro_batch=contender.micro_batch, sampler="vllm")
    config = config.model_copy(update={"vllm": config.vllm.model_copy(update={"weights": contender.weights})})
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(vllm_client, "_sampling", without_end))
        if contender.compiled:
            stack.enter_context(mock.patch.object(vllm_build, "engine_flags", compiled_flags))
        parts = build(config, Console(quiet=True))
        run = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for context in (parts.rewards, use_implementation(config.trainer.implementation), parts.engine):
            stack.enter_context(context)
        metered = MeteredReport(report)
        commands = metered.each(commands)
        if contender.work == "step":
            serve_steps(Trainer(config, parts, RunFolder(run)), run, commands, metered)
        elif contender.work == "rollout":
            serve_rollouts(config, parts, commands, metered)
        elif contender.work == "swap":
            serve_swaps(parts, commands, metered)
        else:
            serve_logprobs(config, parts, commands, metered)


def compiled_flags(**settings: Any) -> list[str]:
    """fastlora's flags without --enforce-eager."""
    return [flag for flag in vllm_process.engine_flags(**settings) if flag != "--enforce-eager"]


class MeteredReport:
    """A Report that adds what the processes below this one have taken since the command came."""

    def __init__(self, report: Report) -> None:
        self._report, self._before = report, 0.0

    def each(self, commands: Commands) -> Iterator[Any]:
        """The same commands, with a look at the engine before each."""
        for command in commands:
            self._before = children_cpu_seconds()
            yield command

    def __call__(self, seconds: float, cpu_seconds: float, metrics: Any = None, /) -> None:
        engine = {
            "engine_cpu_seconds": children_cpu_seconds() - self._before,
            "engine_peak_bytes": float(sum(peak_bytes(child.pid) for child in children())),
        }
        self._report(seconds, cpu_seconds, {**(metrics or {}), **engine})


def children() -> list[psutil.Process]:
    """The engine's processes (and the reward's, which hardly work)."""
    return psutil.Process().children(recursive=True)


def children_cpu_seconds() -> float:
    """User and system time of all that live."""
    return sum(child.cpu_times().user + child.cpu_times().system for child in children())


@torch.no_grad()
def serve_swaps(parts: Parts, commands: Commands, report: Report) -> None:
    """The next version, another in every module, into the engine, past the canary, and one token from it."""
    assert isinstance(parts.sampler, VllmSampler)
    for version, _ in enumerate(commands, start=1):
        parts.flat.data.add_(SMALLEST_MOVE)
        start = Clock.now()
        rollout = parts.sampler.sample(parts.eval_examples[:1], SamplingParams(1, 1), seed=version, adapter_version=version)
        start.report_to(report, {**rollout.metrics, **footprint(parts.sampler)})


def footprint(sampler: VllmSampler) -> dict[str, float]:
    """Bytes, now. A file that is removed and still mapped is in no folder, but it is in the tmpfs."""
    (server,) = sampler._servers
    engine = server.client.worker("fastlora_adapters")
    return {
        "trainer_bytes": float(psutil.Process().memory_info().rss),
        "worker_bytes": float(engine["resident_bytes"]),
        "adapters_cached": float(len(engine["cached"])),
        "folder_bytes": float(sum(path.stat().st_size for path in sampler._folder.rglob("*") if path.is_file())),
        "tmpfs_bytes": float(psutil.disk_usage(str(sampler._folder)).used),
    }


@torch.no_grad()
def serve_logprobs(config: RunConfig, parts: Parts, commands: Commands, report: Report) -> None:
    """All completions once under the full softmax and once under a nucleus: the engine's log-probabilities against the trainer's.

    adapter_effect: mean |log π − log π_base| of the first, nats: an adapter that did nothing would prove nothing.
    """
    assert parts.adapter is not None
    for version, _ in enumerate(commands, start=1):
        start = Clock.now()
        metrics = {}
        for name, top_p in (("full", 1.0), ("nucleus", LOGPROB_TOP_P)):
            params = replace(sampling(config), temperature=LOGPROB_TEMPERATURE, top_p=top_p)
            rollout = parts.sampler.sample(parts.eval_examples, params, seed=version, adapter_version=version)
            scores_t = trainer_scores(config, parts, rollout, top_p)
            edge_t = edges(parts, rollout, top_p) if top_p < 1 else torch.full_like(scores_t, torch.inf)
            metrics |= agreement(rollout.sampler_logp_nt[rollout.completion_mask_nt], scores_t, edge_t).metrics(name)
            metrics["tokens"] = float(rollout.num_tokens)
            if top_p == 1:
                with parts.adapter.disabled():
                    metrics["adapter_effect"] = float((trainer_scores(config, parts, rollout, top_p) - scores_t).abs().mean())
        start.report_to(report, metrics)


def trainer_scores(config: RunConfig, parts: Parts, rollout: Rollout, top_p: float) -> Tensor:
    """The trainer's own log-probabilities of the sampled tokens, [completion tokens]."""
    logp_nt, _ = score(parts.model.module, batch_of(rollout), LOGPROB_TEMPERATURE, config.trainer.implementation, top_p)
    return logp_nt[rollout.completion_mask_nt]


def edges(parts: Parts, rollout: Rollout, top_p: float) -> Tensor:
    """nucleus_edge of the sampled tokens, from the logits of the trainer's forward pass."""
    packed = pack(batch_of(rollout))
    logits_cv = parts.model.module.get_output_embeddings()(_predictors(parts.model.module, packed))
    return packed.unpack(nucleus_edge(logits_cv, packed.targets_c, LOGPROB_TEMPERATURE, top_p))[rollout.completion_mask_nt]


def batch_of(rollout: Rollout) -> TrainBatch:
    """Its tokens as the trainer reads them."""
    return policy_batch(rollout, torch.zeros(len(rollout.texts)), mask_truncated=False)
