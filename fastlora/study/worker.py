"""One attempt at one cell, in a process of its own: what it prints goes to log.txt, and finished.json is written last.

OUT/cells/KEY/log.txt          all attempts, one after the other
              attempt.json     the attempt that runs: number, host, process
              finished.json    the cell is done: name, task, key, seconds and attempts of the command that finished it
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastlora.atomic import atomic_write_text
from fastlora.errors import FastloraError, StoppedByAlarmError, StoppedError
from fastlora.interrupt import Interrupted
from fastlora.study.cells import Cell
from fastlora.study.tasks import load_task

LOG_FILE, ATTEMPT_FILE, FINISHED_FILE, LOCK_FILE = "log.txt", "attempt.json", "finished.json", ".lock"

LOCK_SECONDS = 60.0
"""A worker whose command was killed ends within seconds; one that still writes after this is somebody's."""


class BusyError(FastloraError):
    """Another process writes this folder."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended."""

    state: Literal["finished", "failed", "stopped"]
    message: str = ""
    """Why it failed, in a sentence; the log has the rest."""
    retry: bool = False
    """Another attempt may end otherwise."""


def run_cell(cell: Cell, folder: Path, attempt: int, working_directory: Path) -> Outcome:
    """Runs the cell's task in this process, which should end soon after: peak memory is the process's.

    Relative paths of the config are relative to `working_directory`, the command's own.
    """
    os.chdir(working_directory)
    folder.mkdir(parents=True, exist_ok=True)
    with _output_to(folder / LOG_FILE):
        try:
            with locked(folder / LOCK_FILE, LOCK_SECONDS):
                _attempt(cell, folder, attempt)
        except BaseException as error:  # all of them: what an attempt died of must reach the command, whichever machine it ran on
            return _outcome(error)
        return Outcome("finished")


def _attempt(cell: Cell, folder: Path, attempt: int) -> None:
    if (folder / FINISHED_FILE).exists():  # by a worker that outlived its command
        return
    process = {"attempt": attempt, "host": socket.gethostname(), "pid": os.getpid()}
    print(f"--- {cell.name}: {process}", flush=True)
    atomic_write_text(folder / ATTEMPT_FILE, json.dumps(process) + "\n")
    started = time.monotonic()
    config = cell.config.model_copy(update={"name": folder.name, "output_dir": folder.parent})
    load_task(cell.task)(config, folder, cell.options, lambda line: print(line, flush=True))
    finished = {"name": cell.name, "task": cell.task, "key": folder.name, "seconds": time.monotonic() - started, "attempts": attempt}
    atomic_write_text(folder / FINISHED_FILE, json.dumps(finished) + "\n")


def _outcome(error: BaseException) -> Outcome:
    by_alarm = isinstance(error, StoppedByAlarmError)  # the config's own wish: this cell is judged, the others go on
    if isinstance(error, KeyboardInterrupt | Interrupted | StoppedError) and not by_alarm:
        print(f"stopped: {error}", flush=True)
        return Outcome("stopped")
    if not isinstance(error, FastloraError):
        traceback.print_exception(error)
        return Outcome("failed", f"{type(error).__name__}: {error}", retry=True)
    print(f"{type(error).__name__}: {error}", flush=True)
    return Outcome("failed", f"{type(error).__name__}: {error}", retry=error.transient)


@contextmanager
def locked(path: Path, seconds: float) -> Iterator[None]:
    """Holds `path` as a lock of this process, which its end frees however it comes. Raises BusyError after `seconds`."""
    with path.open("w") as file:
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise BusyError(f"another process writes {path.parent}; wait for it, or end it") from None
                time.sleep(0.1)
        yield


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Appends what this process and its children print to `path`."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(descriptor) for descriptor in (1, 2)]
    streams = sys.stdout, sys.stderr
    with path.open("a", buffering=1, encoding="utf-8") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        sys.stdout = sys.stderr = file
        try:
            yield
        finally:
            sys.stdout, sys.stderr = streams
            for copy, descriptor in zip(saved, (1, 2), strict=True):
                os.dup2(copy, descriptor)
                os.close(copy)
