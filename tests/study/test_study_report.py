"""The report of a study: both pages begin with the conclusions, hold every number, and escape every word."""

from __future__ import annotations

import csv
import dataclasses
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from xml.etree import ElementTree

import markdown_it
import pytest
from matplotlib.figure import Figure

from fastlora.study.report import REQUIRED_SETTING, Picture, StudyReport, Table, render_csv, shown, write_study_report
from tests.analysis.test_report import Page
from tests.study.sample_report import HOSTILE, sample_report

FILES = ("report.html", "report.md", "accuracy.csv", "odd.csv")


@pytest.fixture(scope="module")
def report() -> StudyReport:
    return sample_report()


@pytest.fixture(scope="module")
def folder(report: StudyReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "new" / "folder"
    html, markdown, csvs = write_study_report(report, folder)
    assert tuple(path.name for path in (html, markdown, *csvs)) == FILES
    return folder


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    return (folder / "report.html").read_text()


@pytest.fixture(scope="module")
def markdown(folder: Path) -> str:
    return (folder / "report.md").read_text()


@pytest.fixture(scope="module")
def rendered(markdown: str) -> str:
    """As GitHub shows it: tables, and HTML blocks let through."""
    return markdown_it.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown)


def words(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def test_nothing_else_lies_in_the_folder(report: StudyReport, folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {*FILES, *(f"{picture.name}.svg" for picture in report.pictures)}


def test_the_page_stands_alone(html: str, report: StudyReport) -> None:
    page = Page(html)
    assert [link[:40] for link in page.links if not link.startswith(("data:image/png;base64,", "#"))] == []
    assert re.findall(r"url\((?!#)[^)]*\)", html) == []
    assert page.tags["script"] == page.tags["link"] == page.tags["iframe"] == 0
    assert page.tags["svg"] == len(report.pictures)
    assert [name for name, count in page.ids.items() if count > 1] == []
    assert set(re.findall(r"var\(--([\w-]+)\)", html)) <= set(re.findall(r"--([\w-]+):", html)), "a colour without a definition"
    assert "#01fe" not in html, "a placeholder colour was left"
    assert 'name="viewport"' in html


def test_the_first_ten_lines_say_what_a_reader_may_conclude(report: StudyReport, html: str, markdown: str) -> None:
    head = "\n".join(markdown.splitlines()[:10])
    for sentences, opening in ((report.may_conclude, "A reader may conclude"), (report.may_not_conclude, "A reader may not conclude")):
        assert opening in head
        assert head.count("Undecided") == sum(sentence.startswith("Undecided") for sentence in report.may_not_conclude) >= 1
        assert len(sentences) == len(re.findall(r"\(\d\) ", next(line for line in head.splitlines() if f"**{opening}:**" in line)))
    for value in report.setting.values():
        assert value in head, value
    text = words(Page(html).text)
    before_verdicts = text[: text.index("Verdicts")]
    for sentence in (*report.may_conclude, *report.may_not_conclude, *report.setting.values()):
        assert words(sentence) in before_verdicts
    assert markdown.index("## Verdicts") < markdown.index("## Held-out accuracy")
    assert html.index("<h2>Verdicts</h2>") < html.index("<h2>Held-out accuracy")


def test_every_verdict_stands_beside_its_claim_and_test(report: StudyReport, html: str, rendered: str) -> None:
    rows = [words(row) for row in re.findall(r'<tr><td><span class="verdict .*?</tr>', html, re.DOTALL)]
    markdown_rows = re.findall(r"<tr>\s*<td><strong>(.*?)</strong></td>(.*?)</tr>", rendered, re.DOTALL)
    assert len(rows) == len(markdown_rows) == len(report.claims)
    for claim, row, (verdict, rest) in zip(report.claims, rows, markdown_rows, strict=True):
        assert verdict == claim.verdict
        for part in (claim.text, claim.source, claim.published, claim.measured, claim.test, claim.kind):
            assert words(part) in words(Page(f"<table>{row}</table>").text), part
            assert words(part) in words(Page(f"<table>{rest}</table>").text), part
    assert "2 supported, 1 not supported, 2 undecided" in Page(html).text


def cells(page: str) -> Iterator[list[str]]:
    for row in re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL):
        yield [words(Page(cell).text) for cell in re.findall(r"(<t[dh].*?</t[dh]>)", row, re.DOTALL)]


def test_tables_are_the_same_in_all_three_files(report: StudyReport, folder: Path, html: str, rendered: str) -> None:
    for table, page in product(report.tables, (html, rendered)):
        expected = [[words(shown(value)) for value in row] for row in (table.columns, *table.rows)]
        found = list(cells(page))
        start = found.index(expected[0])
        assert found[start : start + len(expected)] == expected
    for table in report.tables:
        with (folder / f"{table.name}.csv").open(newline="") as file:
            header, *rows = csv.reader(file)
        assert tuple(header) == table.columns
        for read, row in zip(rows, table.rows, strict=True):
            for text, value in zip(read, row, strict=True):
                assert text == "" if value is None else type(value)(text) == value or value != value


def test_words_stay_words(html: str, rendered: str) -> None:
    for page in (html, rendered):
        assert "<script" not in page
        assert Page(page.replace("<img", "<br")).text.count(HOSTILE) >= 3
    assert "<em>star" not in rendered and "<code>tick" not in rendered


def test_pictures_are_files_that_hold_themselves(report: StudyReport, folder: Path, markdown: str) -> None:
    for picture in report.pictures:
        svg = (folder / f"{picture.name}.svg").read_text()
        ElementTree.fromstring(svg)
        assert f"({picture.name}.svg)" in markdown
        assert "var(--" not in svg and "#01fe" not in svg
        assert "dc:date" not in svg and re.search(r"\b20\d\d-\d\d-\d\d", svg) is None


def test_equal_reports_are_equal_bytes(folder: Path, tmp_path: Path) -> None:
    write_study_report(sample_report(), tmp_path)
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (float("nan"), "–"), (0, "0"), (36_929_536, "36,929,536"), (-3, "−3"), (0.97, "0.97"), (0.123456, "0.1235"),
        (999.94, "999.9"), (1234.5, "1,234"), (-1.5e-7, "−1.5e−07"), (True, "yes"), ("a-b", "a-b"),
    ],
)  # fmt: skip
def test_values_in_print(value: str | float | None, text: str) -> None:
    assert shown(value) == text


