"""One point of bench/scaling.py in a fresh process: fastlora's update on random tokens of a given shape.

    python -m bench.scaling_point CONTENDER_JSON FOLDER THREADS        the protocol of bench/worker.py; FOLDER/point.json says the shape

Token ids are random: time and memory of an update do not depend on them, and so a shape needs no sampling first.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

from bench.contender import Clock, Commands, Contender, Report
from bench.gemm_peak import Group
from bench.record import randomize_b
from bench.worker import serve as serve_streams
from bench.workload import COMPLETION_TOKENS, RANK, SEED, run_config
from fastlora.build import build
from fastlora.config import RunConfig
from fastlora.ops.registry import use_implementation
from fastlora.run_folder import RunFolder
from fastlora.trainer import Trainer
from fastlora.types import TrainBatch
from fastlora.update_time import update

POINT_FILE = "point.json"


@dataclass(frozen=True, slots=True)
class Point:
    """The shape of an update."""

    num_prompts: int = 4
    num_generations: int = 4
    prompt_tokens: int = 115
    completion_tokens: int = COMPLETION_TOKENS
    rank: int = RANK

    @property
    def groups(self) -> tuple[Group, ...]:
        """For the FLOPs of bench/gemm_peak.py."""
        return (Group(self.prompt_tokens, (self.completion_tokens,) * self.num_generations),) * self.num_prompts

    def __str__(self) -> str:
        tokens = f"({self.prompt_tokens} + {self.num_generations} × {self.completion_tokens}) tokens"
        return f"r {self.rank}, {self.num_prompts} × {tokens}"

    def write(self, folder: Path) -> None:
        """Where `read_point` finds it."""
        (folder / POINT_FILE).write_text(json.dumps(asdict(self)))


def read_point(folder: Path) -> Point:
    """What `Point.write` wrote."""
    return Point(**json.loads((folder / POINT_FILE).read_text()))


def point_config(folder: Path, contender: Contender, point: Point) -> RunConfig:
    """The workload's settings, with the point's group size, length and rank (alpha = 2 r)."""
    config = run_config(folder, contender.dtype, sampler="torch", completion_tokens=point.completion_tokens, adapter=False)
    sizes = {"num_prompts": point.num_prompts, "num_generations": point.num_generations}
    changed = {
        "lora": config.lora.model_copy(update={"r": point.rank, "lora_alpha": 2.0 * point.rank}),
        "rollout": config.rollout.model_copy(update=sizes),
    }
    return config.model_copy(update=changed)


def random_batch(point: Point, vocab_size: int) -> TrainBatch:
    """A training record without padding: random prompts, one a group, random completions and advantages."""
    generator = torch.Generator().manual_seed(SEED)
    samples = point.num_prompts * point.num_generations
    prompts = torch.randint(3, vocab_size, (point.num_prompts, point.prompt_tokens), generator=generator)
    completions = torch.randint(3, vocab_size, (samples, point.completion_tokens), generator=generator)
    prompt_ids = prompts.repeat_interleave(point.num_generations, dim=0)
    scored = torch.ones_like(completions, dtype=torch.bool)
    return TrainBatch(
        prompt_ids_np=prompt_ids,
        prompt_mask_np=torch.ones_like(prompt_ids, dtype=torch.bool),
        completion_ids_nt=completions,
        completion_mask_nt=scored,
        loss_mask_nt=scored,
        advantages_nt=torch.randn(samples, 1, generator=generator),
        old_logp_nt=None,
        ref_logp_nt=None,
        sampler_logp_nt=None,
        num_items_in_batch=scored.numel(),
    )


def serve(contender: Contender, folder: Path, commands: Commands, report: Report) -> None:
    """See contender.Serve."""
    config = point_config(folder, contender, read_point(folder))
    parts = build(config, Console(quiet=True))
    assert parts.adapter is not None
    randomize_b(parts.adapter, SEED)
    batch = random_batch(read_point(folder), parts.model.module.config.vocab_size)
    with tempfile.TemporaryDirectory() as run, parts.rewards, use_implementation(config.trainer.implementation):
        trainer = Trainer(config, parts, RunFolder(Path(run)))
        for _ in commands:
            start = Clock.now()
            update(trainer, batch)
            start.report_to(report)


def main() -> None:
    """See the module's docstring."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stdout too
    torch.set_num_threads(int(sys.argv[3]))
    serve_streams(Contender(**json.loads(sys.argv[1])), Path(sys.argv[2]), serve, sys.stdin, answers)


if __name__ == "__main__":
    main()
