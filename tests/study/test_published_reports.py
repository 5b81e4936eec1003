"""The committed reports of `make studies`: there, made by the command that the docs give, at a commit, and whole."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastlora.study.config import STUDIES
from fastlora.study.report import HTML_FILE, MARKDOWN_FILE

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("study", STUDIES)
def test_a_report_says_what_may_be_concluded_and_how_it_was_made(study: str) -> None:
    folder = DOCS / "studies" / study
    page = (folder / MARKDOWN_FILE).read_text()
    lines = page.splitlines()[:10]
    assert lines[2].startswith("**A reader may conclude:** ") and lines[4].startswith("**A reader may not conclude:** ")
    command = f"python -m fastlora.study {study} --config configs/studies/{study.replace('-', '_')}_cpu.toml"
    assert f"command `{command}`" in lines[6] and command in (DOCS / "studies.md").read_text()
    assert re.search(r"commit `[0-9a-f]{40}`; machine `[^`]+`", lines[6])
    linked = set(re.findall(r"\]\(([\w-]+\.(?:csv|svg))\)", page))
    assert linked and linked == {path.name for path in folder.iterdir()} - {HTML_FILE, MARKDOWN_FILE}
    assert f"studies/{study}/{MARKDOWN_FILE}" in (DOCS / "studies.md").read_text()


@pytest.mark.parametrize("study", STUDIES)
def test_accuracy_is_decided_at_this_scale_by_no_report(study: str) -> None:
    page = (DOCS / "studies" / study / MARKDOWN_FILE).read_text()
    verdicts = [line for line in page.splitlines() if line.startswith("| **") and "| accuracy |" in line]
    assert verdicts and all(line.startswith("| **undecided** |") for line in verdicts)
