"""Proposes rows for kernels/fastlora_triton/tiles.py: `python -m bench.tune [--capability 90] [--dtype bf16] [--model NAME] [--dry-run]`.

Never runs in training: a tuner in a run would make its numbers depend on the weather. It prints a row; a person commits it.

    candidates   the committed row with some of its fields replaced, one subject after another: products (t, n, k, warps, stages), ranks
                 (shrink_t, r), logits (v); whatever arithmetic rules out (sums of a thread, bytes of a CTA) is not compiled
    compiled     by Triton for the architecture, GPU or not; held to the compile gate's limits (no spills, shared memory, wgmma, a CTA fits)
    timed        on a GPU: a group's and the head's forward and backward at 8,192 tokens (bench.gpu), each behind its gate, in turns

`--dry-run` compiles and lists the candidates of an architecture without a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton.errors import TritonError

from bench.compile_gate import DTYPES, MODELS, RANKS, Variant, hardware_faults, run_head, run_lora, tf32_allowed
from bench.cubin import CHIPS, read
from bench.gpu import ROUNDS, milliseconds, qualify, races, update_of
from bench.gpu_race import Race
from bench.rows import timing
from fastlora_triton import tiles as committed
from fastlora_triton.front_end import compile_for
from fastlora_triton.launch import use_launcher
from fastlora_triton.tiles import Tiles

MAX_SUMS = 128
"""Accumulators of a thread: half of its 255 registers, the rest holds addresses and operands."""
MIN_SUMS = 32
"""Fewer leave a tensor core waiting for its operands."""
MIN_ROW_BYTES = 128
"""Of a tile along k: one row of the 128-byte swizzle; narrower ones take twice the instructions for as many bytes."""


@dataclass(frozen=True, slots=True)
class Subject:
    """Fields of a row that are tried together, and what they are judged by."""

    name: str
    values: dict[str, tuple[int, ...]]
    races: tuple[str, ...]
    """Ops of bench.gpu's races that are timed."""


SUBJECTS = (
    Subject(
        "products",
        {"t": (64, 128, 256), "n": (64, 128, 256), "k": (32, 64, 128), "warps": (4, 8), "stages": (3, 4)},
        ("lora_group_step",),
    ),
    Subject("ranks", {"shrink_t": (64, 128), "r": (32, 64, 128)}, ("lora_group_step",)),
    Subject("logits", {"v": (64, 128, 256)}, ("head_logprob_step",)),
)


def main(argv: list[str] | None = None) -> int:
    """See the module's docstring. Status 2 when a GPU is needed and there is none."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--capability", type=int, default=90, choices=sorted(CHIPS), help="of a dry run, × 10 (default: 90)")
    parser.add_argument("--dtype", default="bf16", choices=sorted(DTYPES), help="of the operands (default: bf16)")
    parser.add_argument("--model", default="Qwen2.5-1.5B", choices=sorted(MODELS), help="whose shapes are timed (default: Qwen2.5-1.5B)")
    parser.add_argument(
        "--subjects", nargs="+", choices=[s.name for s in SUBJECTS], default=[s.name for s in SUBJECTS], help="(default: all)"
    )
    parser.add_argument("--dry-run", action="store_true", help="compile and list the candidates, time nothing")
    options = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 200)
    chosen = [subject for subject in SUBJECTS if subject.name in options.subjects]
    if options.dry_run:
        row = row_of(options.dtype, options.capability)
        for subject in chosen:
            console.print(candidates_table(subject, compiled_candidates(subject, row, options), options))
        return 0
    if not torch.cuda.is_available():
        print("bench.tune times kernels on a GPU, and torch sees none here; --dry-run lists the candidates", file=sys.stderr)
        return 2
    major, minor = torch.cuda.get_device_capability()
    options.capability = 10 * major + minor
    tune(chosen, options, console)
    return 0


def row_of(dtype: str, capability: int) -> Tiles:
    """The committed row of an architecture and operand type."""
    return committed.TABLE[capability]["tf32" if dtype == "tf32" else "half"]


def candidates(subject: Subject, row: Tiles, itemsize: int, capability: int) -> Iterator[Tiles]:
    """The row itself, then what arithmetic does not rule out."""
    yield row
    for values in product(*subject.values.values()):
        candidate = replace(row, **dict(zip(subject.values, values, strict=True)))
        sums = candidate.t * (candidate.v if "v" in subject.values else candidate.n) / (32 * candidate.warps)
        operands = candidate.stages * (candidate.t + candidate.n) * candidate.k * itemsize
        fits = MIN_SUMS <= sums <= MAX_SUMS and operands <= CHIPS[capability].shared_of_a_cta and candidate.k * itemsize >= MIN_ROW_BYTES
        if candidate != row and (fits or "n" not in subject.values):
            yield candidate


@contextmanager
def use_tiles(candidate: Tiles) -> Iterator[None]:
    """Inside, every row of the table is this one."""
    before = {capability: dict(rows) for capability, rows in committed.TABLE.items()}
    for rows in committed.TABLE.values():
        rows.update(dict.fromkeys(rows, candidate))
    try:
        yield
    finally:
        committed.TABLE.update(before)


@dataclass(frozen=True, slots=True)
class Compiled:
    """A candidate and what its machine code is."""

    tiles: Tiles
    variants: Sequence[Variant]
    faults: Sequence[str]
    """Limits that it breaks; the compiler's own refusal among them."""


