"""Rollouts by vLLM against Hugging Face's, one command: `python -m bench.rollout [--json] [--pairs 5] [--swaps 500] [--out bench/results]`.

    rollouts    all completions, adapter on: vLLM (swap and canary included), our torch sampler, TRL's `generate`, in turns; fp32 and bf16
    steps       whole GRPO steps of the same three; what swap and canary take of vLLM's
    merged      whole steps again, vLLM with the adapter merged into its weights, against TRL; fp32 and bf16
    defaults    and vLLM as fastlora starts it where nothing is set, in bf16, against TRL's own defaults: fp32, micro-batch 16
    swaps       versions in a row, one token from each: seconds, and whether memory, tmpfs or latency grow; fp32
    logprobs    of every sampled token, vLLM's against the trainer's, fp32, T .7, at top-p 1 and .9
    compiled    (not unless asked for) vLLM as it runs here against vLLM's torch.compile

16 completions of exactly 128 tokens for 4 prompts, ranks from 4 to 32 on all modules. Rollouts, swaps and steps of vLLM each have a policy
of a new version, whose prefixes are not cached. Needs vLLM. Every part is written as soon as it is measured; `--only swaps logprobs`
measures these alone and puts them into the newest summary of this device. --check writes nothing and exits 1 when a target is missed; the
soak is `--only swaps --check`. --dry-run measures 8 tokens, once, and writes nothing.

Tables on stdout, progress on stderr; with --json the last line of stdout is one JSON object. Rows are written to OUT/DEVICE/rollout.jsonl,
the JSON object to rollout_summary.jsonl beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.command_line import parser, positive
from bench.contender import Contender
from bench.race import Result, Worker, WorkerError, race
from bench.record import describe, write_workload
from bench.rollout_report import Measured, missed, print_tables, summary, write_measured
from bench.workload import COMPLETION_TOKENS, SAMPLES, Settings, uneven_ranks
from fastlora.lora.peft_format import load_adapter

Say = Callable[[str], None]


class TokensError(RuntimeError):
    """A contender does not do the work that it is timed for."""


VLLM = Contender("fastlora-vllm", "float32", work="rollout")
TORCH = Contender("fastlora", "float32", work="rollout")
TRL = Contender("trl", "float32", work="rollout")
RIVALS = {
    "float32": (VLLM, TORCH, replace(TRL, micro_batch=4)),
    "bfloat16": tuple(replace(rival, dtype="bfloat16") for rival in (VLLM, TORCH, replace(TRL, micro_batch=2))),
}
"""TRL's fastest micro-batch on this workload (docs/bench), which only the step depends on. Its default, 16, takes 15 GiB in fp32, and with
two trainers and an engine beside it 24 GiB are not enough."""

MERGED = {dtype: (replace(rivals[0], weights="merged"), rivals[-1]) for dtype, rivals in RIVALS.items()}
DEFAULTS = (RIVALS["bfloat16"][0], TRL)

PARTS = ("rollouts", "steps", "merged", "defaults", "swaps", "logprobs", "compiled")
USUAL = PARTS[:-1]
DRY_TOKENS, DRY_SWAPS = 8, 5


def main(argv: list[str] | None = None) -> int:
    """See the module's docstring."""
    options = parse(argv)
    parts = options.only or list(USUAL)
    say: Say = lambda message: print(message, file=sys.stderr, flush=True)  # noqa: E731
    found: dict[str, Any] = {}
    for part in parts:  # each is written as soon as it is measured: a contender that dies takes its own part with it
        with tempfile.TemporaryDirectory(prefix="fastlora-rollout-") as scratch:
            try:
                measured = measure(part, Path(scratch), options, say)
            except (WorkerError, TokensError) as error:
                say(str(error))
                return 1
        print_tables(measured, Console(width=180))
        found |= summary(measured)
        if options.writes:
            write_measured(measured, part, options.out, anew=part == parts[0] and not options.only)
    if options.json:
        print(json.dumps(found))
    if options.check and (what := missed(found)):
        say(f"missed: {'; '.join(what)}")
        return 1
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    command = parser("bench.rollout", __doc__)
    command.add_argument("--pairs", type=positive, default=5, metavar="N", help="timed runs of each contender, in turns (default 5)")
    command.add_argument("--swaps", type=positive, default=500, metavar="N", help="versions swapped in in a row (default 500)")
    command.add_argument("--dtypes", nargs="+", choices=list(RIVALS), default=list(RIVALS), help="(default both)")
    command.add_argument("--only", nargs="+", choices=PARTS, default=[], metavar="PART", help=f"of {', '.join(PARTS)}")
    command.add_argument("--check", action="store_true", help="write nothing, exit 1 when a target is missed")
    command.add_argument("--dry-run", action="store_true", help="one pair of 8 tokens, five swaps, nothing written")
    options = command.parse_args(argv)
    if options.dry_run:
        options.pairs, options.swaps = 1, DRY_SWAPS
    options.writes = not (options.dry_run or options.check)
    return options


