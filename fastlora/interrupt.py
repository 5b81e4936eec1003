"""Ctrl-C that loses nothing: the first one asks the loop to stop where it is safe, the second one stops at once."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Interrupted(Exception):
    """The run was asked to stop; raised between the stages of a step, before parameters move."""


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Yields `check()`, which raises Interrupted after SIGINT or SIGTERM; a second signal ends the process the usual way."""
    requested = False

    def request(signum: int, frame: object) -> None:
        nonlocal requested
        if requested:
            raise KeyboardInterrupt
        requested = True
        print("\nStopping at the next safe point; press Ctrl-C again to stop at once.", file=sys.stderr, flush=True)

    def check() -> None:
        if requested:
            raise Interrupted

    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
