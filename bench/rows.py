"""Result rows: one JSON object a line in bench/results/DEVICE/*.jsonl, written by the benchmarks, read by bench/figures.py.

Rows are only appended; a file tells the history of its device. `current` is what the last commit in it measured.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]

KEY = ("op", "race", "implementation", "dtype", "shape")
"""Fields that tell two measurements of one commit apart."""


def timing(seconds: Sequence[float], *, flops: float | None = None, nbytes: float | None = None) -> Row:
    """median, p20, p80 (seconds, linear interpolation), gflop_per_s and gb_per_s (None without that work) of repeated runs."""
    median = float(np.median(seconds))
    return {
        "median": median,
        "p20": float(np.percentile(seconds, 20)),
        "p80": float(np.percentile(seconds, 80)),
        "gflop_per_s": None if flops is None else flops / median / 1e9,
        "gb_per_s": None if nbytes is None else nbytes / median / 1e9,
    }


def slug(device: str) -> str:
    """Folder of a device's rows: `AMD EPYC 9R14` -> `amd-epyc-9r14`."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def append_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Adds lines to a file; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read_rows(path: Path) -> list[Row]:
    """All rows of a file, oldest first; none where there is no file yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def current(rows: Sequence[Row]) -> list[Row]:
    """The rows of the commit that measured last; of a measurement that it repeated, the last one."""
    latest = {tuple(row.get(name) for name in KEY): row for row in rows if row["commit"] == rows[-1]["commit"]}
    return list(latest.values())