def measure(part: str, folder: Path, options: argparse.Namespace, say: Say) -> Measured:
    """One part. Raises WorkerError, TokensError."""
    torch.set_num_threads(options.threads)
    say("recording the workload")
    settings = Settings(uneven_ranks(), DRY_TOKENS if options.dry_run else COMPLETION_TOKENS)
    rollout = write_workload(folder, settings)
    expected = SAMPLES * settings.completion_tokens

    def turns(rivals: Sequence[Contender]) -> list[Result]:
        results = race(rivals, folder, options.threads, options.pairs, say)
        check_tokens(results, expected)
        return results

    def alone(contender: Contender, runs: int) -> Result:
        result = measure_alone(contender, folder, options.threads, runs, say)
        check_tokens([result], expected)
        return result

    def steps(rivals: Sequence[Contender]) -> list[Result]:
        return turns([replace(rival, work="step") for rival in rivals])

    return Measured(
        shape=describe(rollout, f"r {min(settings.rank_pattern.values())} to {max(settings.rank_pattern.values())}"),
        threads=options.threads,
        adapter_bytes=adapter_bytes(folder),
        rollouts={dtype: turns(RIVALS[dtype]) for dtype in options.dtypes} if part == "rollouts" else {},
        steps={dtype: steps(RIVALS[dtype]) for dtype in options.dtypes} if part == "steps" else {},
        merged={dtype: steps(MERGED[dtype]) for dtype in options.dtypes} if part == "merged" else {},
        defaults=steps(DEFAULTS) if part == "defaults" else (),
        swaps=alone(replace(VLLM, work="swap"), options.swaps) if part == "swaps" else None,
        logprobs=alone(replace(VLLM, work="logprob"), 1) if part == "logprobs" else None,
        compiled=turns([VLLM, replace(VLLM, compiled=True)]) if part == "compiled" else (),
    )


def check_tokens(results: Sequence[Result], expected: int) -> None:
    """Raises TokensError for a contender that has sampled more or fewer than the others (those that count)."""
    for result in results:
        if odd := [tokens for tokens in result.metrics.get("tokens", []) if tokens != expected]:
            raise TokensError(f"{result.contender.name} sampled {odd[0]:.0f} tokens in a run instead of {expected}: not the others' work")


def measure_alone(contender: Contender, folder: Path, threads: int, runs: int, say: Say) -> Result:
    """One contender's runs in a row, the first among them."""
    result = Result(contender)
    say(f"{contender.name}: load")
    with Worker(contender, folder, threads) as worker:
        worker.wait_until_ready()
        for number in range(runs):
            if number % 100 == 0:
                say(f"{contender.name}: run {number + 1} of {runs}")
            result.add(worker.run())
    return result


def adapter_bytes(folder: Path) -> int:
    """Of the workload's adapter in float32."""
    saved = load_adapter(folder / "adapter")
    return 4 * sum(matrix.numel() for matrices in (saved.a_rd, saved.b_nr) for matrix in matrices.values())


if __name__ == "__main__":
    raise SystemExit(main())
