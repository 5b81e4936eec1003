"""Every op and its peers on a GPU: `python -m bench.gpu [--json] [--models NAME ...] [--dry-run]`.

    shapes     groups, heads, layers and adapters of bench.compile_gate.MODELS, 8,192 packed tokens (4 prompts × 8 completions), r 32, bf16
    entrants   every implementation of an op; torch eager and torch.compile; other libraries (bench/gpu_peers.py)
    gate       each against the formula one precision up, or exit 1: a wrong entrant has a row that says so, and no time
    time       triton.testing.do_bench, which empties the L2 cache before every run (it zeroes a buffer of 256 MB); median, p20, p80 of the
               runs of ROUNDS rounds in which the entrants take turns
    peak       measured in the same process: cuBLAS's products of the op's own shapes, an 8,192³ product, a copy of 1 GiB

    share of peak    FLOP/s over cuBLAS's for the op's products (share_of_large_gemm: over its best, the 8,192³), or GB/s over the copy's
    × baseline       the reference's median over this one's (peers: torch eager's)

A library that is not installed has a row that names it. Rows are appended to bench/results/CARD/gpu.jsonl. Without a GPU the command is
refused; `--dry-run` then builds the arguments of every real shape on the meta device, runs whatever a CPU can at tiny shapes through the
gate, and lists the rest with its reason.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils._pytree import tree_leaves

from bench.compile_gate import MODELS
from bench.gemm_peak import Group, Model, Shape
from bench.gpu_peers import peer_races
from bench.gpu_race import Entrant, Race, Run, check, on_a_gpu, on_meta
from bench.op_cases import Case, Update, cases
from bench.race import REPOSITORY
from bench.report import commit
from bench.rows import Row, append_rows, slug, timing
from bench.test_ops import GateError, fresh
from bench.test_ops import check as check_op
from fastlora.ops.registry import dispatchers, use_implementation

DTYPE = torch.bfloat16
RANK = 32
HEAD_DIM = 128
"""Of all three models."""
GROUPS = (Group(264, (224,) * 8),) * 4
"""4 (264 + 8 · 223) = 8,192 tokens; 7,168 predicting rows."""
TILE_ROWS = 1024
"""Of logits at once, where an implementation has logits: 311 MB in bf16 at 151,936 entries."""
ROUNDS, MILLISECONDS = 5, 40
"""Turns of every entrant, and how long do_bench repeats it in each."""
PEAK_WIDTH, COPY_BYTES = 8192, 1 << 30
LARGE = Counter([(PEAK_WIDTH,) * 3])
"""The product at which cuBLAS is at its best."""
COMPILED = ("rms_norm", "swiglu", "logprob_rows")
"""Ops whose reference torch.compile can fuse into a kernel of its own; products have races of their own (bench/gpu_peers.py)."""
TINY = Update(Model(2, 96, 40, 3, 1, 32, 136), (Group(7, (5, 5)), Group(3, (5, 5))), rank=16, tile_rows=6)
"""What a CPU computes in a dry run; widths that every implementation takes."""


def main(argv: list[str] | None = None) -> int:
    """See the module's docstring. Status 1 when an entrant is wrong, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the rows as one line of JSON, last")
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS), help="whose shapes (default: all)")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "bench" / "results", help="folder of the result rows")
    parser.add_argument("--dry-run", action="store_true", help="build every input without a GPU, run what a CPU can, list the rest")
    options = parser.parse_args(argv)
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 200)
    if options.dry_run:
        return dry_run(options.models, console, as_json=options.json)
    if not torch.cuda.is_available():
        print("bench.gpu times kernels on a GPU, and torch sees none here; --dry-run shows what would run", file=sys.stderr)
        return 2
    rows = measure(options.models, console)
    append_rows(rows, options.out / card_slug() / "gpu.jsonl")
    console.print(table(rows))
    if options.json:
        print(json.dumps(rows))
    wrong = [row for row in rows if (row["refused"] or "").startswith(WRONG)]
    for row in wrong:
        print(row["refused"], file=sys.stderr)
    return 1 if wrong else 0


WRONG = "wrong: "


