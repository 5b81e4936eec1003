"""Users' own functions, named `path/to/file.py:function`: allocators, choices of layers, placement scores, losses.

The file is run in this process, like any import. Rewards do not come through here: they grade what a model wrote, may hang or crash, and so
live in a process of their own (fastlora/rewards/sandbox.py).
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable, Collection
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from fastlora.config import ConfigError


def is_function_spec(text: str) -> bool:
    """Written like `path/to/file.py:function`; a built-in name is not."""
    path, _, name = text.rpartition(":")
    return Path(path).suffix == ".py" and name.isidentifier()


def load_function(spec: str, where: str) -> Callable[..., Any]:
    """What `path/to/file.py:function` names. where: the setting that holds it, for the message.

    Raises ConfigError: not written like that, no such file, the file raises when it is run, no such function, not callable.
    """
    if not is_function_spec(spec):
        raise ConfigError(f"{where}: {spec!r} is not written path/to/file.py:function")
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        raise ConfigError(f"{where}: {spec!r}: no such file as {Path(path).resolve()}")
    module = _run_file(Path(path), f"{where}: {spec!r}")
    if not hasattr(module, name):
        near = get_close_matches(name, [key for key in vars(module) if callable(getattr(module, key))])
        raise ConfigError(f"{where}: {spec!r}: {path} has no {name}" + (f"; did you mean {', '.join(near)}?" if near else ""))
    function = getattr(module, name)
    if not callable(function):
        raise ConfigError(f"{where}: {spec!r}: {name} is a {type(function).__name__}, a function is needed")
    return function


def load_strategy(name: str, built_in: Collection[str], where: str) -> Callable[..., Any] | None:
    """The user's function where `name` is written like one, None where it is one of `built_in`.

    Raises ConfigError for another name (with the nearest ones), and as `load_function`.
    """
    if name in built_in:
        return None
    if is_function_spec(name):
        return load_function(name, where)
    near = get_close_matches(name, built_in)
    hint = f"did you mean {', '.join(near)}?" if near else f"built in are {', '.join(built_in)};"
    raise ConfigError(f"{where}: {name!r} is unknown; {hint} one's own is written path/to/file.py:function")


def _run_file(path: Path, where: str) -> ModuleType:
    found = importlib.util.spec_from_file_location(f"plugin_{path.stem}", path)
    assert found is not None and found.loader is not None, "is_function_spec lets only .py files through"
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # dataclasses look their own module up
    try:
        found.loader.exec_module(module)
    except Exception as error:  # whatever a user's file raises
        del sys.modules[found.name]
        line = error.lineno if isinstance(error, SyntaxError) else traceback.extract_tb(error.__traceback__)[-1].lineno
        raise ConfigError(f"{where}: the file raised {type(error).__name__}: {error} (line {line})") from error
    return module
