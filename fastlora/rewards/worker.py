"""The process that runs graders which may hang or crash. Started by sandbox.py by its path; imports the standard library only.

Protocol over one socket (multiprocessing.connection, whose other end is our parent):
    in   Job                        once: what to load          out  ("ready", None) or ("failed", why)
    in   (function, args, limit)    again and again             out  ("value", list of None, float or str) or ("raised", why)
The process ends when the parent closes the socket, or dies.
"""

from __future__ import annotations

import importlib.util
import math
import resource
import signal
import sys
import traceback
from functools import partial
from multiprocessing.connection import Connection
from numbers import Real
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

ORPHAN_GRACE = 1.0
"""Seconds past its limit after which the kernel ends a call that a living parent would have killed at the limit."""


def main() -> None:
    """Load the job's file, then answer calls until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it closes the socket
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    parent = Connection(int(sys.argv[1]))
    try:
        job = parent.recv()
        try:
            module = load(Path(job["path"]), job["sys_path"], job["memory_limit"])
            functions = {name: partial(getattr(module, name), **options) for name, options in job["functions"].items()}
        except (Exception, SystemExit):
            parent.send(("failed", traceback.format_exc(limit=-3)))
            return
        parent.send(("ready", None))
        while True:
            name, args, limit = parent.recv()
            parent.send(answer(functions[name], args, limit))
    except (EOFError, ConnectionError):
        return


def load(path: Path, sys_path: list[str], memory_limit: int | None) -> ModuleType:
    """The module at `path`, imported as the parent would import it, in at most `memory_limit` bytes of address space."""
    if memory_limit is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory_limit, memory_limit))
    sys.path[:] = sys_path
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None, "registry.py lets only .py files through"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


def answer(function: Any, args: list[Any], limit: float) -> tuple[str, Any]:
    """One call. Arguments that are lists of dicts are examples: the function sees their fields as attributes.

    An alarm with the default action ends the process even inside C code that never returns to the interpreter (10^10^10 as a
    Python integer), so that a call cannot outlive a parent that was killed.
    """
    args = [[SimpleNamespace(**item) if isinstance(item, dict) else item for item in arg] for arg in args]
    signal.setitimer(signal.ITIMER_REAL, limit + ORPHAN_GRACE)
    try:
        return "value", plain(function(*args))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return "raised", f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def plain(result: Any) -> list[float | str | None]:
    """A grader's list, reduced to what the parent can read without this process's classes; NaN becomes None."""
    if not isinstance(result, list | tuple):
        raise TypeError(f"returned a {type(result).__name__} where a list is wanted, one number or None per completion")
    for item in result:
        if not isinstance(item, None | str | Real) or (isinstance(item, Real) and math.isinf(item)):
            raise TypeError(f"returned {item!r} ({type(item).__name__}) in its list, where a finite number or None is wanted")
    return [item if item is None or isinstance(item, str) else None if math.isnan(item) else float(item) for item in result]


if __name__ == "__main__":
    main()
