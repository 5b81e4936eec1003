"""Runs contenders against each other: one process each, kept alive, one working at a time, in turns A B C A B C."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from bench.contender import Contender

REPOSITORY = Path(__file__).parents[1]
WORKER = (sys.executable, "-m", "bench.worker")


class WorkerError(RuntimeError):
    """A worker that ended before it answered; the message names the contender and the end of its stderr."""


@dataclass(slots=True)
class Result:
    """What one contender's runs took, warm-up excluded."""

    contender: Contender
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    """Largest resident set of its process, from its start to its last run."""
    metrics: dict[str, list[float]] = field(default_factory=dict)
    """What else the contender reported, by name, one value a run."""

    def add(self, answer: Mapping[str, Any]) -> None:
        """One more run, as Worker.run answers."""
        self.seconds.append(answer["seconds"])
        self.cpu_seconds.append(answer["cpu_seconds"])
        self.peak_bytes = answer["peak_bytes"]
        for name, value in answer["metrics"].items():
            self.metrics.setdefault(name, []).append(value)

    @property
    def median(self) -> float:
        """Wall seconds."""
        return float(np.median(self.seconds))

    def percentile(self, q: float) -> float:
        """Wall seconds, linear interpolation."""
        return float(np.percentile(self.seconds, q))

    def summary(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "settings": self.contender.settings(),
            "seconds": self.median,
            "p20": self.percentile(20),
            "p80": self.percentile(80),
            "cpu_seconds": float(np.median(self.cpu_seconds)),
            "peak_bytes": self.peak_bytes,
            "runs": len(self.seconds),
        }


class Worker:
    """The process of one contender; a context manager that ends it. `command`: another program that speaks the protocol."""

    def __init__(self, contender: Contender, folder: Path, threads: int, command: Sequence[str] = WORKER) -> None:
        self.contender = contender
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in __exit__)
        self._process = subprocess.Popen(
            [*command, json.dumps(contender.settings()), str(folder), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
        )

    def wait_until_ready(self) -> None:
        """Until everything is loaded."""
        self._answer()

    def run(self, do: str = "run", path: str = "") -> dict[str, Any]:
        """seconds, cpu_seconds, peak_bytes and metrics of one command (see contender.Command)."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, "path": path}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._stderr.seek(0)
            raise WorkerError(f"{self.contender.name}: worker ended with status {status}\n{self._stderr.read()[-3000:]}")
        return json.loads(line)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._stderr.close()


def race(
    contenders: Sequence[Contender],
    folder: Path,
    threads: int,
    rounds: int,
    progress: Callable[[str], None],
    command: Sequence[str] = WORKER,
) -> list[Result]:
    """One warm-up of each, then `rounds` in turns: what the machine does besides meets all of them alike.

    Raises WorkerError. A worker is loaded before the next one starts, so that no two compute at once.
    """
    results = [Result(contender) for contender in contenders]
    with ExitStack() as stack:
        workers = []
        for contender in contenders:
            progress(f"{contender.name}: load and warm up")
            workers.append(stack.enter_context(Worker(contender, folder, threads, command)))
            workers[-1].wait_until_ready()
            workers[-1].run()
        for number in range(1, rounds + 1):
            for worker, result in zip(workers, results, strict=True):
                progress(f"{worker.contender.name}: run {number} of {rounds}")
                result.add(worker.run())
    for result in results:
        progress(f"{result.contender.name}: median {result.median:.2f} s, peak {result.peak_bytes / 2**30:.2f} GiB")
    return results
