"""Study files for the tests."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
LITTLE = f"{HERE / 'little_study.py'}:Little"


def write_study(folder: Path, text: str = "", *, study: str = LITTLE, base: str = "") -> Path:
    """A study's file beside a base run with the lines of `base`; `text` is TOML behind study and base."""
    (folder / "base.toml").write_text(base)
    path = folder / "little.toml"
    path.write_text(f'study = "{study}"\nbase = "base.toml"\n{text}')
    return path