def test_columns_of_numbers_stand_right() -> None:
    table = Table("t", "t", ("a", "b", "c", "d"), ((1, None, None, "x"), (None, 0.5, None, 1)))
    assert table.numeric == (True, True, False, False)
    assert render_csv(table) == "a,b,c,d\n1,,,x\n,0.5,,1\n"


def test_what_a_report_cannot_be(report: StudyReport) -> None:
    for key in REQUIRED_SETTING:
        with pytest.raises(ValueError, match=f"setting lacks {key}"):
            dataclasses.replace(report, setting={name: value for name, value in report.setting.items() if name != key})
    with pytest.raises(ValueError, match="must say what may not be concluded"):
        dataclasses.replace(report, may_not_conclude=())
    with pytest.raises(ValueError, match="two tables are called accuracy"):
        dataclasses.replace(report, tables=report.tables[:1] * 2)
    with pytest.raises(ValueError, match="two pictures are called heat"):
        dataclasses.replace(report, pictures=report.pictures[:1] * 2)
    with pytest.raises(ValueError, match="names a file of the report"):
        Picture("../heat", "t", Figure(), "")
    with pytest.raises(ValueError, match="table t, row 2: 1 values for 2 columns"):
        Table("t", "t", ("a", "b"), ((1, 2), (1,)))
    with pytest.raises(ValueError, match="two columns are called a"):
        Table("t", "t", ("a", "a"), ())


def test_a_report_without_claims_says_so(report: StudyReport, tmp_path: Path) -> None:
    html, markdown, _ = write_study_report(dataclasses.replace(report, claims=(), may_conclude=(), pictures=()), tmp_path)
    assert "No claim was tested." in html.read_text() and "No claim was tested." in markdown.read_text()
    assert "**A reader may conclude:** nothing." in markdown.read_text()
