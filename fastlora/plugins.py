"""One's own functions from one's own files: `path/to/file.py:name`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastlora.config import ConfigError


def load_function(spec: str, where: str) -> Callable[..., Any]:
    """What `path/to/file.py:name` names. Raises ConfigError that says `where` the spec stands: no such file or name, or not callable."""
    path, _, name = spec.rpartition(":")
    if Path(path).suffix != ".py" or not name:
        raise ConfigError(f"{where}: {spec!r} is not written path/to/file.py:name")
    if not Path(path).is_file():
        raise ConfigError(f"{where}: {spec!r}: no such file as {Path(path).resolve()}")
    found = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{where}: {path} has no function {name!r}")
    return function
