"""What an update costs with adapters here rather than there: the runs take turns in one process, on one generation batch.

    round i:   seconds of every optimizer step of the batch, by each run in turn; odd rounds in the other order
    a ratio    is that of two runs in the same round

Two processes on one machine differ by more than most savings: the updates of one run of SmolLM2 on two cores took .46 s and, with another
seed a quarter of a minute later, .38. Inside a round that falls on all runs alike. What is timed is loss, backward, clip and step;
the policy that sampled the batch is everybody's, since an untrained adapter changes nothing. All runs are in memory at once, each with
its own copy of the base model.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from rich.console import Console

from fastlora.atomic import atomic_write_text
from fastlora.build import build
from fastlora.config import RunConfig
from fastlora.errors import FastloraError
from fastlora.ops.registry import use_implementation
from fastlora.progress import StepTimer
from fastlora.run_folder import RunFolder
from fastlora.trainer import Trainer

UPDATE_TIME_FILE = "update_time.json"
OPTIONS = ("runs", "rounds")
"""Of the task: the arguments of `time_updates`."""
LEAST_ROUNDS = 3

Say = Callable[[str], None]


class UpdateTimeError(FastloraError):
    """Times that cannot be taken or read; the message names the option or the file."""


@dataclass(frozen=True, slots=True)
class UpdateTimes:
    """update_time.json."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    seconds: Mapping[str, Sequence[float]]
    """Run -> of its update in each round."""
    objective: str
    tokens: int
    """Completion tokens of the batch."""

    def write(self, folder: Path) -> None:
        """Writes `folder`/update_time.json atomically."""
        atomic_write_text(folder / UPDATE_TIME_FILE, json.dumps(asdict(self), indent=2, allow_nan=False) + "\n")

    @classmethod
    def read(cls, folder: Path) -> UpdateTimes:
        """Raises UpdateTimeError when the file is missing or damaged."""
        path = folder / UPDATE_TIME_FILE
        try:
            return TypeAdapter(cls).validate_json(path.read_bytes())
        except FileNotFoundError:
            raise UpdateTimeError(f"{path}: no such file; a study's update_time task writes one") from None
        except ValidationError as error:
            raise UpdateTimeError(f"{path} is damaged: {error}") from None


def run_update_time(config: RunConfig, folder: Path, options: Mapping[str, Any], say: Say) -> None:
    """The task of a study: `time_updates` with these options into `folder`. Raises UpdateTimeError for an unknown option."""
    if unknown := sorted(options.keys() - set(OPTIONS)):
        raise UpdateTimeError(f"options of update times: {', '.join(unknown)} is unknown; known are {', '.join(OPTIONS)}")
    time_updates(config, folder, **options, say=say).write(folder)


def time_updates(
    config: RunConfig,
    folder: Path,
    runs: Mapping[str, Mapping[str, Any]],
    rounds: int = 9,
    say: Say = lambda message: None,
) -> UpdateTimes:
    """runs: name -> settings of [lora] in which the run differs from `config`; the first one samples the batch. folder: for anything that
    a run leaves behind. Raises UpdateTimeError for less than one run or three rounds; and what `build` raises.
    """
    if not runs or rounds < LEAST_ROUNDS:
        raise UpdateTimeError(f"{len(runs)} runs, {rounds} rounds: times need one run and {LEAST_ROUNDS} rounds at least")
    seconds: dict[str, list[float]] = defaultdict(list)
    with ExitStack() as stack, use_implementation(config.trainer.implementation):
        trainers: dict[str, Trainer] = {}
        for name, lora in runs.items():
            say(f"{name}: load")
            own = _config(config, lora, rounds)
            parts = build(own, Console(quiet=True))
            stack.enter_context(parts.rewards)
            if not trainers:
                with parts.engine:
                    data = parts.objective.collect(1, 0, StepTimer())
            trainers[name] = Trainer(own, parts, RunFolder(folder))
        for number in range(rounds + 1):
            order = list(trainers) if number % 2 == 0 else list(trainers)[::-1]
            for name in order:
                timer = StepTimer()
                with timer("update"):
                    for _ in trainers[name].optimizer_steps(data.batch, defaultdict(list)):
                        pass
                if number:  # the first one warms up
                    seconds[name].append(timer.lap()["seconds/update"])
            say(f"round {number} of {rounds}")
    return UpdateTimes({name: seconds[name] for name in trainers}, config.objective, data.num_tokens)


def _config(config: RunConfig, lora: Mapping[str, Any], rounds: int) -> RunConfig:
    """The run of which rounds + 1 steps are taken."""
    settings = config.model_dump()
    settings["lora"] |= lora
    settings["trainer"] |= {"steps": rounds + 1}
    return RunConfig.model_validate(settings)
