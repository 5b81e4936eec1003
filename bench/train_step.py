"""fastlora against TRL + PEFT, one command: `python -m bench.train_step [--json] [--pairs 5] [--out bench/results]`.

    gate      all libraries compute the same gradient, or exit 1 and no number
    trials    TRL and the plain loop over their settings: who is fastest on this machine
    update    loss, backward, clip, optimizer step on the recorded rollout: contenders in turns, medians
    step      the same with sampling and reward before it
    errors    against fp64, same dtype
    peak      the matrix products of the update and nothing else, in turns with our update

`--again gemms errors` measures these parts alone and puts them into the newest summary of this device.

Tables on stdout, progress on stderr; with --json the last line of stdout is one JSON object (see `report.summary`). Result rows are
written to OUT/DEVICE/train_step.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.status import Status

from bench.accuracy import measure_errors
from bench.command_line import parser, positive
from bench.contender import Contender
from bench.double import Errors
from bench.gate import GateError, check_gradients
from bench.gemm_side import works
from bench.race import Result, WorkerError, race
from bench.record import describe, write_workload
from bench.report import Measured, error_ratios, gemm_numbers, json_line, merge_summary, print_tables, write_rows
from bench.workload import DType

Say = Callable[[str], None]
Axes = Mapping[str, Sequence[Any]]

OURS = Contender("fastlora", "bfloat16")
"""bfloat16 is fastlora's default (model.dtype)."""
TRL_DEFAULT = Contender("trl")
"""TRL's defaults with gradient_checkpointing=False: float32, the whole generation batch in one backward pass."""
TRL_SMALL = Contender("trl", "bfloat16", 4)
"""The thriftiest that one would choose: memory_ratio_best is against this."""
DTYPES: tuple[DType, ...] = ("float32", "bfloat16")
PARTS = ("gemms", "errors")
MICRO_BATCHES = (16, 8, 2)
TRL_SEARCH: Axes = {"dtype": ["float32"], "micro_batch": MICRO_BATCHES}
PLAIN_SEARCH: Axes = {"dtype": ["float32"], "micro_batch": MICRO_BATCHES, "compiled": [True]}
"""Settings to try in place of those of the first trial (bf16, micro-batch 4), one after the other."""
TRIAL_RUNS = 1
"""After a warm-up: enough to choose by; the winners are then timed properly."""
FULL_DTYPE: DType = "float32"
"""fastlora's full fine-tuning has no bfloat16 (no master copy besides the weights); the adapter beside it runs in the same."""


def main(argv: list[str] | None = None) -> int:
    """See the module's docstring."""
    options = parse(argv)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="fastlora-bench-") as scratch, console.status("starting") as status:
        say = speaker(console, status)
        try:
            if options.again:
                numbers = measure_again(options.again, Path(scratch), options.pairs, options.threads, say)
                print(json.dumps(merge_summary(numbers, options.again, options.out)))
                return 0
            measured = measure(Path(scratch), options.pairs, options.threads, say)
        except (GateError, WorkerError) as error:
            console.print(f"[bold red]{type(error).__name__}:[/] ", end="")
            console.print(str(error), markup=False, highlight=False)
            return 1
    print_tables(measured, Console())
    write_rows(measured, options.out)
    if options.json:
        print(json_line(measured))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    command = parser("bench.train_step", __doc__)
    command.add_argument("--pairs", type=positive, default=5, metavar="N", help="timed runs of each contender, in turns (default 5)")
    command.add_argument(
        "--again", nargs="+", choices=PARTS, default=[], metavar="PART", help=f"only {' or '.join(PARTS)}, into the last summary"
    )
    return command.parse_args(argv)


def speaker(console: Console, status: Status) -> Say:
    """A live line on a terminal, plain lines elsewhere."""

    def say(message: str) -> None:
        status.update(message)
        if not console.is_terminal:
            print(message, file=sys.stderr, flush=True)

    return say


def measure(folder: Path, pairs: int, threads: int, say: Say) -> Measured:
    """Everything, in the order of the module's docstring. Raises GateError."""
    torch.set_num_threads(threads)
    say("recording the rollout")
    rollout = write_workload(folder)
    say("gradients of all libraries")
    cosines = check_gradients(folder, threads)
    trl_trials = search(TRL_SMALL, TRL_SEARCH, folder, threads, say)
    plain_trials = search(replace(TRL_SMALL, library="plain"), PLAIN_SEARCH, folder, threads, say)
    trl_best, plain_best = fastest(trl_trials), fastest(plain_trials)
    lora_beside_full = replace(OURS, dtype=FULL_DTYPE)
    update_races = {
        "default": (OURS, TRL_DEFAULT),
        "best": (OURS, trl_best),
        "plain": (OURS, plain_best),
        "full": (lora_beside_full, replace(lora_beside_full, method="full")),
    }
    step_races = {"default": (OURS, TRL_DEFAULT), "best": (OURS, trl_best)}
    updates = {name: race(rivals, folder, threads, pairs, say) for name, rivals in update_races.items()}
    steps = {name: race([replace(r, work="step") for r in rivals], folder, threads, pairs, say) for name, rivals in step_races.items()}
    lora, full = works(rollout)
    return Measured(
        shape=describe(rollout),
        threads=threads,
        cosines=cosines,
        trials=[*trl_trials, *plain_trials],
        updates=updates,
        steps=steps,
        errors=race_errors(say),
        gemms=race_gemms(folder, threads, pairs, say),
        lora=lora,
        full=full,
    )


def measure_again(parts: Sequence[str], folder: Path, pairs: int, threads: int, say: Say) -> dict[str, Any]:
    """The numbers of the summary that these parts give."""
    torch.set_num_threads(threads)
    numbers: dict[str, Any] = {}
    if "gemms" in parts:
        say("recording the rollout")
        lora, _ = works(write_workload(folder))
        numbers |= gemm_numbers(lora, race_gemms(folder, threads, pairs, say))
    if "errors" in parts:
        numbers |= error_ratios(race_errors(say))
    return numbers


def race_gemms(folder: Path, threads: int, pairs: int, say: Say) -> dict[DType, list[Result]]:
    """(our update, its products alone) in turns."""
    return {dtype: race((replace(OURS, dtype=dtype), Contender("gemm", dtype)), folder, threads, pairs, say) for dtype in DTYPES}


def race_errors(say: Say) -> dict[DType, tuple[Errors, Errors]]:
    """(ours, TRL + PEFT's) against fp64."""
    return {dtype: measure_errors(dtype, say) for dtype in DTYPES}


def search(start: Contender, axes: Axes, folder: Path, threads: int, say: Say) -> list[Result]:
    """Every trial of a search along one setting after the other, the best of each kept: a fourth of the full grid's time."""
    trials = race([start], folder, threads, TRIAL_RUNS, say)
    for name, values in axes.items():
        best = fastest(trials)
        for value in values:
            trials += race([replace(best, **{name: value})], folder, threads, TRIAL_RUNS, say)
    return trials


def fastest(trials: Sequence[Result]) -> Contender:
    """By median."""
    return min(trials, key=lambda trial: trial.median).contender


if __name__ == "__main__":
    raise SystemExit(main())
