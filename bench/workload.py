"""The recorded work that every contender does: one adapter, one rollout, written once (bench/record.py) to a folder that all of them read.

workload.json    ranks and alphas of the adapter, tokens of a completion
problems.jsonl   four word problems in the chat template, 103 to 128 tokens (reasoning-gym gsm_symbolic)
adapter/         LoRA on all seven projections, A Kaiming-uniform, B ~ N(0, 0.01²): PEFT's own files
rollouts/        four completions of exactly 128 tokens for each, sampled at T = 1 under that adapter, eos suppressed

bench.train_step has r 32, alpha 64 everywhere; bench.rollout a rank of its own for every projection, from 4 to 32, alpha 64 (s = 2 to 16).
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass, field
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

LAYERS = 30
PROJECTIONS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
SMALLEST_RANK = 4
SETTINGS_FILE = "workload.json"

DType = Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True)
class Settings:
    """What may differ between the workloads of two benchmarks."""

    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Module -> rank; RANK where it says nothing."""
    completion_tokens: int = COMPLETION_TOKENS


def uneven_ranks() -> dict[str, int]:
    """Every projection's path -> a rank from 4 to 32, drawn once and for all."""
    draw = random.Random(SEED)
    return {f"model.layers.{layer}.{name}": draw.randint(SMALLEST_RANK, RANK) for layer in range(LAYERS) for name in PROJECTIONS}


def write_settings(settings: Settings, folder: Path) -> None:
    """Into a folder that may be new."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS_FILE).write_text(json.dumps(asdict(settings)))


def read_settings(folder: Path) -> Settings:
    """Those of the folder; the defaults where it has only problems."""
    path = folder / SETTINGS_FILE
    return Settings(**json.loads(path.read_text())) if path.is_file() else Settings()


def run_config(
    folder: Path,
    dtype: DType,
    *,
    method: Literal["lora", "full"] = "lora",
    micro_batch: int = SAMPLES,
    sampler: Literal["torch", "replay", "vllm"] = "replay",
    completion_tokens: int | None = None,
    adapter: bool = True,
) -> RunConfig:
    """fastlora's settings for the workload in `folder`; loss, clipping and optimizer stay at the defaults, which are TRL's.

    micro_batch: samples per backward pass. completion_tokens: None = the workload's own. adapter: start from the recorded one (False: while
    it is being made).
    """
    workload = read_settings(folder)
    problems = str(folder / "problems.jsonl")
    rollout = {
        "sampler": sampler,
        "replay_path": folder / "rollouts" if sampler == "replay" else None,
        "num_prompts": len(PROBLEMS),
        "num_generations": NUM_GENERATIONS,
        "max_completion_length": completion_tokens or workload.completion_tokens,
    }
    settings: dict[str, Any] = {
        "seed": SEED,
        "method": method,
        "model": {"name": MODEL, "dtype": dtype, "device": "cpu"},
        "lora": {
            "r": RANK,
            "lora_alpha": ALPHA,
            "rank_pattern": workload.rank_pattern if method == "lora" else {},
            "init_from": folder / "adapter" if adapter and method == "lora" else None,
        },
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
