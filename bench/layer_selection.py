"""What adapters on some layers save: `python -m bench.layer_selection [--json] [--pairs 7] [--layers 3,7,11] [--dry-run] [--out ...]`.

    all            rank 32 on all seven projections of all 30 layers of SmolLM2, bfloat16
    last half      the same adapter on layers 15 to 29: the backward pass ends at 15
    random half    15 layers, drawn with seed 0
    probe's half   the 15 layers with the highest score of fastlora.probe on the problems of the workload
    --layers       these besides

Updates (loss, backward, clip, optimizer step) of the trainer on random tokens: a GRPO batch of 4 prompts × 4 completions that share
them, an SFT batch of 16 rows. All sets take turns in one process, after a warm-up of each; a ratio is the median over rounds of this
set's time over that of `all` in the same round. Predicted is the ratio of the FLOPs of bench/gemm_peak.py.

Targets: the last half takes at least 20 % less time than all, and every ratio is within 10 % of the prediction; status 1 when one is
missed. A table on stdout, progress on stderr; rows are appended to OUT/DEVICE/layer_selection.jsonl. --dry-run: completions of 8 tokens,
three rounds, nothing is written or judged.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench.command_line import parser, positive
from bench.contender import Contender
from bench.gemm_peak import lora_work
from bench.op_cases import packaged_model
from bench.ops import table_console
from bench.record import write_problems
from bench.report import commit, device_name, device_slug
from bench.rows import Row, append_rows, timing
from bench.scaling_point import Point, point_config, random_batch
from bench.workload import LAYERS, PROBLEMS, SEED
from fastlora.build import build
from fastlora.config import RunConfig
from fastlora.ops.registry import use_implementation
from fastlora.probe import probe
from fastlora.run_folder import RunFolder
from fastlora.trainer import Trainer
from fastlora.turns import LEAST_ROUNDS, Say, take_turns
from fastlora.update_time import update

BatchKind = Literal["grpo", "sft"]
POINTS: Mapping[BatchKind, Point] = {"grpo": Point(), "sft": Point(num_prompts=16, num_generations=1)}
OURS = Contender("fastlora", "bfloat16")
DRY_TOKENS = 8
LEAST_SAVED, NEAR_PREDICTION = 0.20, 0.10
PROBED_AT_ONCE = 10

Sets = Mapping[str, Sequence[int]]


def main(argv: list[str] | None = None) -> int:
    """See the module's docstring."""
    options = parse(argv)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="fastlora-layers-") as scratch:
        rows = measure(Path(scratch), options, lambda message: print(message, file=sys.stderr, flush=True))
    table_console().print(layers_table(rows))
    if options.json:
        print(json.dumps(rows))
    if options.dry_run:
        return 0
    append_rows(rows, options.out / device_slug() / "layer_selection.jsonl")
    return 1 if any(missed(row) for row in rows) else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    command = parser("bench.layer_selection", __doc__)
    command.add_argument("--pairs", type=positive, default=7, metavar="N", help=f"rounds, {LEAST_ROUNDS} at least (default 7)")
    command.add_argument("--layers", type=_layers, metavar="L,L,...", help="one more set of layers")
    command.add_argument("--dry-run", action="store_true", help="completions of 8 tokens, three rounds, nothing written or judged")
    options = command.parse_args(argv)
    if options.pairs < LEAST_ROUNDS:  # before anything is probed
        command.error(f"--pairs {options.pairs}: {LEAST_ROUNDS} at least")
    return options


def _layers(text: str) -> tuple[int, ...]:
    layers = tuple(sorted({int(part) for part in text.split(",")}))
    if not layers or layers[0] < 0 or layers[-1] >= LAYERS:
        raise argparse.ArgumentTypeError(f"{text}: layers go from 0 to {LAYERS - 1}")
    return layers


def measure(folder: Path, options: argparse.Namespace, say: Say) -> list[Row]:
    """Both batches."""
    write_problems(folder, PROBLEMS)
    points = dict(POINTS)
    if options.dry_run:
        points = {kind: replace(point, completion_tokens=DRY_TOKENS) for kind, point in points.items()}
    sets = layer_sets(folder, points["sft"], options.layers, say)
    return [row for kind, point in points.items() for row in race_sets(folder, kind, point, sets, options, say)]


