"""fastlora as a contender: its own Trainer, built from a config as a run is."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from bench.contender import Clock, Command, Commands, Contender, Report
from bench.workload import run_config
from fastlora.build import Parts, build
from fastlora.config import RunConfig
from fastlora.flat import FlatParameters
from fastlora.metrics import MetricsWriter
from fastlora.objectives import PolicyObjective
from fastlora.ops.registry import use_implementation
from fastlora.optim import StepResult
from fastlora.progress import StepTimer
from fastlora.rollout.sampler import SamplingParams
from fastlora.rollout.torch import TorchSampler
from fastlora.run_folder import RunFolder
from fastlora.trainer import Trainer
from fastlora.update_time import update


def serve(contender: Contender, folder: Path, commands: Commands, report: Report) -> None:
    """See contender.Serve."""
    config = run_config(
        folder,
        contender.dtype,
        method=contender.method,
        micro_batch=contender.micro_batch,
        sampler="replay" if contender.work == "update" else "torch",
    )
    parts = build(config, Console(quiet=True))
    if contender.work != "update":
        parts = without_eos(config, parts)
    with tempfile.TemporaryDirectory() as run, parts.rewards, use_implementation(config.trainer.implementation):
        trainer = Trainer(config, parts, RunFolder(Path(run)))
        if contender.work == "step":
            serve_steps(trainer, Path(run), commands, report)
        elif contender.work == "rollout":
            serve_rollouts(config, parts, commands, report)
        else:
            serve_updates(trainer, parts, commands, report)


def without_eos(config: RunConfig, parts: Parts) -> Parts:
    """The same run with a sampler that never ends a completion early: every step samples the same number of tokens."""
    model = replace(parts.model, eos_ids=())
    sampler = TorchSampler(model, config.rollout.batch_size)
    live = PolicyObjective(config, model, parts.adapter, sampler, parts.rewards, parts.eval_examples)  # eval_examples = the problems
    return replace(parts, model=model, sampler=sampler, objective=live)


def serve_updates(trainer: Trainer, parts: Parts, commands: Commands, report: Report) -> None:
    """The recorded batch, again and again; the clock runs over what Trainer._step calls its update, without the collecting."""
    batch = parts.objective.collect(1, 0, StepTimer()).batch
    for command in commands:
        if command.do == "gradient":
            save_gradient_at_next_step(parts, command)
        start = Clock.now()
        update(trainer, batch)
        start.report_to(report)


def serve_steps(trainer: Trainer, run: Path, commands: Commands, report: Report) -> None:
    """Whole steps, each on completions of the policy of that moment."""
    with MetricsWriter(run) as writer:
        for step, _ in enumerate(commands, start=1):
            start = Clock.now()
            metrics = trainer._step(step, writer, lambda: None)
            start.report_to(report, metrics)


def serve_rollouts(config: RunConfig, parts: Parts, commands: Commands, report: Report) -> None:
    """Completions of all problems, each time under a policy of a new version, so that vLLM cannot use the prefixes of the last one."""
    for version, _ in enumerate(commands, start=1):
        start = Clock.now()
        rollout = parts.sampler.sample(parts.eval_examples, sampling(config), seed=version, adapter_version=version)
        start.report_to(report, {**rollout.metrics, "tokens": float(rollout.num_tokens)})


def sampling(config: RunConfig) -> SamplingParams:
    """As the run samples."""
    return SamplingParams(config.rollout.num_generations, config.rollout.max_completion_length, config.rollout.temperature)


def save_gradient_at_next_step(parts: Parts, command: Command) -> None:
    """Looks over the optimizer's shoulder once: it is given the whole accumulated gradient, and zeroes it afterwards."""
    optimizer, take_step = parts.optimizer, parts.optimizer.step

    def step(lr: float, *, loss_finite: bool = True) -> StepResult:
        save_file(gradients(parts.flat), command.path)
        optimizer.step = take_step  # type: ignore[method-assign]
        return take_step(lr, loss_finite=loss_finite)

    optimizer.step = step  # type: ignore[method-assign]


def gradients(flat: FlatParameters) -> dict[str, Tensor]:
    """dA [r, d] and dB [n, r] by name, copied."""
    found = {}
    for segment in flat.segments:
        matrix = flat.grad[segment.offset :][: segment.numel].view(segment.shape)
        found[segment.name] = (matrix.t() if segment.transposed else matrix).contiguous().clone()
    return found
