"""A finished training cell without training, for what reads cells."""

from __future__ import annotations

import json
from pathlib import Path

from fastlora.study.worker import FINISHED_FILE
from tests.analysis.synthetic_run import make_run


def make_cell(folder: Path, **case: int) -> Path:
    """Two layers, 12 steps, 64 problems; `case` as make_run's."""
    make_run(folder, layers=2, steps=12, problems=64, **case)  # type: ignore[arg-type]
    (folder / FINISHED_FILE).write_text(json.dumps({"name": "x", "task": "train", "key": folder.name, "seconds": 1.0, "attempts": 1}))
    return folder
