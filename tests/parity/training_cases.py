"""Ten optimizer steps of both whole trainers on the same recorded rollouts: the same adapter, bit for bit.

TRL's side is `GRPOTrainer.train()`: its data loader, its scoring of behaviour and reference policy, its advantages, its loss,
accelerate's accumulation and clipping, `torch.optim.AdamW(fused=True)`, transformers' schedule. Two things are replaced: `_generate`
(the sampling) returns the recording, and the shuffle of the samples within a generation batch is switched off, since we keep
the order in which they were sampled. Ours is `fastlora.trainer.Trainer` with the replay sampler.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
import trl.trainer.grpo_trainer
from rich.console import Console
from transformers import TrainerCallback

from fastlora.build import Parts
from fastlora.config import RunConfig
from fastlora.data import batch_indices
from fastlora.metrics import MetricsWriter
from fastlora.model import wrap_model
from fastlora.objectives import PolicyObjective
from fastlora.optim import AdamW, learning_rates
from fastlora.progress import TrainingProgress
from fastlora.rewards.deposits import deposit_at_end
from fastlora.rewards.registry import Rewards
from fastlora.rollout.replay import ReplaySampler, rollout_file, write_rollout
from fastlora.run_folder import RunFolder
from fastlora.trainer import Trainer
from fastlora.types import Deposits, Example, Rollout
from tests.parity.delta import Delta, compare
from tests.parity.trl_cases import (
    MAX_LENGTH,
    NUM_GENERATIONS,
    PROMPT_LENGTHS,
    SAMPLES,
    Recording,
    as_rollout,
    from_another_sampler,
    lora,
    make_trainer,
    record,
    trl_arguments,
)
from tests.parity.twins import Twins, copy_to_peft, make_twins
from tests.tiny import make_tiny_model, make_tiny_tokenizer

OPTIMIZER_STEPS = 10
EXAMPLES = tuple(Example(i, str(i), "") for i in range(len(PROMPT_LENGTHS)))

ANOTHER_SAMPLER = {"sampler": "replay", "replay_path": "."}
"""Recorded log-probabilities count as a sampler's own; the objective is given its replay sampler by hand."""

RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "dapo, one optimizer step per rollout": {},
    "grpo, β = 0.05, two micro-batches, two optimizer steps per rollout": {
        "loss": {"loss_type": "grpo", "beta": 0.05},
        "trainer": {"gradient_accumulation_steps": 2, "steps_per_generation": 4},
    },
    "dapo, β = 0.05, sequence ratio, two passes, temperature 0.7, warm-up and cosine": {
        "loss": {"beta": 0.05, "importance_sampling_level": "sequence", "epsilon_high": 0.28},
        "trainer": {"num_iterations": 2},
        "rollout": {"temperature": 0.7},
        "advantage": {"scale_rewards": "batch"},
        "optim": {"schedule": "cosine", "warmup_steps": 3, "weight_decay": 0.1},
    },
    "dapo, another sampler, token_truncate, one optimizer step per rollout": {
        "loss": {"sampler_correction": "token_truncate", "sampler_correction_max": 1.3},
        "rollout": ANOTHER_SAMPLER,
    },
    "grpo, β = 0.05, another sampler, sequence_mask, off-policy mask, two optimizer steps per rollout": {
        "loss": {"loss_type": "grpo", "beta": 0.05, "sampler_correction": "sequence_mask", "off_policy_mask_threshold": 0.05},
        "trainer": {"steps_per_generation": 2},
        "rollout": ANOTHER_SAMPLER,
    },
}


def run_config(name: str) -> RunConfig:
    """Learning rate 1e-2: after a step the policy is visibly another one, and later losses depend on it."""
    sections = RUNS[name]
    trainer = {"implementation": "reference", "checkpoint_every": 0, **sections.get("trainer", {})}
    per_generation = trainer.get("steps_per_generation", 1) * trainer.get("num_iterations", 1)
    trainer["steps"] = OPTIMIZER_STEPS * trainer.get("gradient_accumulation_steps", 1) // per_generation
    rollout = {"num_prompts": len(EXAMPLES), "num_generations": NUM_GENERATIONS, "max_completion_length": MAX_LENGTH}
    return RunConfig.model_validate(
        {
            "lora": lora(),
            "loss": sections.get("loss", {}),
            "advantage": sections.get("advantage", {}),
            "rollout": {**rollout, **sections.get("rollout", {})},
            "optim": {"lr": 1e-2, "max_grad_norm": 1.0, **sections.get("optim", {})},
            "trainer": trainer,
            "eval": {"every": 0},
        }
    )


@dataclass(slots=True)
class RecordedReward:
    """A reward function that remembers what it said of each rollout."""

    recordings: dict[int, Recording]
    name: str = "recorded"
    timeouts: int = 0

    def __call__(self, rollout: Rollout) -> Deposits:
        return deposit_at_end(self.recordings[rollout.adapter_version].rewards_n.tolist(), rollout)

    def check(self, examples: object) -> None:
        """Nothing can be wrong."""

    def close(self) -> None:
        """Nothing to end."""


