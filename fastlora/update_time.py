"""What an update costs with adapters here rather than there: the runs take turns (fastlora/turns.py) on one generation batch.

What is timed is loss, backward, clip and step; the policy that sampled the batch is everybody's, since an untrained adapter changes
nothing. All runs are in memory at once, each with its own copy of the base model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from fastlora.build import build
from fastlora.config import RunConfig
from fastlora.errors import refuse_unknown_options
from fastlora.ops.registry import use_implementation
from fastlora.progress import StepTimer
from fastlora.run_folder import RunFolder
from fastlora.trainer import Trainer
from fastlora.turns import ROUNDS, Say, Turns, TurnsError, check_rounds, take_turns
from fastlora.types import TrainBatch

OPTIONS = ("runs", "rounds")
"""Of the task: the arguments of `time_updates`."""


def run_update_time(config: RunConfig, folder: Path, options: Mapping[str, Any], say: Say) -> None:
    """The task of a study: `time_updates` with these options into `folder`. Raises TurnsError for an unknown option."""
    refuse_unknown_options(options, OPTIONS, "update times", TurnsError)
    time_updates(config, folder, **options, say=say).write(folder)


def time_updates(
    config: RunConfig,
    folder: Path,
    runs: Mapping[str, Mapping[str, Any]],
    rounds: int = ROUNDS,
    say: Say = lambda message: None,
) -> Turns:
    """runs: name -> settings of [lora] in which the run differs from `config`; the first one samples the batch. folder: for anything that
    a run leaves behind. Raises TurnsError as `check_rounds` does; and what `build` raises.
    """
    check_rounds(len(runs), rounds)  # before anything is loaded
    updates: dict[str, Callable[[], None]] = {}
    with ExitStack() as stack, use_implementation(config.trainer.implementation):
        for name, lora in runs.items():
            say(f"{name}: load")
            own = with_steps(config, lora, rounds + 1)
            parts = build(own, Console(quiet=True))
            stack.enter_context(parts.rewards)
            if not updates:
                with parts.engine:
                    batch = parts.objective.collect(1, 0, StepTimer()).batch
            updates[name] = partial(update, Trainer(own, parts, RunFolder(folder)), batch)
        return take_turns(updates, rounds, say)


def update(trainer: Trainer, batch: TrainBatch) -> None:
    """Every optimizer step of one generation batch."""
    for _ in trainer.optimizer_steps(batch, defaultdict(list)):
        pass


def with_steps(config: RunConfig, lora: Mapping[str, Any], steps: int) -> RunConfig:
    """The run with these settings of [lora], long enough for so many generation batches."""
    settings = config.model_dump()
    settings["lora"] |= lora
    settings["trainer"] |= {"steps": steps}
    return RunConfig.model_validate(settings)
