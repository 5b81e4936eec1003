"""The recorded work that every contender does: one adapter, one rollout, written once to a folder that all of them read.

    problems.jsonl   four word problems in the chat template, 103 to 128 tokens (reasoning-gym gsm_symbolic)
    adapter/         LoRA r 32, alpha 64 on all seven projections, A Kaiming-uniform, B ~ N(0, 0.01²): PEFT's own files
    rollouts/        four completions of exactly 128 tokens for each, sampled at T = 1 under that adapter, eos suppressed
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import reasoning_gym
import torch
from rich.console import Console

from fastlora.build import build
from fastlora.config import RunConfig
from fastlora.data import batch_indices
from fastlora.lora.packed import PackedAdapter
from fastlora.lora.peft_format import save_adapter
from fastlora.rollout.replay import read_rollout, rollout_file, write_rollout
from fastlora.rollout.sampler import SamplingParams
from fastlora.rollout.torch import TorchSampler
from fastlora.types import Rollout

MODEL = "smollm2-135m-instruct"
RANK, ALPHA = 32, 64.0
B_STD = 0.01
"""B is not zero: with B = 0 dA is 0 and half of the gradients would be compared with nothing."""
NUM_GENERATIONS, COMPLETION_TOKENS = 4, 128
PROBLEMS = (1, 2, 3, 4)
"""Rows of gsm_symbolic, seed 0: prompts of 108, 128, 122 and 103 tokens, 115 on average."""
SAMPLES = len(PROBLEMS) * NUM_GENERATIONS
SEED = 0
STEPS = 1000
"""Optimizer steps that a schedule is made for; a worker does a few of them."""

DType = Literal["float32", "bfloat16"]


def run_config(
    folder: Path,
    dtype: DType,
    *,
    method: Literal["lora", "full"] = "lora",
    micro_batch: int = SAMPLES,
    sampler: Literal["torch", "replay"] = "replay",
    completion_tokens: int = COMPLETION_TOKENS,
    adapter: bool = True,
) -> RunConfig:
    """fastlora's settings for the workload in `folder`; loss, clipping and optimizer stay at the defaults, which are TRL's.

    micro_batch: samples per backward pass. adapter: start from the recorded one (False: while it is being made).
    """
    problems = str(folder / "problems.jsonl")
    rollout = {
        "sampler": sampler,
        "replay_path": folder / "rollouts" if sampler == "replay" else None,
        "num_prompts": len(PROBLEMS),
        "num_generations": NUM_GENERATIONS,
        "max_completion_length": completion_tokens,
    }
    settings: dict[str, Any] = {
        "seed": SEED,
        "method": method,
        "model": {"name": MODEL, "dtype": dtype, "device": "cpu"},
        "lora": {"r": RANK, "lora_alpha": ALPHA, "init_from": folder / "adapter" if adapter and method == "lora" else None},
        "data": {"source": problems, "eval_path": problems, "train_size": 0},
        "rollout": rollout,
        "reward": {"functions": [f"{Path(__file__).with_name('reward.py')}:hashed"]},
        "optim": {"lr": 1e-6},  # TRL's default
        "trainer": {"steps": STEPS, "gradient_accumulation_steps": SAMPLES // micro_batch},
        "eval": {"num_problems": len(PROBLEMS), "every": 0},
    }
    return RunConfig.model_validate(settings)


def write_workload(folder: Path) -> Rollout:
    """Makes the three parts in an empty folder and returns the rollout. Sampled in float32; the same seeds give the same bits."""
    write_problems(folder, PROBLEMS)
    config = run_config(folder, "float32", sampler="torch", adapter=False)
    parts = build(config, Console(quiet=True))
    assert parts.adapter is not None
    with parts.rewards:
        randomize_b(parts.adapter, SEED)
        save_adapter(parts.adapter, folder / "adapter", base_model=MODEL, scaling=config.lora.scaling)
        sampler = TorchSampler(replace(parts.model, eos_ids=()), config.rollout.batch_size)
        order = batch_indices(0, len(PROBLEMS), len(PROBLEMS), SEED)  # as the trainer will ask for them
        params = SamplingParams(NUM_GENERATIONS, COMPLETION_TOKENS)
        rollout = sampler.sample([parts.eval_examples[row] for row in order], params, seed=SEED, adapter_version=0)
    write_rollout(rollout, rollout_file(folder / "rollouts", 0))
    return rollout


def write_problems(folder: Path, rows: tuple[int, ...]) -> None:
    """These rows of gsm_symbolic as a JSONL of questions and answers."""
    data = reasoning_gym.create_dataset("gsm_symbolic", size=max(rows) + 1, seed=SEED)
    lines = [json.dumps({"question": data[row]["question"], "answer": data[row]["answer"]}) for row in rows]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "problems.jsonl").write_text("\n".join(lines) + "\n")


@torch.no_grad()
def randomize_b(adapter: PackedAdapter, seed: int) -> None:
    """B ~ N(0, B_STD²)."""
    generator = torch.Generator().manual_seed(seed)
    for name in adapter.slots:
        b_rn = adapter.b_rn(name)
        b_rn.copy_(B_STD * torch.randn(b_rn.shape, generator=generator))


def read_workload(folder: Path) -> Rollout:
    """The recorded rollout."""
    return read_rollout(rollout_file(folder / "rollouts", 0))
