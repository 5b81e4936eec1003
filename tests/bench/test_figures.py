"""The page is made of the rows: their numbers are on it, older ones are not, and the same rows give the same bytes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.figures import main
from bench.race import REPOSITORY
from bench.report import TARGETS
from bench.rows import append_rows, current, read_rows, timing
from tests.bench.synthetic_rows import ops_rows, write_all


def page_of(results: Path, docs: Path) -> str:
    assert main(["--results", str(results), "--docs", str(docs)]) == 0
    return (docs / "README.md").read_text()


def cells(page: str, *start: str) -> list[str]:
    """The cells of the table line that begins with these."""
    (line,) = [line for line in page.splitlines() if line.startswith("| " + " | ".join(start) + " |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_numbers_of_the_rows_are_on_the_page(tmp_path: Path) -> None:
    write_all(tmp_path / "results")
    page = page_of(tmp_path / "results", tmp_path / "docs")
    assert cells(page, TARGETS[0].what)[1:] == ["9.87", "≥ 4.5", "met"]
    assert cells(page, TARGETS[-1].what)[1:] == ["0.5", "≥ 2", "**missed**"]
    update = ["2.50", "2.50", "2.50", "3.00", "400", "62%", "10.00"]
    assert cells(page, "update", "default", "fastlora bfloat16 mb16")[3:] == update
    assert cells(page, "`swiglu`", "[7, 5]", "float32", "cpp")[4:] == ["2.000", "2.000", "2.000", "0", "5.0", "50% of copy", "4.00"]
    assert cells(page, "rank", "fastlora bfloat16 mb16", "64")[3:] == ["64 GFLOP", "8", "8", "8", "1.00", ""]
    assert cells(page, "plain")[1:] == ["3.00 s (75%)", "1.00 s (25%)", "4.00 s"]
    assert "Test CPU, 2 threads" in page


def test_every_figure_is_there_labelled_and_reproducible(tmp_path: Path) -> None:
    write_all(tmp_path / "results")
    page = page_of(tmp_path / "results", tmp_path / "docs")
    figures = re.findall(r"\]\(([\w-]+\.svg)\)", page)
    assert len(figures) == 5
    drawn = {name: (tmp_path / "docs" / name).read_bytes() for name in figures}
    assert page_of(tmp_path / "results", tmp_path / "again") == page
    assert all((tmp_path / "again" / name).read_bytes() == image for name, image in drawn.items())
    labels = re.findall(r"<!-- (.*?) -->", drawn["test-cpu-scaling.svg"].decode())  # matplotlib writes each text as a comment, too
    assert {"rank of all modules", "seconds", "peak of the process, GiB", "optimizer state, MB"} <= set(labels)
    assert any("Test CPU" in label for label in labels)


def test_a_card_has_a_section_of_its_own_with_reasons_for_missing_times(tmp_path: Path) -> None:
    write_all(tmp_path / "results")
    common = {"op": "swiglu", "model": "Qwen3-8B", "shape": "[8192, 12288]", "dtype": "bfloat16", "device": "NVIDIA H100", "commit": "abc"}
    timed = {**timing([2e-4] * 3, flops=1e12, nbytes=4e8), "share_of_peak": 0.75, "x_baseline": 2.5, "refused": None}
    rows = [
        {**common, "implementation": "liger", **timed},
        {**common, "implementation": "cpp", "median": None, "refused": "it runs on the CPU"},
    ]
    append_rows(rows, tmp_path / "results" / "nvidia-h100" / "gpu.jsonl")
    page = page_of(tmp_path / "results", tmp_path / "docs")
    place = ("`swiglu`", "Qwen3-8B", "[8192, 12288]", "bfloat16")
    assert cells(page, *place, "liger")[5:] == ["0.200", "0.200", "0.200", "5000", "2000", "75%", "2.50"]
    assert cells(page, *place, "cpp")[5] == "it runs on the CPU"
    assert "## NVIDIA H100\n" in page and page.count("Not measured on this device") == 0


def test_what_is_not_measured_is_said(tmp_path: Path) -> None:
    append_rows(ops_rows(), tmp_path / "results" / "test-cpu" / "ops.jsonl")
    page = page_of(tmp_path / "results", tmp_path / "docs")
    assert page.count("Not measured on this device") == 5
    assert "`python -m bench.scaling`" in page


def test_no_rows_at_all_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--results", str(tmp_path), "--docs", str(tmp_path / "docs")])
    assert "make bench" in capsys.readouterr().err
    assert not (tmp_path / "docs").exists()


def test_current_rows_are_the_last_of_the_last_commit(tmp_path: Path) -> None:
    path = tmp_path / "device" / "ops.jsonl"
    row = {"op": "swiglu", "implementation": "cpp", "dtype": "float32", "shape": "[1]"}
    append_rows([{**row, "commit": "a", "median": 1.0}, {**row, "commit": "a", "median": 2.0, "dtype": "bfloat16"}], path)
    append_rows([{**row, "commit": "b", "median": 3.0}], path)
    append_rows([{**row, "commit": "b", "median": 4.0}], path)
    assert [found["median"] for found in current(read_rows(path))] == [4.0]
    assert read_rows(tmp_path / "none.jsonl") == []


def test_timing() -> None:
    found = timing([4.0, 1.0, 2.0, 3.0, 5.0], flops=6e9, nbytes=3e9)
    assert found == pytest.approx({"median": 3.0, "p20": 1.8, "p80": 4.2, "gflop_per_s": 2.0, "gb_per_s": 1.0})
    assert timing([1.0])["gflop_per_s"] is None


def test_readme_has_the_targets_of_the_committed_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--readme"]) == 0
    begin, end = "<!-- bench: python -m bench.figures --readme -->\n\n", "\n<!-- bench end -->"
    assert (REPOSITORY / "README.md").read_text().split(begin)[1].split(end)[0] == capsys.readouterr().out
