"""What the gradient profile costs a training step: `python -m bench.gradient_profile [CONFIG.toml] [--steps 5]`.

Whole steps of the config's run (real rollouts, real gradients), in which the profile's parts are timed where the trainer calls them:
‖∂L/∂ΔW‖, the norms of rank components (switched on), the rows of the table. The write of a part of the Parquet table, of the steps between
two checkpoints, is timed at the end and spread over these steps. Medians of the steps and of the writes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.command_line import positive
from bench.race import REPOSITORY
from fastlora import trainer as training
from fastlora.build import build
from fastlora.config import load_config
from fastlora.metrics import MetricsWriter
from fastlora.ops.registry import use_implementation
from fastlora.run_folder import RunFolder

WRITES = 5
"""Parts of the table that are written and timed."""


def timed(seconds: dict[str, list[float]], name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, its wall-clock seconds appended."""

    def wrapped(*args: Any) -> Any:
        start = time.perf_counter()
        result = call(*args)
        seconds[name].append(time.perf_counter() - start)
        return result

    return wrapped


def measure(config_path: Path, steps: int) -> dict[str, list[float]]:
    """Seconds of every whole step, of every call of the parts in it, and of every write of a part; after one step to warm up."""
    config = load_config(config_path, ["--log.rank-components"])
    parts = build(config, Console(quiet=True))
    seconds: dict[str, list[float]] = defaultdict(list)
    for name in ("delta_w_norms", "rank_component_norms"):
        setattr(training, name, timed(seconds, name, getattr(training, name)))
    with tempfile.TemporaryDirectory() as folder, parts.rewards, parts.engine, MetricsWriter(Path(folder)) as writer:
        norms = writer.gradient_norms
        writer.gradient_norms = timed(seconds, "rows", norms)  # type: ignore[method-assign]
        trainer = training.Trainer(config, parts, RunFolder(Path(folder)))
        with use_implementation(config.trainer.implementation):
            one_step = timed(seconds, "step", trainer._step)
            for step in range(1, steps + 2):
                one_step(step, writer, lambda: None)
        flat, rows = parts.flat, torch.rand(sum(segment.shape[0] for segment in parts.flat.segments))
        writer.flush()
        write = timed(seconds, "write", writer.flush)
        for step in range(steps + 2, steps + 2 + WRITES * config.trainer.checkpoint_every):
            norms(step, flat.segments, torch.rand(len(flat.segments)), torch.rand(len(flat.segments)), rows)
            if (step - steps - 1) % config.trainer.checkpoint_every == 0:
                write()
    calls = config.optimizer_steps // config.trainer.steps
    return {name: values[{"step": 1, "write": 0}.get(name, calls) :] for name, values in seconds.items()}


def main() -> int:
    """Command line."""
    made = argparse.ArgumentParser(prog="python -m bench.gradient_profile", description=(__doc__ or "").split("\n")[0])
    made.add_argument("config", type=Path, nargs="?", default=REPOSITORY / "configs" / "smollm2_sums_cpu.toml")
    made.add_argument("--steps", type=positive, default=5)
    made.add_argument("--threads", type=positive, default=len(os.sched_getaffinity(0)), help="of torch (default: all cores)")
    arguments = made.parse_args()
    torch.set_num_threads(arguments.threads)
    config, steps = load_config(arguments.config), arguments.steps
    seconds = {
        name: statistics.median(values) * (1 if name == "write" else len(values) / steps)
        for name, values in measure(arguments.config, steps).items()
    }
    seconds["write"] /= config.trainer.checkpoint_every
    step = seconds.pop("step")
    print(f"step {step:.3f} s, {arguments.threads} threads, median of {steps}")
    for name, value in seconds.items():
        print(f"{name:22} {1e3 * value:8.2f} ms {value / step:8.2%}")
    print(f"{'all':22} {1e3 * sum(seconds.values()):8.2f} ms {sum(seconds.values()) / step:8.2%}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
