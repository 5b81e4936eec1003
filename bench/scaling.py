"""How the update grows, and where its time goes: `python -m bench.scaling [--json] [--runs 3] [--threads N] [--out bench/results]`.

    group size    16 completions as 4 × 4, 2 × 8, 1 × 16: the larger the group, the fewer prompts are computed
    rank          8 to 256
    length        completions of 32 to 512 tokens
    vocabulary    the head alone, 512 rows of width 576: one pass (token-level losses) and two (linear_logprob)
    entries       the optimizer alone: trainable entries of B, 0.1 % to 100 %, A frozen
    time split    shares of one update by kind of op, before (plain PEFT loop) and after

The first three are whole updates of SmolLM2 in bf16, a fresh process for each shape: one warm-up, then medians, and the peak of
the process. Beside each time stands the predicted work: useful FLOPs (bench/gemm_peak.py), or the bytes of the ops' own cost().
A table on stdout, progress on stderr; rows are appended to OUT/DEVICE/scaling.jsonl; bench/figures.py draws them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from bench.command_line import parser, positive
from bench.contender import Contender
from bench.gemm_peak import Model, lora_work
from bench.op_cases import adapter_segments, packaged_model
from bench.ops import table_console
from bench.race import WorkerError, race
from bench.record import write_problems, write_workload
from bench.report import commit, device_name, device_slug
from bench.rows import Row, append_rows, timing
from bench.scaling_point import Point, random_batch
from bench.time_split import measure_split
from bench.workload import PROBLEMS, RANK
from fastlora.config import OptimConfig
from fastlora.flat import FlatParameters
from fastlora.losses.one_pass import TILE_ELEMENTS, one_pass_loss
from fastlora.ops.adamw_step import norm_cost, segment_table, step_cost
from fastlora.ops.linear_logprob import linear_logprob
from fastlora.ops.registry import use_implementation
from fastlora.optim import AdamW
from fastlora.packing import pack

POINT_WORKER = (sys.executable, "-m", "bench.scaling_point")
OURS = Contender("fastlora", "bfloat16")
BEFORE = Contender("plain", "bfloat16", 4)
"""The fastest plain loop on PEFT's layers (LOG.md)."""

