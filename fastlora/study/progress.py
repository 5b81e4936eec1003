"""What the terminal shows of a stage: one row a cell while it runs, plain lines where there is no terminal.

    rank_allocation_cpu   7 of 18 cells finished   2 running   0:21:40   about 0:33:00 left
    proportional/seed-0    running    step 12/20   reward 0.52   0:01:10   0:00:47 left
    uniform/seed-2         finished   step 20/20   reward 0.61   0:02:02

Steps, rewards and times are read from the cells' own files (metrics.jsonl, finished.json), wherever the cells run.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fastlora.study.cells import Cell
from fastlora.study.worker import ATTEMPT_FILE, FINISHED_FILE

METRICS_FILE = "metrics.jsonl"
"""fastlora.metrics has it too; importing that would import torch into the command."""

TAIL_BYTES = 1 << 16
"""More than a step's row in metrics.jsonl (some 2 KB)."""

LINE_SECONDS = 60.0
"""Between two lines about running cells where there is no terminal."""

STYLES = {"waiting": "dim", "running": "bold", "finished": "green", "failed": "bold red", "stopped": "yellow"}


@dataclass(slots=True)
class Job:
    """A cell and how far it is."""

    cell: Cell
    folder: Path
    state: Literal["waiting", "finished", "failed", "stopped"] = "waiting"
    """waiting, or running, which the worker knows first (`shown_state`)."""
    attempt: int = 0
    message: str = ""
    """Why it failed."""
    started: float | None = None
    """time.monotonic() at which this attempt was first seen to run."""

    @property
    def shown_state(self) -> str:
        """`state`, or "running" once the worker has taken it up."""
        return "running" if self.state == "waiting" and self.attempt and (self.folder / ATTEMPT_FILE).exists() else self.state


class StageProgress:
    """Shows jobs until they are done; a context manager. `update()` looks at them again."""

    def __init__(self, jobs: list[Job], console: Console) -> None:
        self._jobs, self._console, self._began = jobs, console, time.monotonic()
        self._already = sum(job.state == "finished" for job in jobs)
        self._states = {job.cell.name: job.shown_state for job in jobs}
        self._next_line = self._began + LINE_SECONDS
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> StageProgress:
        if self._live is not None:
            self._live.start()
        if self._already:
            self.note(f"{self._already} of {len(self._jobs)} cells were finished before")
        self.update()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.update()
        if self._live is not None:
            self._live.stop()

    def note(self, message: str) -> None:
        """A line of its own, above the live display."""
        self._console.print(Text(message), soft_wrap=True)

    def update(self) -> None:
        """Redraws; without a terminal, prints the cells whose state has changed, and once a minute how far the running ones are."""
        for job in self._jobs:
            if job.shown_state != "running":
                job.started = None
            elif job.started is None:
                job.started = time.monotonic()
        if self._live is not None:
            self._live.update(self._display(), refresh=True)
        else:
            self._print_changes()

    def _print_changes(self) -> None:
        overdue = time.monotonic() >= self._next_line
        for job in self._jobs:
            state = job.shown_state
            if state != self._states[job.cell.name] or (overdue and state == "running"):
                name, shown, *rest = _row(job)
                self.note("   ".join([f"{name}: {shown}", *filter(None, [*rest, job.message])]))
            self._states[job.cell.name] = state
        if overdue:
            self.note(self._summary())
            self._next_line = time.monotonic() + LINE_SECONDS

    def _display(self) -> Group:
        """The summary and as many rows as fit, those that need a look first."""
        order = ("failed", "running", "stopped", "finished", "waiting")
        jobs = sorted(self._jobs, key=lambda job: order.index(job.shown_state))
        room = max(self._console.height - 4, 3)
        table = Table.grid(padding=(0, 3))
        for job in jobs[:room]:
            table.add_row(*_row(job), style=STYLES[job.shown_state])
        hidden = [Text(f"… and {len(jobs) - room} more", style="dim")] if len(jobs) > room else []
        return Group(Text(self._summary(), style="bold"), table, *hidden)

    def _summary(self) -> str:
        states = [job.shown_state for job in self._jobs]
        done, running = states.count("finished"), states.count("running")
        elapsed = time.monotonic() - self._began
        parts = [f"{done} of {len(states)} cells finished", f"{running} running", _clock(elapsed)]
        if done > self._already and done < len(states):  # the pace of this command: cells that were there before cost nothing
            parts.append(f"about {_clock(elapsed / (done - self._already) * (len(states) - done))} left")
        return "   ".join(parts)


def _row(job: Job) -> list[str]:
    """Name, state, step, reward or loss, seconds, time left; empty where it is not known."""
    row, steps = _last_metrics(job.folder / METRICS_FILE), job.cell.config.trainer.steps
    step = f"step {row['step']}/{steps}" if row else ""
    outcome = next(
        (f"{name} {row[key]:.3g}" for name, key in (("reward", "reward/mean"), ("loss", "loss")) if row.get(key) is not None), ""
    )
    left, seconds = "", ""
    if job.shown_state == "finished":
        seconds = _clock(json.loads((job.folder / FINISHED_FILE).read_text())["seconds"])
    elif job.started is not None:
        seconds = _clock(time.monotonic() - job.started)
        per_step = sum(value for key, value in row.items() if key.startswith("seconds/") and value is not None)
        left = f"{_clock(per_step * (steps - row['step']))} left" if row and per_step else ""
    state = job.shown_state + (f" (attempt {job.attempt})" if job.attempt > 1 else "")
    return [job.cell.name, state, step, outcome, seconds, left]


def _last_metrics(path: Path) -> dict[str, Any]:
    """The newest whole row; empty when there is none yet."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            whole = file.read().rpartition(b"\n")[0]
    except FileNotFoundError:
        return {}
    row: dict[str, Any] = json.loads(whole.rpartition(b"\n")[2] or b"{}")
    return row


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
