"""What several things cost on one machine: they take turns in one process.

    round i:   each of them once, in order; odd rounds the other way round; round 0 warms up and does not count
    a ratio    is that of two of them in the same round

Two processes on one machine differ by more than most savings: the updates of one run of SmolLM2 on two cores took .46 s and, with another
seed a quarter of a minute later, .38. Inside a round that falls on all alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from fastlora.atomic import atomic_write_text
from fastlora.errors import FastloraError
from fastlora.progress import StepTimer

TURNS_FILE = "turns.json"
ROUNDS, LEAST_ROUNDS = 25, 3

Say = Callable[[str], None]


class TurnsError(FastloraError):
    """Times that cannot be taken or read; the message names the number or the file."""


@dataclass(frozen=True, slots=True)
class Turns:
    """turns.json."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    seconds: Mapping[str, Sequence[float]]
    """Who -> wall clock in each round that counts."""

    def write(self, folder: Path) -> None:
        """Writes `folder`/turns.json atomically."""
        atomic_write_text(folder / TURNS_FILE, json.dumps(asdict(self), indent=2, allow_nan=False) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Turns:
        """Raises TurnsError when the file is missing or damaged."""
        path = folder / TURNS_FILE
        try:
            return TypeAdapter(cls).validate_json(path.read_bytes())
        except FileNotFoundError:
            raise TurnsError(f"{path}: no such file; a study's update_time and scoring_time tasks write one") from None
        except ValidationError as error:
            raise TurnsError(f"{path} is damaged: {error}") from None


def check_rounds(runs: int, rounds: int) -> None:
    """Raises TurnsError for no run, or for less than three rounds, which have no interval."""
    if not runs or rounds < LEAST_ROUNDS:
        raise TurnsError(f"{runs} runs, {rounds} rounds: times need one run and {LEAST_ROUNDS} rounds at least")


def take_turns(runs: Mapping[str, Callable[[], object]], rounds: int, say: Say = lambda message: None) -> Turns:
    """Calls every run rounds + 1 times. Raises TurnsError as `check_rounds` does."""
    check_rounds(len(runs), rounds)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in list(runs)[:: 1 if number % 2 == 0 else -1]:
            timer = StepTimer()
            runs[name]()
            if number:
                seconds[name].append(sum(timer.lap().values()))
        say(f"round {number} of {rounds}")
    return Turns(seconds)
