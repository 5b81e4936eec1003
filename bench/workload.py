"""The recorded work that every contender does: one adapter, one rollout, written once (bench/record.py) to a folder that all of them read.

problems.jsonl   four word problems in the chat template, 103 to 128 tokens (reasoning-gym gsm_symbolic)
adapter/         LoRA r 32, alpha 64 on all seven projections, A Kaiming-uniform, B ~ N(0, 0.01²): PEFT's own files
rollouts/        four completions of exactly 128 tokens for each, sampled at T = 1 under that adapter, eos suppressed
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from fastlora.config import RunConfig
from fastlora.rollout.replay import read_rollout, rollout_file
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
        "trainer": {"implementation": "cpp", "steps": STEPS, "gradient_accumulation_steps": SAMPLES // micro_batch},
        "eval": {"num_problems": len(PROBLEMS), "every": 0},
    }
    return RunConfig.model_validate(settings)


def read_workload(folder: Path) -> Rollout:
    """The recorded rollout."""
    return read_rollout(rollout_file(folder / "rollouts", 0))