BASE = Point()
POINTS: Mapping[str, Mapping[int, Point]] = {
    "group size": {g: replace(BASE, num_prompts=16 // g, num_generations=g) for g in (4, 8, 16)},
    "rank": {r: replace(BASE, rank=r) for r in (8, 32, 64, 128, 256)},
    "completion tokens": {t: replace(BASE, completion_tokens=t) for t in (32, 64, 128, 256, 512)},
}
"""Axis -> value -> shape of the update. BASE stands on all three and is measured once."""
VOCABULARIES = tuple(1024 * k for k in (8, 16, 32, 64, 128, 256))
HEAD_ROWS = Point(num_prompts=1, num_generations=4, prompt_tokens=16, completion_tokens=128)
"""512 predicting rows."""
SHARES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Of B's entries that train."""
REPEATS = 7
"""Of the measurements that need no process of their own."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Machine:
    """What every row says of where it comes from."""

    device: str
    threads: int
    commit: str | None

    def row(self, axis: str, value: float, implementation: str, dtype: str, shape: str, **fields: Any) -> Row:
        """`axis` becomes the op: scaling.group_size."""
        named = {"op": f"scaling.{axis.replace(' ', '_')}", "axis": axis, "value": value, "implementation": implementation}
        return {**named, "dtype": dtype, "shape": shape, "device": self.device, "threads": self.threads, **fields, "commit": self.commit}


def main(argv: list[str] | None = None) -> int:
    """See the module's docstring."""
    options = parse(argv)
    torch.set_num_threads(options.threads)
    machine = Machine(device_name(), options.threads, commit())
    with tempfile.TemporaryDirectory(prefix="fastlora-scaling-") as scratch:
        try:
            rows = measure(
                Path(scratch), packaged_model(), machine, options.runs, lambda message: print(message, file=sys.stderr, flush=True)
            )
        except WorkerError as error:
            print(error, file=sys.stderr)
            return 1
    append_rows(rows, options.out / device_slug() / "scaling.jsonl")
    console = table_console()
    console.print(scaling_table(rows))
    console.print(split_table(rows))
    if options.json:
        print(json.dumps(rows))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    command = parser("bench.scaling", __doc__)
    command.add_argument("--runs", type=positive, default=3, metavar="N", help="timed updates of each shape (default 3)")
    return command.parse_args(argv)


def measure(folder: Path, model: Model, machine: Machine, runs: int, say: Say) -> list[Row]:
    """Everything. Raises WorkerError."""
    rows = list(update_rows(folder, model, machine, runs, say))
    with use_implementation("cpp"):
        rows += vocabulary_rows(model.hidden_size, VOCABULARIES, machine, say)
        rows += entries_rows(model, RANK, SHARES, machine, say)
    say("time split: recording the rollout")
    write_workload(folder / "recorded")
    return [*rows, *split_rows(folder / "recorded", machine, say)]


def update_rows(folder: Path, model: Model, machine: Machine, runs: int, say: Say) -> Iterator[Row]:
    """Whole updates, each shape in a process of its own."""
    write_problems(folder, PROBLEMS)  # a run has a data set; the batch does not come from it
    measured: dict[Point, Row] = {}
    for axis, points in POINTS.items():
        for value, point in points.items():
            if point not in measured:
                point.write(folder)
                (result,) = race([OURS], folder, machine.threads, runs, lambda message, p=point: say(f"{p}: {message}"), POINT_WORKER)
                flops = lora_work(model, point.groups, point.rank).flops
                measured[point] = {**timing(result.seconds, flops=flops), "gflop": flops / 1e9, "peak_bytes": result.peak_bytes}
            yield machine.row(axis, value, OURS.name, OURS.dtype, str(point), **measured[point])


def vocabulary_rows(width: int, vocabularies: Sequence[int], machine: Machine, say: Say) -> Iterator[Row]:
    """Log-probabilities, a loss and dHidden of the same rows under heads of several sizes."""
    packed = pack(random_batch(HEAD_ROWS, min(vocabularies)))
    rows, generator = len(packed.targets_c), torch.Generator().manual_seed(0)
    hidden_cd = torch.randn(rows, width, generator=generator).bfloat16().requires_grad_()
    for v in vocabularies:
        say(f"vocabulary {v:,}")
        weight_vd = (torch.randn(v, width, generator=generator) / width**0.5).bfloat16()

        def one_pass(weight_vd: Tensor = weight_vd) -> None:
            one_pass_loss(hidden_cd, weight_vd, None, packed, 1.0, lambda logp_nt, entropy_nt: (-logp_nt.sum(), {}))[0].backward()

        def two_passes(weight_vd: Tensor = weight_vd, v: int = v) -> None:
            tile = {"token_chunk": max(1, TILE_ELEMENTS // v), "vocab_chunk": v}
            (-linear_logprob(hidden_cd, weight_vd, packed.targets_c, **tile)[0].sum()).backward()

        for name, work, products in (("one pass", one_pass, 2), ("two passes", two_passes, 3)):
            flops = products * 2 * rows * width * v
            measured = {**timing(seconds_of(work), flops=flops), "gflop": flops / 1e9, "peak_bytes": None}
            yield machine.row("vocabulary", v, name, "bfloat16", f"[{rows}, {width}] · [{v}, {width}]ᵀ", **measured)


def entries_rows(model: Model, rank: int, shares: Sequence[float], machine: Machine, say: Say) -> Iterator[Row]:
    """Optimizer steps on the B of an adapter, of which a random share of the entries trains; A is frozen."""
    segments = [segment for segment in adapter_segments(model, rank) if segment.transposed]
    size = segments[-1].offset + segments[-1].numel
    generator = torch.Generator().manual_seed(0)
    for share in shares:
        flat = FlatParameters.zeros(size, segments, torch.device("cpu"))
        flat.grad.normal_(generator=generator)
        flat.mask = torch.rand(size, generator=generator) < share
        optimizer = AdamW(flat, OptimConfig())
        say(f"{flat.num_trainable:,} trainable entries")
        table, index = segment_table(segments, optimizer.index_k), optimizer.index_k
        nbytes = norm_cost(flat.grad, table, index).bytes + step_cost(flat.data, flat.grad, *[flat.grad] * 3, table, index).bytes
        state = sum(value.nbytes for value in optimizer.state_dict().values() if isinstance(value, Tensor))
        measured = timing(seconds_of(lambda optimizer=optimizer: optimizer.step(1e-6)), nbytes=nbytes)
        shape = f"{flat.num_trainable:,} of {sum(segment.numel for segment in segments):,} entries of B"
        fields = {"gb": nbytes / 1e9, "state_bytes": state, "peak_bytes": None}
        yield machine.row("trainable entries", flat.num_trainable, "AdamW", "float32", shape, **measured, **fields)


def seconds_of(work: Callable[[], Any]) -> list[float]:
    """Of REPEATS runs after one warm-up."""
    work()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return seconds


def split_rows(folder: Path, machine: Machine, say: Say) -> Iterator[Row]:
    """One profiled update each, before and after."""
    for contender in (BEFORE, OURS):
        say(f"time split: {contender.name}")
        split = measure_split(contender, folder, machine.threads)
        measured = {**timing([sum(split.values())]), "peak_bytes": None, "seconds": split}
        yield machine.row("time split", 0, contender.name, contender.dtype, str(BASE), **measured)


def scaling_table(rows: Sequence[Row]) -> Table:
    """For the terminal; growth is against the first row of an axis."""
    table = Table(title=f"scaling on {rows[0]['device']}, {rows[0]['threads']} threads", caption="growth: against the axis's first line")
    for heading in ("axis", "implementation", "value", "work", "growth", "median s", "growth", "peak GiB", "state MB"):
        table.add_column(heading, justify="left" if heading in ("axis", "implementation") else "right")
    first: dict[tuple[str, str], Row] = {}
    for row in (row for row in rows if row["axis"] != "time split"):
        start = first.setdefault((row["axis"], row["implementation"]), row)
        unit = "gflop" if "gflop" in row else "gb"
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f}"
        state = f"{row['state_bytes'] / 1e6:.2f}" if "state_bytes" in row else ""
        growth = (f"{row[unit] / start[unit]:.2f}", f"{row['median']:.4g}", f"{row['median'] / start['median']:.2f}")
        work = f"{row[unit]:.4g} {'GFLOP' if unit == 'gflop' else 'GB'}"
        table.add_row(row["axis"], row["implementation"], f"{row['value']:,}", work, *growth, peak, state)
    return table


def split_table(rows: Sequence[Row]) -> Table:
    """Seconds and shares of each class of ops."""
    table = Table(title="time of one update, profiled")
    table.add_column("contender")
    splits = [row for row in rows if row["axis"] == "time split"]
    for label in (*splits[0]["seconds"], "update"):
        table.add_column(label, justify="right")
    for row in splits:
        cells = [f"{seconds:.2f} s ({seconds / row['median']:.0%})" for seconds in row["seconds"].values()]
        table.add_row(row["implementation"], *cells, f"{row['median']:.2f} s")
    return table


if __name__ == "__main__":
    raise SystemExit(main())