@dataclass(slots=True)
class NormLog(TrainerCallback):
    """Gradient norms as TRL's trainer reports them."""

    norms: list[float] = field(default_factory=list)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "grad_norm" in logs:
            self.norms.append(logs["grad_norm"])


def train_theirs(config: RunConfig, recordings: list[Recording], twins: Twins) -> tuple[Any, list[float]]:
    """(PEFT model after ten optimizer steps, gradient norms before clipping)."""
    remaining, current = iter(recordings), []

    def recording() -> Recording:
        return current[-1]

    trainer = make_trainer(make_tiny_model(), lora(), recording, **trl_training_arguments(config))
    copy_to_peft(twins.adapter, trainer.model)
    generate, log = trainer._generate, NormLog()

    def next_recording(prompts: list[str]) -> Any:
        current.append(next(remaining))
        return generate(prompts)

    trainer._generate = next_recording
    trainer.use_vllm = config.loss.sampler_correction != "none"  # the constructor would look for an engine
    trainer.add_callback(log)
    with mock.patch.object(trl.trainer.grpo_trainer, "shuffle_sequence_dict", lambda batch: batch):
        trainer.train()
    assert next(remaining, None) is None, "TRL has not asked for every recorded rollout"
    return trainer.model, log.norms


def trl_training_arguments(config: RunConfig) -> dict[str, Any]:
    """GRPOConfig's arguments for our config."""
    return {
        **trl_arguments(config.loss, config.advantage),
        "per_device_train_batch_size": SAMPLES // config.steps_per_generation,
        "steps_per_generation": config.steps_per_generation,
        "gradient_accumulation_steps": config.trainer.gradient_accumulation_steps,
        "num_iterations": config.trainer.num_iterations,
        "temperature": config.rollout.temperature,
        "max_steps": OPTIMIZER_STEPS,
        "learning_rate": config.optim.lr,
        "adam_beta1": config.optim.betas[0],
        "adam_beta2": config.optim.betas[1],
        "adam_epsilon": config.optim.eps,
        "weight_decay": config.optim.weight_decay,
        "max_grad_norm": config.optim.max_grad_norm,
        "optim": "adamw_torch_fused",
        "lr_scheduler_type": config.optim.schedule,
        "warmup_steps": config.optim.warmup_steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def train_ours(config: RunConfig, recordings: dict[int, Recording], twins: Twins, folder: Path) -> list[float]:
    """Trains the packed adapter of `twins`; returns the gradient norms before clipping."""
    for step, (version, recording) in enumerate(recordings.items()):
        rows = batch_indices(step, len(EXAMPLES), len(EXAMPLES), config.seed)
        rollout = as_rollout(recording, examples=tuple(EXAMPLES[row] for row in rows), adapter_version=version)
        write_rollout(rollout, rollout_file(folder / "rollouts", version))
    model, sampler = wrap_model(twins.ours, make_tiny_tokenizer(), "tiny"), ReplaySampler(folder / "rollouts")
    rewards = Rewards([RecordedReward(recordings)])
    parts = Parts(
        model=model,
        adapter=twins.adapter,
        flat=twins.adapter.flat,
        optimizer=AdamW(twins.adapter.flat, config.optim),
        learning_rates=learning_rates(config.optim, OPTIMIZER_STEPS),
        engine=nullcontext(),
        objective=PolicyObjective(config, model, twins.adapter, sampler, rewards, EXAMPLES),
        sampler=sampler,
        rewards=rewards,
        train_examples=(),
        eval_examples=(),
    )
    norms: list[float] = []
    step_of = parts.optimizer.step

    def step(lr: float, **options: Any) -> Any:
        result = step_of(lr, **options)
        norms.append(result.grad_norm)
        return result

    parts.optimizer.step = step  # type: ignore[method-assign]
    console = Console(file=io.StringIO())
    with MetricsWriter(folder) as writer, TrainingProgress(config.trainer.steps, "parity", console=console) as progress:
        Trainer(config, parts, RunFolder(folder)).run(writer, progress, lambda: None)
    return norms


def training_delta(name: str) -> Delta:
    """All gradient norms, and A and B of every module after ten optimizer steps."""
    config, twins = run_config(name), make_twins(make_tiny_model(), lora())
    before = [tensor.clone() for tensor in twins.parameters()[0]]
    per_generation = OPTIMIZER_STEPS // config.trainer.steps
    recordings = {step * per_generation: from_another_sampler(record(seed=10 + step), step) for step in range(config.trainer.steps)}
    peft_model, their_norms = train_theirs(config, list(recordings.values()), twins)
    with TemporaryDirectory() as folder:
        our_norms = train_ours(config, recordings, twins, Path(folder))
    assert len(our_norms) == len(their_norms) == OPTIMIZER_STEPS
    assert max(our_norms) > config.optim.max_grad_norm, "no step was clipped"
    ours, theirs = Twins(twins.ours, twins.adapter, peft_model).parameters()
    assert all(bool((new != old).any()) for new, old in zip(ours, before, strict=True))
    return compare([torch.tensor(our_norms), *ours], [torch.tensor(their_norms), *theirs])


def cases() -> Iterator[tuple[str, Callable[[], Delta]]]:
    """(name, comparison)."""
    for name in RUNS:
        yield name, lambda name=name: training_delta(name)
