"""Every op × implementation × dtype at the shapes of SmolLM2's update: `python -m bench.ops [--json] [--threads N] [--out bench/results]`.

    gate    each against the reference one precision up, or exit 1 and no row
    time    pytest-benchmark (bench/test_ops.py): median, p20, p80
    peak    measured in the same run: for ops of matrix products the best GEMM of their shapes, for the others a copy of as many bytes

    GFLOP/s and GB/s    the op's own cost(): useful operations, compulsory bytes
    share of peak       GFLOP/s over the GEMM's, or GB/s over the copy's
    × reference         its median over this one's, same dtype and shape

A table on stdout, progress on stderr; rows are appended to OUT/DEVICE/ops.jsonl; with --json the last line of stdout is their list.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.benchmark import Timer

from bench.command_line import parser
from bench.gemm_peak import Shape, Work, measure_rates, peak_rate
from bench.race import REPOSITORY
from bench.report import commit, device_name, device_slug
from bench.rows import Row, append_rows, timing

CASES = Path(__file__).with_name("test_ops.py")
TIMING = ("--benchmark-min-rounds=3", "--benchmark-max-time=0.3", "--benchmark-warmup=off")
"""The slowest references take seconds a run; a fast op fills 0.3 s."""
COPY_SECONDS = 0.1
TABLE_WIDTH = 180
"""Characters."""

Gemms = Counter[Shape]
Say = Callable[[str], None]


def main(argv: list[str] | None = None) -> int:
    """See the module's docstring."""
    options = parse(argv)
    torch.set_num_threads(options.threads)
    entries = run_benchmarks()
    if entries is None:
        print("an op failed its gate, or could not be timed (above): no rows", file=sys.stderr)
        return 1
    peaks = Peaks(lambda message: print(message, file=sys.stderr, flush=True))
    rows = ops_rows(entries, peaks, threads=options.threads, device=device_name(), commit_id=commit())
    append_rows(rows, options.out / device_slug() / "ops.jsonl")
    table_console().print(ops_table(rows))
    if options.json:
        print(json.dumps(rows))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    return parser("bench.ops", __doc__).parse_args(argv)


def run_benchmarks() -> list[dict[str, Any]] | None:
    """pytest-benchmark's records of bench/test_ops.py (`stats.data` in seconds, `extra_info`); None when a case failed."""
    with tempfile.TemporaryDirectory() as scratch, redirect_stdout(sys.stderr):
        path = Path(scratch) / "ops.json"
        paths = (str(CASES), f"--rootdir={REPOSITORY}", f"--benchmark-json={path}")
        status = pytest.main([*paths, "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--benchmark-columns=median", *TIMING])
        return json.loads(path.read_text())["benchmarks"] if status == pytest.ExitCode.OK else None


class Peaks:
    """What this machine does at best, measured once for each list of products and each number of bytes."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._gemm_rates: dict[tuple[Shape, str], float] = {}
        self._copies: dict[int, float] = {}

    def gemm(self, gemms: Gemms, dtype: str) -> float:
        """FLOP/s of these products at the best rate of each (bench/gemm_peak.py)."""
        for shape in gemms:
            if (shape, dtype) not in self._gemm_rates:
                rates = measure_rates([shape], getattr(torch, dtype), lambda s: self._say(f"GEMM peak in {dtype}: {s}"))
                self._gemm_rates[shape, dtype] = rates[shape]
        return peak_rate(Work(gemms, 0.0), {shape: self._gemm_rates[shape, dtype] for shape in gemms})

    def copy(self, nbytes: int) -> float:
        """Bytes/s of a copy that reads and writes `nbytes` in all: what an op of this size finds in the caches, the copy finds too."""
        if nbytes not in self._copies:
            source = torch.ones(max(1, nbytes // 8))  # float32, once read and once written
            tensors = {"source": source, "target": torch.empty_like(source)}
            timer = Timer("target.copy_(source)", globals=tensors, num_threads=torch.get_num_threads())
            self._copies[nbytes] = nbytes / min(timer.blocked_autorange(min_run_time=COPY_SECONDS).times)
        return self._copies[nbytes]


def ops_rows(entries: Sequence[Mapping[str, Any]], peaks: Peaks, *, threads: int, device: str, commit_id: str | None) -> list[Row]:
    """One row for each record."""
    rows = []
    for entry in entries:
        info = entry["extra_info"]
        gemms: Gemms = Counter({(m, k, n): count for m, k, n, count in info["gemms"]})
        measured = timing(entry["stats"]["data"], flops=info["flops"], nbytes=info["bytes"])
        if gemms:
            share = measured["gflop_per_s"] * 1e9 / peaks.gemm(gemms, info["dtype"])
        else:
            share = measured["gb_per_s"] * 1e9 / peaks.copy(info["bytes"])
        rows.append(
            {
                **{name: info[name] for name in ("op", "implementation", "dtype", "shape")},
                "device": device,
                "threads": threads,
                **measured,
                "bound": "gemm" if gemms else "memory",
                "share_of_peak": share,
                "peak_bytes": None,  # of a whole update: bench/train_step.py, bench/scaling.py
                "commit": commit_id,
            }
        )
    references = {(row["op"], row["dtype"], row["shape"]): row["median"] for row in rows if row["implementation"] == "reference"}
    return [{**row, "x_baseline": references[row["op"], row["dtype"], row["shape"]] / row["median"]} for row in rows]


def table_console() -> Console:
    """Wide enough for a table of results, also where stdout is a file."""
    return Console(width=max(Console().width, TABLE_WIDTH))


def ops_table(rows: Sequence[Row]) -> Table:
    """For the terminal."""
    table = Table(title=f"ops on {rows[0]['device']}, {rows[0]['threads']} threads", caption="share: of the best GEMM, or of a copy")
    for heading in ("op", "shape", "dtype", "implementation"):
        table.add_column(heading)
    for heading in ("ms", "p20", "p80", "GFLOP/s", "GB/s", "share", "× reference"):
        table.add_column(heading, justify="right")
    for row in rows:
        times = [f"{1e3 * row[name]:.3f}" for name in ("median", "p20", "p80")]
        rates = [f"{row['gflop_per_s']:.0f}", f"{row['gb_per_s']:.1f}", f"{row['share_of_peak']:.0%}", f"{row['x_baseline']:.2f}"]
        table.add_row(row["op"], row["shape"], row["dtype"], row["implementation"], *times, *rates)
    return table


if __name__ == "__main__":
    raise SystemExit(main())
