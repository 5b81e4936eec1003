"""What a cell runs. A task writes its files into the cell's folder and returns; an exception is a failed attempt.

To add one: write the function here (big imports inside it: the scheduler reads this file too) and name it in TASKS. One's own task needs
no place here, a cell may name it as `path/to/file.py:function`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastlora.config import ConfigError, RunConfig
from fastlora.plugins import is_function_spec, load_function

EVALUATION_FILE = "evaluation.jsonl"
"""Of the evaluate task."""

Say = Callable[[str], None]
"""Writes a line to the cell's log."""

Task = Callable[[RunConfig, Path, Mapping[str, Any], Say], None]
"""(config, folder, options, say): may find its own files of an attempt that died, and goes on from them or writes them anew."""


def train(config: RunConfig, folder: Path, options: Mapping[str, Any], say: Say) -> None:
    """A run as `python train.py` does it; `folder` becomes a run folder. Goes on from the newest intact checkpoint, if there is one.

    A run that misses eval.required_gain has finished like any other: what it learned is the study's question.
    """
    from rich.console import Console

    from fastlora.metrics import write_environment
    from fastlora.run_folder import CONFIG_FILE, write_config
    from fastlora.session import resume_run

    if options:
        raise ConfigError(f"task 'train' has no options; the cell's config says all of it (got {', '.join(options)})")
    if not (folder / CONFIG_FILE).exists():
        write_environment(folder)
        write_config(folder, config)  # last: it is what makes this a run
    resume_run(folder, Console(force_terminal=False, width=140), allow_previous=True)


def probe(config: RunConfig, folder: Path, options: Mapping[str, Any], say: Say) -> None:
    """Scores of layers: probe.json."""
    from fastlora.probe import run_probe

    run_probe(config, folder, options, say)


def score(config: RunConfig, folder: Path, options: Mapping[str, Any], say: Say) -> None:
    """Sums of the gradients of B: scores.safetensors, structure.json."""
    from fastlora.scoring import run_score

    run_score(config, folder, options, say)


def update_time(config: RunConfig, folder: Path, options: Mapping[str, Any], say: Say) -> None:
    """Seconds of an update of several runs that take turns: turns.json."""
    from fastlora.update_time import run_update_time

    run_update_time(config, folder, options, say)


def scoring_time(config: RunConfig, folder: Path, options: Mapping[str, Any], say: Say) -> None:
    """Seconds of a batch of scoring and of a training step, which take turns: turns.json."""
    from fastlora.scoring_time import run_scoring_time

    run_scoring_time(config, folder, options, say)


def evaluate(config: RunConfig, folder: Path, options: Mapping[str, Any], say: Say) -> None:
    """Greedy answers of the base model, or of lora.init_from on it, to the config's held-out problems: evaluation.jsonl."""
    from fastlora.evaluate.adapter import evaluate_adapter

    if options:
        raise ConfigError(f"task 'evaluate' has no options; the cell's config says all of it (got {', '.join(options)})")
    result = evaluate_adapter(config, config.lora.init_from)
    say(f"accuracy {result.accuracy}")
    result.write(folder / EVALUATION_FILE)


def harness(config: RunConfig, folder: Path, options: Mapping[str, Any], say: Say) -> None:
    """Public benchmarks through lm-evaluation-harness, answered by the base model or with lora.init_from on it: harness.json."""
    from fastlora.study.harness import run_harness

    run_harness(config, folder, options, say)


def shira(config: RunConfig, folder: Path, options: Mapping[str, Any], say: Say) -> None:
    """PEFT's SHiRA trained by TRL, `entries` of W: shira.json, adapter/, evaluation.jsonl. An attempt that died starts anew."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL would report every trainer to its makers; read when the hub is imported
    from fastlora.study.shira import run_shira

    run_shira(config, folder, options, say)


TASKS: dict[str, Task] = {
    "train": train,
    "probe": probe,
    "score": score,
    "update_time": update_time,
    "scoring_time": scoring_time,
    "evaluate": evaluate,
    "harness": harness,
    "shira": shira,
}


def load_task(name: str) -> Task:
    """The task of this name. Raises ConfigError for an unknown one."""
    if is_function_spec(name):
        return load_function(name, "task")
    if name not in TASKS:
        raise ConfigError(f"task {name!r} is unknown; known are {', '.join(TASKS)}; one's own is written path/to/file.py:function")
    return TASKS[name]
