"""Whole runs on a tiny model that is saved to a folder, as a user's would be: config file, command, run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

import train
from tests.tiny import make_tiny_model, make_tiny_tokenizer


def save_tiny_model(folder: Path, **overrides: Any) -> Path:
    """A tiny Llama with its tokenizer, as Hugging Face files."""
    make_tiny_model("llama", **overrides).save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return folder


def write_problems(path: Path, count: int = 12) -> Path:
    """Own JSONL: one-digit sums."""
    path.write_text("".join(json.dumps({"question": f"{i % 5}+{i % 7}=", "answer": str(i % 5 + i % 7)}) + "\n" for i in range(count)))
    return path


def write_config(folder: Path, **changes: str) -> Path:
    """A config for the tiny model in `folder`; `changes` are TOML lines by dotted key, e.g. `**{"optim.lr": "1e-2"}`."""
    model = folder / "model"
    if not model.exists():
        save_tiny_model(model)
    data = write_problems(folder / "problems.jsonl")
    settings = {
        "output_dir": f'"{folder / "runs"}"',
        "model.name": f'"{model}"',
        "model.dtype": '"float32"',
        "lora.r": "4",
        "lora.rank_pattern": "{ q_proj = 3, k_proj = 0, down_proj = 5 }",
        "data.source": f'"{data}"',
        "data.eval_path": f'"{data}"',
        "data.max_prompt_length": "64",
        "rollout.num_prompts": "2",
        "rollout.num_generations": "4",
        "rollout.max_completion_length": "5",
        "reward.functions": f'["{write_reward(folder)}:digits"]',
        "optim.lr": "1e-2",
        "trainer.steps": "4",
        "trainer.checkpoint_every": "2",
        "eval.num_problems": "4",
        "eval.every": "0",
        **changes,
    }
    path = folder / "config.toml"
    path.write_text("".join(f"{key} = {value}\n" for key, value in settings.items()))
    return path


def write_reward(folder: Path) -> Path:
    """A user's reward: the share of digits in a completion. A random model gets some of it, so that groups have a spread."""
    path = folder / "reward.py"
    path.write_text("def digits(texts, examples):\n    return [sum(c.isdigit() for c in t) / max(len(t), 1) for t in texts]\n")
    return path


def run(config: Path, *arguments: str) -> int:
    """`python train.py CONFIG ARGUMENTS` in this process; its exit status."""
    return train.main([str(config), *arguments])


def adapter_tensors(run_folder: Path) -> dict[str, Tensor]:
    """The trained adapter's matrices."""
    return load_file(run_folder / "adapter" / "adapter_model.safetensors")
