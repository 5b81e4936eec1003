"""What a batch of scoring costs beside a step of the training that it is for: the two take turns (fastlora/turns.py).

    scoring   sample from the untouched model, reward, backward to dB, add to the sums      (fastlora/scoring.py)
    step      sample through the adapter, reward, backward to dA and dB, clip, optimizer

Round i of both is generation batch i + 1 of the run, sampled by the scorer's engine: no second one is needed. Batches without a gradient
are among them, as they are in scoring: they cost it the sampling alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console

from fastlora.build import build
from fastlora.config import RunConfig
from fastlora.errors import refuse_unknown_options
from fastlora.ops.registry import use_implementation
from fastlora.progress import StepTimer
from fastlora.run_folder import RunFolder
from fastlora.scoring import LEAST_BATCHES, Scorer, scoring_config
from fastlora.trainer import Trainer
from fastlora.turns import ROUNDS, Say, Turns, TurnsError, check_rounds, take_turns
from fastlora.update_time import update, with_steps

SCORING, STEP = "scoring", "step"
OPTIONS = ("rounds",)
"""Of the task: the argument of `time_scoring`."""


def run_scoring_time(config: RunConfig, folder: Path, options: Mapping[str, Any], say: Say) -> None:
    """The task of a study: `time_scoring` with these options into `folder`. Raises TurnsError for an unknown option."""
    refuse_unknown_options(options, OPTIONS, "scoring times", TurnsError)
    time_scoring(config, folder, **options, say=say).write(folder)


def time_scoring(config: RunConfig, folder: Path, rounds: int = ROUNDS, say: Say = lambda message: None) -> Turns:
    """Seconds of SCORING and STEP. config: of the training; folder: for anything that it leaves behind.

    Raises TurnsError as `check_rounds` does, and what `scoring_config` and `build` raise.
    """
    check_rounds(2, rounds)
    own, steps = scoring_config(config, LEAST_BATCHES), with_steps(config, {}, rounds + 1)
    scored, trained = build(own, Console(quiet=True)), build(steps, Console(quiet=True))
    with ExitStack() as stack:
        for context in (scored.rewards, scored.engine, trained.rewards, use_implementation(config.trainer.implementation)):
            stack.enter_context(context)
        scorer, trainer = Scorer(own, scored, rounds + 1), Trainer(steps, trained, RunFolder(folder))
        numbers = {SCORING: count(1), STEP: count(1)}

        def step() -> None:
            update(trainer, scored.objective.collect(next(numbers[STEP]), 0, StepTimer()).batch)

        return take_turns({SCORING: lambda: scorer.add(next(numbers[SCORING]), StepTimer()), STEP: step}, rounds, say)
