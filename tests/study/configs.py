"""Study files and cells for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastlora.config import RunConfig
from fastlora.study.cells import Cell
from fastlora.study.config import derive

HERE = Path(__file__).parent
LITTLE = f"{HERE / 'little_study.py'}:Little"


def write_study(folder: Path, text: str = "", *, study: str = LITTLE, base: str = "") -> Path:
    """A study's file beside a base run with the lines of `base`; `text` is TOML behind study and base."""
    (folder / "base.toml").write_text(base)
    path = folder / "little.toml"
    path.write_text(f'study = "{study}"\nbase = "base.toml"\n{text}')
    return path


def quick_cell(name: str, task: str, changes: dict[str, Any] | None = None, **options: Any) -> Cell:
    """A cell of a task of quick_tasks.py."""
    return Cell(name, derive(RunConfig(), changes or {}, "cell"), f"{HERE / 'quick_tasks.py'}:{task}", options)
