"""The folder of a run: made, named, found again."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from fastlora.atomic import atomic_write_text
from fastlora.config import ConfigError, RunConfig

CONFIG_FILE = "config.json"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """`<output_dir>/<name>/` and the files in it that are not the metrics'."""

    path: Path

    @property
    def adapter(self) -> Path:
        """The trained adapter as PEFT files."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The trained model (full fine-tuning)."""
        return self.path / "model"

    def evaluation(self, when: str) -> Path:
        """Per-problem answers `before` or `after` training."""
        return self.path / f"eval_{when}.jsonl"


def create_run_folder(config: RunConfig, config_path: Path | None) -> RunFolder:
    """A new folder with the resolved config in it. Raises ConfigError when a run of this name exists: none is ever overwritten."""
    stem = config_path.stem if config_path else "run"
    path = config.output_dir / (config.name or f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        raise ConfigError(f"{path} exists: choose another --name, or continue that run with --resume {path}") from None
    write_config(path, config)
    return RunFolder(path)


def write_config(path: Path, config: RunConfig) -> None:
    """Makes an existing folder a run's: `open_run_folder` finds the resolved config in it."""
    atomic_write_text(path / CONFIG_FILE, config.model_dump_json(indent=2) + "\n")


def open_run_folder(path: Path) -> tuple[RunFolder, RunConfig]:
    """An existing run and its resolved config. Raises ConfigError when there is none, or it was written by another version."""
    file = path / CONFIG_FILE
    if not file.is_file():
        raise ConfigError(f"{path} is no run folder: it has no {CONFIG_FILE}")
    try:
        return RunFolder(path), RunConfig.model_validate_json(file.read_text())
    except ValidationError as error:
        raise ConfigError(f"{file} is damaged or from another version of fastlora: {error.errors()[0]}") from None
