"""TRL's GRPOTrainer on PEFT's layers as a contender: its own `train()`, stopped before every generation until a command comes.

The update lasts from the end of `_generate_and_score_completions` to on_step_end: the loss and backward pass of all its
micro-batches, clipping, optimizer and schedule step, zero_grad. A step lasts from the beginning of that function. A rollout is
`_generate` alone: Hugging Face's `generate` on left-padded prompts with a KV cache, as TRL calls it, without `train()` around it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from bench.contender import Clock, Command, Commands, Contender, Report
from bench.peft_model import load_peft_model, peft_gradients
from bench.reward import hashed
from bench.workload import COMPLETION_TOKENS, NUM_GENERATIONS, SAMPLES, STEPS, read_settings, read_workload
from fastlora.packaged_model import packaged_model_folder
from fastlora.types import Rollout


class NoMoreCommands(Exception):
    """Leaves `train()`: the worker's stdin has ended."""


class Meter(TrainerCallback):
    """Waits for a command before every generation, and reports at the end of the optimizer step."""

    def __init__(self, work: str, commands: Commands, report: Report) -> None:
        self._work, self._commands, self._report = work, commands, report
        self._start: Clock | None = None
        self._save_to = ""

    def attach(self, trainer: GRPOTrainer) -> None:
        """Wraps the trainer's generation, for the clock, and its clipping, where the gradient is complete and unclipped."""
        generate, clip = trainer._generate_and_score_completions, trainer.accelerator.clip_grad_norm_

        def gated(inputs: list[dict[str, Any]]) -> dict[str, Any]:
            command = self._next()
            begin = Clock.now()
            outputs = generate(inputs)
            self._start = begin if self._work == "step" else Clock.now()
            self._save_to = command.path
            return outputs

        def clip_seen(*args: Any, **kwargs: Any) -> Any:
            if self._save_to:
                save_file(peft_gradients(trainer.model), self._save_to)
            return clip(*args, **kwargs)

        trainer._generate_and_score_completions = gated  # type: ignore[method-assign]
        trainer.accelerator.clip_grad_norm_ = clip_seen
        trainer.add_callback(self)

    def _next(self) -> Command:
        for command in self._commands:
            return command
        raise NoMoreCommands

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After the optimizer step and zero_grad."""
        assert self._start is not None
        self._start.report_to(self._report)


def serve(contender: Contender, folder: Path, commands: Commands, report: Report) -> None:
    """See contender.Serve."""
    rollout = read_workload(folder)
    model = load_peft_model(folder / "adapter", contender.dtype)
    with tempfile.TemporaryDirectory() as output:
        prompts = [example.prompt for example in rollout.examples]
        tokens = read_settings(folder).completion_tokens
        trainer = make_trainer(model, prompts, Path(output), contender.micro_batch, SAMPLES, completion_tokens=tokens)
        if contender.work == "rollout":
            serve_rollouts(trainer, [prompt for prompt in prompts for _ in range(NUM_GENERATIONS)], commands, report)
            return
        if contender.work == "update":
            trainer._generate = recorded(rollout)  # type: ignore[method-assign, assignment]
        Meter(contender.work, commands, report).attach(trainer)
        try:
            trainer.train()
        except NoMoreCommands:
            return


def serve_rollouts(trainer: GRPOTrainer, prompts: list[str], commands: Commands, report: Report) -> None:
    """A prompt for every completion, as `train()` hands them over."""
    trainer.model.train()
    for _ in commands:
        start = Clock.now()
        _, completions, *_ = trainer._generate(prompts)
        start.report_to(report, {"tokens": float(sum(map(len, completions)))})


def make_trainer(
    model: peft.PeftModel,
    prompts: Sequence[str],
    output: Path,
    micro_batch: int,
    samples: int,
    *,
    completion_tokens: int = COMPLETION_TOKENS,
) -> GRPOTrainer:
    """TRL's defaults but for: the CPU in the model's own dtype, no gradient checkpointing, micro-batches that add up to `samples`,
    completions of exactly `completion_tokens`, nothing logged or saved."""
    arguments = GRPOConfig(
        output_dir=str(output),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=samples // micro_batch,
        num_generations=NUM_GENERATIONS,
        max_completion_length=completion_tokens,
        generation_kwargs={"min_new_tokens": completion_tokens},  # no eos before that, as in our sampler
        max_steps=STEPS,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    return GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=AutoTokenizer.from_pretrained(packaged_model_folder()),
    )


def reward(completions: list[str], **_: Any) -> list[float]:
    """bench.reward, in TRL's signature."""
    return hashed(completions, ())


def recorded(rollout: Rollout) -> Callable[[list[str]], tuple[Any, ...]]:
    """In place of `GRPOTrainer._generate`: prompt ids, completion ids, tool mask, completions, log-probs, extras, images, tool images."""
    prompts = ragged(rollout.prompt_ids_np, rollout.prompt_mask_np)
    completions = ragged(rollout.completion_ids_nt, rollout.completion_mask_nt)
    return lambda _: (prompts, completions, None, list(rollout.texts), None, {}, None, None)


def ragged(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    """The rows without their padding."""
    return [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