def layer_sets(folder: Path, point: Point, own: Sequence[int] | None, say: Say) -> Sets:
    """Name -> layers, ascending."""
    half = LAYERS // 2
    scores = probe(point_config(folder, OURS, point), layers_at_once=PROBED_AT_ONCE, say=say).layers
    sets = {
        "all": range(LAYERS),
        "last half": range(LAYERS - half, LAYERS),
        "random half": sorted(random.Random(SEED).sample(range(LAYERS), half)),
        "probe's half": sorted(sorted(scores, key=lambda layer: -scores[layer])[:half]),
    }
    return sets if own is None else {**sets, "--layers": own}


def race_sets(folder: Path, kind: BatchKind, point: Point, sets: Sets, options: argparse.Namespace, say: Say) -> Iterator[Row]:
    """A row for every set, on one batch."""
    with ExitStack() as stack, use_implementation("cpp"):
        updates = {}
        for name, layers in sets.items():
            say(f"{kind}, {name}: load")
            updates[name] = ready_update(layers_config(folder, kind, point, layers), point, folder, stack)
        rounds = LEAST_ROUNDS if options.dry_run else options.pairs
        seconds = take_turns(updates, rounds, lambda message: say(f"{kind}: {message}")).seconds
    work = {name: lora_work(packaged_model(), point.groups, point.rank, layers).flops for name, layers in sets.items()}
    for name, layers in sets.items():
        yield {
            "op": f"layer_selection.{kind}",
            "implementation": name,
            "dtype": OURS.dtype,
            "shape": str(point),
            "device": device_name(),
            "threads": options.threads,
            "layers": list(layers),
            **timing(seconds[name], flops=work[name]),
            "gflop": work[name] / 1e9,
            "ratio": float(np.median(np.divide(seconds[name], seconds["all"]))),
            "predicted_ratio": work[name] / work["all"],
            "commit": commit(),
        }


def layers_config(folder: Path, kind: BatchKind, point: Point, layers: Sequence[int]) -> RunConfig:
    """The point's run with rank 0 outside `layers`."""
    config = point_config(folder, OURS, point)
    others = "|".join(str(layer) for layer in range(LAYERS) if layer not in layers)
    settings: dict[str, Any] = config.model_dump() | {"objective": kind}
    settings["lora"] |= {"rank_pattern": {rf"layers\.({others})\..*": 0} if others else {}}
    return RunConfig.model_validate(settings)


def ready_update(config: RunConfig, point: Point, folder: Path, stack: ExitStack) -> Callable[[], None]:
    """One update of a run that is built here, on random tokens."""
    parts = build(config, Console(quiet=True))
    stack.enter_context(parts.rewards)
    trainer = Trainer(config, parts, RunFolder(folder))
    batch = random_batch(point, parts.model.module.config.vocab_size)
    return partial(update, trainer, batch)


def missed(row: Row) -> bool:
    """Of the targets in the module's docstring."""
    saves_too_little = row["implementation"] == "last half" and row["ratio"] > 1 - LEAST_SAVED
    return saves_too_little or abs(row["ratio"] / row["predicted_ratio"] - 1) > NEAR_PREDICTION


def layers_table(rows: Sequence[Row]) -> Table:
    """For the terminal."""
    table = Table(title=f"updates with adapters on some layers, {rows[0]['device']}, {rows[0]['threads']} threads")
    for heading in ("batch", "layers", "lowest", "GFLOP", "median s", "of all", "predicted", "off by", "targets"):
        table.add_column(heading, justify="left" if heading in ("batch", "layers", "targets") else "right")
    for row in rows:
        table.add_row(
            row["op"].rpartition(".")[2],
            f"{row['implementation']} ({len(row['layers'])})",
            str(min(row["layers"])),
            f"{row['gflop']:.0f}",
            f"{row['median']:.3f}",
            f"{row['ratio']:.3f}",
            f"{row['predicted_ratio']:.3f}",
            f"{row['ratio'] / row['predicted_ratio'] - 1:+.1%}",
            "MISSED" if missed(row) else "met",
        )
    return table


if __name__ == "__main__":
    raise SystemExit(main())
