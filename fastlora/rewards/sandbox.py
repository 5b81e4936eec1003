"""Graders in a process that can be killed: a completion may make sympy compute 10^10^10, a user's function may hang.

The worker starts at the first call, is used for all later ones, and is killed and started anew when a call overruns its limit.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fastlora.rewards import worker
from fastlora.rewards.deposits import RewardError

STARTUP_LIMIT = 120.0
"""Seconds until a worker must have imported its file. math-verify takes 1.3 s on an idle core; a user's may import torch."""


class NoAnswer(Exception):
    """The call overran its limit, or its process died; the worker is gone and the next call starts another."""


class Sandbox:
    """A Python file whose functions are called in another process.

    label names it in errors; functions maps the names that may be called to keyword arguments that each call gets;
    memory_limit is in bytes of address space.
    """

    def __init__(self, path: Path, functions: Mapping[str, dict[str, Any]], label: str, memory_limit: int | None = None) -> None:
        self._label = label
        self._job = {
            "path": str(path.resolve()),
            "functions": dict(functions),
            "sys_path": [*sys.path, str(path.resolve().parent)],
            "memory_limit": memory_limit,
        }
        self._connection: Connection | None = None
        self._end: weakref.finalize[Any, Any] | None = None

    def start(self) -> Connection:
        """The connection to a worker that has loaded the file; raises RewardError if the file cannot be loaded."""
        if self._connection is not None:
            return self._connection
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, worker.__file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a group of its own: Ctrl-C does not reach it, and a kill reaches its children too
            )
        self._connection = Connection(ours.detach())
        self._end = weakref.finalize(self, _end, process, self._connection)
        try:
            kind, why = self._exchange(self._job, STARTUP_LIMIT)
        except NoAnswer:
            raise RewardError(f"reward {self._label}: its process did not start within {STARTUP_LIMIT:.0f} s, or died") from None
        if kind == "failed":
            self.close()
            raise RewardError(f"reward {self._label}: cannot be loaded:\n{why}")
        return self._connection

    def call(self, function: str, args: Sequence[Sequence[Any]], limit: float) -> list[Any]:
        """The list that the function returns for `args` within `limit` seconds; Examples go as dicts of their fields.

        Raises NoAnswer when the call overran or its process died, RewardError when the function raised.
        """
        self.start()
        kind, value = self._exchange((function, args, limit), limit)
        if kind == "raised":
            raise RewardError(f"reward {self._label} raised {value}")
        return value

    def close(self) -> None:
        """Kills the worker, if there is one."""
        self._connection = None
        if self._end is not None:
            self._end()

    def _exchange(self, message: Any, limit: float) -> tuple[str, Any]:
        assert self._connection is not None
        try:
            self._connection.send(message)
            if not self._connection.poll(limit):
                raise NoAnswer
            return self._connection.recv()
        except (EOFError, OSError) as error:
            self.close()
            raise NoAnswer from error
        except BaseException:  # also Ctrl-C: an answer that nobody waits for must not meet the next question
            self.close()
            raise


def _end(process: subprocess.Popen[bytes], connection: Connection) -> None:
    """Runs once: at close(), when the Sandbox is collected, or when the interpreter exits."""
    connection.close()
    with suppress(ProcessLookupError):  # it may have ended by itself, and its group with it
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
