"""What the benchmark commands share of their command lines."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from bench.race import REPOSITORY


def positive(text: str) -> int:
    """An argument that is a count. Raises ArgumentTypeError below 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return int(text)


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """`python -m module` with --json, --threads and --out; the description is the first line of the module's docstring."""
    made = argparse.ArgumentParser(prog=f"python -m {module}", description=(description or "").split("\n")[0])
    made.add_argument("--json", action="store_true", help="print the result as one line of JSON, last")
    made.add_argument("--threads", type=positive, default=len(os.sched_getaffinity(0)), help="of torch (default: all cores)")
    made.add_argument("--out", type=Path, default=REPOSITORY / "bench" / "results", help="folder of the result rows")
    return made