def update_of(name: str) -> Update:
    """The sizes of one update of a model of bench.compile_gate.MODELS."""
    m = MODELS[name]
    heads = (m.query // HEAD_DIM, m.key // HEAD_DIM, HEAD_DIM)
    return Update(Model(m.layers, m.d, m.mlp, *heads, m.vocabulary), GROUPS, RANK, TILE_ROWS)


def races(update: Update) -> Iterator[Race]:
    """Every op at the sizes of an update, then the races against other libraries."""
    yield from chain(map(op_race, cases(update)), peer_races(update, DTYPE))


def op_race(case: Case) -> Race:
    """All implementations of one op, and torch.compile of its reference where that is one kernel; the gate is that of bench.test_ops."""
    dtype = DTYPE if DTYPE in case.dtypes else torch.float32
    cost = case.spec.cost(*on_meta(case, dtype))
    dispatch = dispatchers[case.spec.name]
    entrants = [
        Entrant(name, lambda name=name: _op_run(case, name, dtype), implementation.refuses)
        for name, implementation in dispatch.implementations.items()
    ]
    if case.spec.name.startswith(COMPILED) and case.spec.name != "logprob_rows_backward":  # which overwrites its argument
        compiled = torch.compile(dispatch.implementations["reference"].run, dynamic=False)
        entrants.append(Entrant("torch.compile", lambda: _compiled_run(case, compiled, dtype), on_a_gpu))
    return Race(case.spec.name, case.shape, dtype, cost.flops, cost.bytes, case.gemms, list, entrants, "reference")


@torch.no_grad()
def _op_run(case: Case, name: str, dtype: torch.dtype) -> tuple[Run, Callable[[Any], list[torch.Tensor]]]:
    """The dispatcher, forced; the gate is run here, on the arguments that are timed."""
    with use_implementation(name):
        arguments = case.arguments(dtype)
    check_op(case, name, dtype, arguments)

    def run() -> Any:
        with use_implementation(name):
            return dispatchers[case.spec.name](*arguments)

    return run, lambda _: []


@torch.no_grad()
def _compiled_run(case: Case, compiled: Callable[..., Any], dtype: torch.dtype) -> tuple[Run, Callable[[Any], list[torch.Tensor]]]:
    with use_implementation("reference"):
        arguments = case.arguments(dtype)
        expected = tree_leaves(dispatchers[case.spec.name](*fresh(arguments, torch.float32)))
    race = Race(case.spec.name, case.shape, dtype, 0, 0, Counter(), list, (), "")
    check(race, "torch.compile", [x for x in tree_leaves(compiled(*arguments)) if x.numel()], [x for x in expected if x.numel()])
    return lambda: compiled(*arguments), lambda _: []


@dataclass(slots=True)
class Heat:
    """What one entrant of a race came to."""

    entrant: Entrant
    refused: str | None = None
    """Why it has no time: not installed, refused, or wrong."""
    run: Run | None = None
    seconds: list[float] = field(default_factory=list)


def qualify(race: Race, device: torch.device) -> list[Heat]:
    """Builds every entrant on the device and holds it to the truth. (Timed outside of this: a default device costs every call of torch a
    microsecond of Python.)"""
    heats = []
    with torch.device(device):
        truth = race.truth()
        for entrant in race.entrants:
            heat = Heat(entrant, entrant.refuses(device))
            heats.append(heat)
            if heat.refused is None:
                try:
                    heat.run, canonical = entrant.prepare()
                    check(race, entrant.name, canonical(heat.run()), truth)
                except GateError as error:
                    heat.refused, heat.run = f"{WRONG}{error}", None
    return heats


def measure(models: Sequence[str], console: Console) -> list[Row]:
    """Qualifies and times all races of the models, then the peaks that their shares refer to."""
    device = torch.device("cuda")
    peaks, rows = Peaks(), []
    for name in models:
        for race in races(update_of(name)):
            console.print(f"{name}: {race.name}", highlight=False)
            heats = qualify(race, device)
            take_turns([heat for heat in heats if heat.run is not None], milliseconds)
            rows += race_rows(race, heats, name, peaks)
            del heats
            torch.cuda.empty_cache()
    return rows + peaks.rows()


def take_turns(heats: Sequence[Heat], clock: Callable[[Run], list[float]]) -> None:
    """A B C A B C: what drifts (clocks, temperature) drifts for all."""
    for _ in range(ROUNDS):
        for heat in heats:
            assert heat.run is not None
            heat.seconds += [1e-3 * ms for ms in clock(heat.run)]


def milliseconds(run: Run) -> list[float]:
    """Of each run; L2 is emptied before every one."""
    from triton.testing import do_bench

    return do_bench(run, warmup=MILLISECONDS // 4, rep=MILLISECONDS, return_mode="all")


class Peaks:
    """What this card does at best, each measured once."""

    def __init__(self, clock: Callable[[Run], list[float]] = milliseconds) -> None:
        self._clock = clock
        self._products: dict[tuple[Shape, torch.dtype], float] = {}
        self._copy: float | None = None

    def product(self, shape: Shape, dtype: torch.dtype) -> float:
        """Seconds of cuBLAS's [m, k] @ [k, n], the faster of two layouts of the right operand."""
        if (shape, dtype) not in self._products:
            m, k, n = shape
            x_mk, w_nk = torch.randn(m, k, dtype=dtype, device="cuda"), torch.randn(n, k, dtype=dtype, device="cuda")
            w_kn = w_nk.t().contiguous()
            layouts = (lambda: torch.mm(x_mk, w_nk.t()), lambda: torch.mm(x_mk, w_kn))
            self._products[shape, dtype] = min(timing([1e-3 * ms for ms in self._clock(run)])["median"] for run in layouts)
        return self._products[shape, dtype]

    def flop_per_s(self, gemms: Counter[Shape], dtype: torch.dtype) -> float:
        """Of a list of products at cuBLAS's rates."""
        flops = sum(2 * m * k * n * count for (m, k, n), count in gemms.items())
        return flops / sum(self.product(shape, dtype) * count for shape, count in gemms.items())

    @property
    def bytes_per_s(self) -> float:
        """Of a copy, reading and writing counted."""
        if self._copy is None:
            source = torch.ones(COPY_BYTES // 4, device="cuda")
            target = torch.empty_like(source)
            seconds = [1e-3 * ms for ms in self._clock(lambda: target.copy_(source))]
            self._copy = 2 * COPY_BYTES / timing(seconds)["median"]
        return self._copy

    def rows(self) -> list[Row]:
        """The large product and the copy, as rows of their own."""
        width = PEAK_WIDTH
        gemm, flops = self.product((width, width, width), DTYPE), 2 * width**3
        copy = 2 * COPY_BYTES / self.bytes_per_s
        return [
            {**_place("peak", "cuBLAS", DTYPE, f"{width}³", None), **timing([gemm], flops=flops), "share_of_peak": 1.0},
            {**_place("peak", "copy", torch.float32, "1 GiB", None), **timing([copy], nbytes=2 * COPY_BYTES), "share_of_peak": 1.0},
        ]


def _place(op: str, implementation: str, dtype: torch.dtype, shape: str, model: str | None) -> Row:
    """What a row is about, and where it was measured."""
    names = {"op": op, "implementation": implementation, "dtype": str(dtype).removeprefix("torch."), "shape": shape, "model": model}
    where = {"device": card_name(), "threads": None, "torch": torch.__version__, "commit": commit()}
    return {**names, **where, "refused": None, "x_baseline": None, "peak_bytes": None}


def race_rows(race: Race, heats: Sequence[Heat], model: str, peaks: Peaks) -> list[Row]:
    """A row for every entrant, those without a time included."""
    medians = {heat.entrant.name: timing(heat.seconds)["median"] for heat in heats if heat.seconds}
    rows = []
    for heat in heats:
        row = {**_place(race.op, heat.entrant.name, race.dtype, race.shape, model), "race": model, "refused": heat.refused}
        row |= {"bound": "gemm" if race.gemms else "memory", "share_of_peak": None, "share_of_large_gemm": None, "median": None}
        if heat.seconds:
            row |= timing(heat.seconds, flops=race.flops, nbytes=race.nbytes)
            if race.gemms:
                row["share_of_peak"] = 1e9 * row["gflop_per_s"] / peaks.flop_per_s(race.gemms, race.dtype)
                row["share_of_large_gemm"] = 1e9 * row["gflop_per_s"] / peaks.flop_per_s(LARGE, DTYPE)
            else:
                row["share_of_peak"] = 1e9 * row["gb_per_s"] / peaks.bytes_per_s
            if race.baseline in medians:
                row["x_baseline"] = medians[race.baseline] / row["median"]
        rows.append(row)
    return rows


def card_name() -> str:
    """As the driver gives it: `NVIDIA H100 80GB HBM3`."""
    return torch.cuda.get_device_name()


def card_slug() -> str:
    """The folder of this card's rows."""
    return slug(card_name())


def table(rows: Sequence[Row]) -> Table:
    """For the terminal."""
    shown = Table("model", "op", "shape", "entrant", "ms", "p20", "p80", "TFLOP/s", "GB/s", "share", "× baseline")
    for row in rows:
        names = (row["model"] or "", row["op"], row["shape"], row["implementation"])
        if row["median"] is None:
            shown.add_row(*names, row["refused"])
            continue
        times = [f"{1e3 * row[name]:.3f}" for name in ("median", "p20", "p80")]
        rates = [f"{row[name] / scale:.0f}" if row[name] else "" for name, scale in (("gflop_per_s", 1e3), ("gb_per_s", 1))]
        faster = "" if row["x_baseline"] is None else f"{row['x_baseline']:.2f}"
        shown.add_row(*names, *times, *rates, f"{row['share_of_peak']:.0%}", faster)
    return shown


def dry_run(models: Sequence[str], console: Console, *, as_json: bool) -> int:
    """Arguments of all real shapes on the meta device; the gate at tiny ones on this CPU; a line for every entrant."""
    shapes = [f"{name}: {race.name}" for name in models for race in races(update_of(name))]  # builds them all
    shown, wrong, ran = Table("op", "entrant", "in a dry run on this CPU"), [], 0
    for race in races(TINY):
        for heat in qualify(race, torch.device("cpu")):
            shown.add_row(race.op, heat.entrant.name, heat.refused or "runs, right")
            ran += heat.refused is None
            wrong += [heat.refused] * (heat.refused or "").startswith(WRONG)
    console.print(shown)
    console.print(f"{len(shapes)} races at the shapes of {', '.join(models)} were built on the meta device; not run on a GPU")
    if as_json:
        print(json.dumps({"races": shapes, "ran_on_the_cpu": ran, "wrong": wrong}))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
