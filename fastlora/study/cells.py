"""A cell: one run of a study, named for people and keyed by what it computes.

    key = first 16 hex digits of sha256(task, options, config without name and output_dir), files replaced by their bytes

Two cells of one key are one computation: it runs once, its folder OUT/cells/KEY/ serves both. A file that the config names (a mask, an
adapter to start from, problems, a reward in Python) counts by what is in it: moved, it is the same; edited, it is another cell.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from fastlora.config import ConfigError, RunConfig
from fastlora.plugins import is_function_spec

KEY_DIGITS = 16
"""64 bits: two of a million cells share a key with probability 3e-8."""

WRITTEN = ("rollout.record_path", "vllm.adapter_folder")
"""Settings that name what a run writes, not what it reads."""

READ_SUFFIXES = (".jsonl", ".json", ".safetensors", ".parquet")
"""A text setting that ends so names a file."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a study."""

    name: str
    """Unique in the study: "proportional/seed-0"."""
    config: RunConfig
    """Complete. Its `name` and `output_dir` are replaced by the engine and not part of the key."""
    task: str = "train"
    """What runs: a key of tasks.TASKS, or one's own `path/to/file.py:function`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The task's own, JSON: {"batches": 16}."""

    @property
    def key(self) -> str:
        """The folder's name; see the module. Raises ConfigError for a file that is not there and for options that are not JSON."""
        settings = self.config.model_dump(exclude={"name", "output_dir"})
        contents = {"task": self.task, "options": self.options, "config": settings}
        try:
            text = json.dumps({name: self._by_content(value, name) for name, value in contents.items()}, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"cell {self.name!r}: its options must be plain JSON: {error}") from None
        return hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS]

    def _by_content(self, value: Any, where: str) -> Any:
        """`value` with every file and folder that is read replaced by the hash of its bytes, at any depth."""
        setting = where.removeprefix("config.")
        if isinstance(value, Mapping):
            return {name: self._by_content(item, f"{where}.{name}") for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._by_content(item, where) for item in value]
        if isinstance(value, Path):
            return str(value) if setting in WRITTEN else self._hash(value, setting)
        if isinstance(value, str) and is_function_spec(value):
            path, _, name = value.rpartition(":")
            return f"{self._hash(Path(path), setting)}:{name}"
        if isinstance(value, str) and value.endswith(READ_SUFFIXES):
            return self._hash(Path(value), setting)
        return value

    def _hash(self, path: Path, setting: str) -> str:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        digest = hashlib.sha256()
        for file in files:
            if file.is_dir() or file.parent.name == "__pycache__":  # which is there once Python beside it was used
                continue
            try:
                status = file.stat()
                digest.update(f"{file.relative_to(path)} {_sha256(file, status.st_size, status.st_mtime_ns)}\n".encode())
            except OSError as error:
                raise ConfigError(f"cell {self.name!r}: {setting}: {path} cannot be read: {error.strerror}") from None
        return digest.hexdigest()


@cache
def _sha256(path: Path, size: int, modified_ns: int) -> str:
    """Of a file's bytes; read again only when its size or time has changed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def add_names(cells: Iterable[Cell], keys: Mapping[str, str]) -> dict[str, str]:
    """`keys` (name -> key) with those of more cells. Raises ConfigError when two cells have one name."""
    named = dict(keys)
    for cell in cells:
        if cell.name in named:
            raise ConfigError(f"two cells are named {cell.name!r}: a name must say what makes a cell different from all others")
        named[cell.name] = cell.key
    return named
