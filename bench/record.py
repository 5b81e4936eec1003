"""Makes the workload's folder (see bench/workload.py)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import reasoning_gym
import torch
from rich.console import Console

from bench.workload import B_STD, MODEL, NUM_GENERATIONS, PROBLEMS, RANK, SEED, Settings, run_config, write_settings
from fastlora.build import build
from fastlora.data import batch_indices
from fastlora.lora.packed import PackedAdapter
from fastlora.lora.peft_format import save_adapter
from fastlora.rollout.replay import rollout_file, write_rollout
from fastlora.rollout.sampler import SamplingParams
from fastlora.rollout.torch import TorchSampler
from fastlora.types import Rollout


def write_workload(folder: Path, settings: Settings | None = None) -> Rollout:
    """Makes all parts in an empty folder and returns the rollout. Sampled in float32; the same seeds give the same bits.

    settings: None = the defaults.
    """
    settings = settings or Settings()
    write_settings(settings, folder)
    write_problems(folder, PROBLEMS)
    config = run_config(folder, "float32", sampler="torch", adapter=False)
    parts = build(config, Console(quiet=True))
    assert parts.adapter is not None
    with parts.rewards:
        randomize_b(parts.adapter, SEED)
        save_adapter(parts.adapter, folder / "adapter", base_model=MODEL, scaling=config.lora.scaling)
        sampler = TorchSampler(replace(parts.model, eos_ids=()), config.rollout.batch_size)
        order = batch_indices(0, len(PROBLEMS), len(PROBLEMS), SEED)  # as the trainer will ask for them
        params = SamplingParams(NUM_GENERATIONS, settings.completion_tokens)
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


def describe(rollout: Rollout, ranks: str = f"r {RANK}") -> str:
    """The workload in words."""
    prompts = rollout.prompt_mask_np.sum(1)[:: rollout.num_generations].tolist()
    completions = sorted(set(rollout.completion_mask_nt.sum(1).tolist()))
    return f"{MODEL}, {ranks}, prompts {prompts} × {rollout.num_generations} completions of {completions} tokens"