def compiled_candidates(subject: Subject, row: Tiles, options: argparse.Namespace) -> list[Compiled]:
    """All candidates of a subject, compiled for the architecture."""
    dtype = DTYPES[options.dtype]
    tried = list(candidates(subject, row, dtype.itemsize, options.capability))
    where = f"{subject.name} for sm_{options.capability}"
    return [compile_candidate(c, subject, dtype, options) for c in track(tried, where, console=Console(stderr=True))]


def compile_candidate(tiles: Tiles, subject: Subject, dtype: torch.dtype, options: argparse.Namespace) -> Compiled:
    """The kernels of one model's group or head with these tiles."""
    model, variants = MODELS[options.model], {}

    def compiled(kernel: Any, grid: Sequence[int], *args: Any, **constants: Any) -> None:
        built = compile_for(options.capability, kernel, grid, *args, **constants)
        variants[built.hash] = Variant(built.metadata.name, options.dtype, subject.name, read(built))

    d, outs = model.groups()["gate_up"]
    run: Callable[[], None] = (
        (lambda: run_head(model, dtype)) if "v" in subject.values else (lambda: run_lora(d, outs, RANKS[0][: len(outs)], dtype))
    )
    try:
        with use_tiles(tiles), use_launcher(compiled, options.capability), tf32_allowed():
            run()
    except (TritonError, RuntimeError, ValueError) as error:  # of a pass that failed; of a block whose sides are no powers of two
        return Compiled(tiles, list(variants.values()), [f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"])
    return Compiled(tiles, list(variants.values()), [fault for v in variants.values() for fault in hardware_faults(v, options.capability)])


def candidates_table(subject: Subject, found: Sequence[Compiled], options: argparse.Namespace) -> Table:
    """For the terminal: resources of the kernel that takes most registers."""
    good = sum(not c.faults for c in found)
    title = (
        f"{subject.name}: {good} of {len(found)} candidates keep the limits of sm_{options.capability}, {options.dtype}; not run on a GPU"
    )
    shown = Table(*subject.values, "registers", "shared", "CTAs/SM", "", title=title, title_justify="left")
    for c in found:
        values = [str(getattr(c.tiles, name)) for name in subject.values]
        machines = [v.machine for v in c.variants]
        resources = ["", "", ""]
        if machines:
            ctas = min(m.ctas_on_an_sm(options.capability) for m in machines)
            resources = [str(max(m.registers for m in machines)), str(max(m.shared_bytes for m in machines)), str(ctas)]
        shown.add_row(*values, *resources, c.faults[0] if c.faults else "")
    return shown


def tune(chosen: Sequence[Subject], options: argparse.Namespace, console: Console) -> None:
    """One subject after another, each from the best of the one before; prints every candidate's time and, last, the row."""
    row = row_of(options.dtype, options.capability)
    all_races = list(races(update_of(options.model)))
    for subject in chosen:
        timed = [race for race in all_races if race.op in subject.races]
        good = [c.tiles for c in compiled_candidates(subject, row, options) if not c.faults]
        seconds = time_candidates(good, timed)
        order = sorted(seconds, key=seconds.__getitem__)
        shown = Table(*subject.values, "ms", "× committed", title=f"{subject.name} on {torch.cuda.get_device_name()}", title_justify="left")
        for tiles in order:
            values = [str(getattr(tiles, name)) for name in subject.values]
            shown.add_row(*values, f"{1e3 * seconds[tiles]:.3f}", f"{seconds[good[0]] / seconds[tiles]:.3f}")
        console.print(shown)
        row = order[0]
    console.print(source(row), highlight=False)


def time_candidates(tried: Sequence[Tiles], timed: Sequence[Race]) -> dict[Tiles, float]:
    """Seconds of all races with each, medians of ROUNDS turns. A candidate that computes something wrong is left out."""
    totals = dict.fromkeys(tried, 0.0)
    for race in timed:
        runs = {}
        for tiles in list(totals):
            with use_tiles(tiles):
                (heat,) = (h for h in qualify(triton_only(race), torch.device("cuda")) if h.entrant.name == "fastlora triton")
            if heat.run is None:
                print(f"{tiles}: {heat.refused}", file=sys.stderr)
                del totals[tiles]
            else:
                runs[tiles] = heat.run
        clocked: dict[Tiles, list[float]] = {tiles: [] for tiles in runs}
        for _ in range(ROUNDS):
            for tiles, run in runs.items():
                with use_tiles(tiles):
                    clocked[tiles] += [1e-3 * ms for ms in milliseconds(run)]
        for tiles, found in clocked.items():
            totals[tiles] += timing(found)["median"]
    return totals


def triton_only(race: Race) -> Race:
    """The race with one entrant."""
    return replace(race, entrants=[e for e in race.entrants if e.name == "fastlora triton"])


def source(row: Tiles) -> str:
    """As it stands in tiles.py."""
    return f"Tiles({', '.join(f'{field.name}={getattr(row, field.name)!r}' for field in fields(row))})"


if __name__ == "__main__":
    sys.exit(main())
