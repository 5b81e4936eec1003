"""A cell in a process of its own, forked from one that has imported everything a cell needs.

    Ray's worker, reused ── starts, once ──► forkserver: PRELOAD imported, nothing computed ── forks ──► the cell's process
          ▲                                                                                                   │
          └──────────────────────────────── Outcome, through a pipe ──────────────────────────────────────────┘

A process each, so that a cell's peak memory is its own and what it breaks dies with it; forked, because imports alone take 8 of the 16
CPU seconds of the shortest run. The server (Python's own, multiprocessing) has computed nothing, so that it has one thread (and jemalloc's,
which knows of forks), and no GPU when it forks: where cells have GPUs nothing is imported beforehand, since bitsandbytes looks for a card
when it is imported, and a CUDA driver does not survive a fork.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from fastlora.study.cells import Cell
from fastlora.study.worker import Outcome, run_cell

PRELOAD = ("fastlora.session", "fastlora.probe", "fastlora.scoring", "fastlora.evaluate.adapter")
"""Nearly all that tasks.py imports inside its functions; the server passes over a name that it cannot import."""

POLL_SECONDS = 0.1
"""Ray cancels by an exception that is raised between two lines of Python, never inside a system call that waits."""


def run_forked(cell: Cell, folder: Path, attempt: int, working_directory: Path, preload: bool) -> Outcome:
    """`run_cell` in a process forked for it; a KeyboardInterrupt here is sent on to it as SIGINT, and it may save itself."""
    _hear_ctrl_c()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", *PRELOAD] if preload else ["__main__"])
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, dict(os.environ), cell, folder, attempt, working_directory)
    process = context.Process(target=_serve, args=arguments, name=cell.name)
    process.start()
    sender.close()  # the cell's process has the other one: its death ends the pipe
    outcome = _received(receiver, process)
    process.join()
    return outcome or Outcome("failed", f"its process died ({_cause(process.exitcode)})", retry=True)


def _received(receiver: Connection, process: Any) -> Outcome | None:
    """What the process sent, None if it died first."""
    while True:
        try:
            while not receiver.poll(POLL_SECONDS):
                pass
            outcome: Outcome = receiver.recv()
            return outcome
        except KeyboardInterrupt:
            with suppress(ProcessLookupError):  # it has just ended, and the pipe says how
                os.kill(process.pid, signal.SIGINT)
        except EOFError:
            return None


def _cause(exit_code: int | None) -> str:
    """A negative exit code is a signal's number."""
    return signal.Signals(-exit_code).name if exit_code is not None and exit_code < 0 else f"exit code {exit_code}"


def _serve(sender: Connection, variables: Mapping[str, str], *arguments: Any) -> None:
    """In the cell's process. variables: Ray's worker's environment now; the server has the one that it was started with."""
    _hear_ctrl_c()
    os.environ.update(variables)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sender.send(run_cell(*arguments))


def _hear_ctrl_c() -> None:
    """A command in a shell's background (`make studies &`) ignores SIGINT, and so would all that it starts, Ray's cancel included."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _end_with_parent() -> None:
    """Ray's worker is killed when its command is: nobody waits for this cell any more."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
