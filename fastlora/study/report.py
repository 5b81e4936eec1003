"""One report a study: `report.html` (one self-contained page), `report.md` (GitHub's Markdown, pictures as SVG files), a CSV a table.

Both begin with what a reader may conclude, what not, and the setting; the verdicts come next, then tables and figures. What models, data
sets and configs wrote is escaped. Equal reports give equal bytes.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from fastlora.analysis.theme import svg_element, svg_file
from fastlora.atomic import atomic_write_text
from fastlora.study.claims import Claim

HTML_FILE = "report.html"
MARKDOWN_FILE = "report.md"

REQUIRED_SETTING = ("command", "commit", "machine", "items", "seeds", "scale")
"""Without these nobody can repeat a study or judge its numbers."""

FILE_STEM = re.compile(r"[a-z0-9][a-z0-9-]*")

Value = str | float | int | None


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of numbers and words; a published number stands in a column beside ours."""

    name: str
    """File stem of its CSV."""
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]
    """None = nothing was measured or published."""
    note: str = ""

    def __post_init__(self) -> None:
        """Raises ValueError for a name that is no file stem, columns of one name, or a row of another length."""
        _check_stem(self.name)
        if repeated := _repeated(self.columns):
            raise ValueError(f"table {self.name}: two columns are called {repeated[0]}")
        for number, row in enumerate(self.rows, start=1):
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.name}, row {number}: {len(row)} values for {len(self.columns)} columns")

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Per column: it holds numbers and nothing else."""
        return tuple(
            any(row[i] is not None for row in self.rows) and not any(isinstance(row[i], str | bool) for row in self.rows)
            for i in range(len(self.columns))
        )


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure in the style of fastlora.analysis.theme; fastlora.study.pictures draws them."""

    name: str
    """File stem of its SVG."""
    title: str
    figure: Figure
    caption: str

    def __post_init__(self) -> None:
        """Raises ValueError for a name that is no file stem."""
        _check_stem(self.name)


@dataclass(frozen=True, slots=True)
class StudyReport:
    """All that a study has to say."""

    title: str
    study: str
    """Name on the command line: "rank-allocation"."""
    may_conclude: tuple[str, ...]
    """Sentences; `fastlora.study.claims.conclusions` makes them from the verdicts."""
    may_not_conclude: tuple[str, ...]
    claims: tuple[Claim, ...]
    tables: tuple[Table, ...]
    pictures: tuple[Picture, ...]
    setting: Mapping[str, str]
    """`REQUIRED_SETTING` and whatever else decides the numbers."""

    def __post_init__(self) -> None:
        """Raises ValueError for a setting that lacks something, a report without a limit to its conclusions, two files of one name."""
        if missing := [key for key in REQUIRED_SETTING if not self.setting.get(key)]:
            raise ValueError(f"{self.study}: the report's setting lacks {', '.join(missing)}")
        if not self.may_not_conclude:
            raise ValueError(f"{self.study}: the report must say what may not be concluded from it; its scale alone is a limit")
        for kind, names in (("tables", [table.name for table in self.tables]), ("pictures", [one.name for one in self.pictures])):
            if repeated := _repeated(names):
                raise ValueError(f"{self.study}: two {kind} are called {repeated[0]}")


def write_study_report(report: StudyReport, folder: Path) -> tuple[Path, Path, tuple[Path, ...]]:
    """Writes everything into `folder` (made if missing): (HTML, Markdown, CSVs). The two pages are written last."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in report.pictures:
        atomic_write_text(folder / f"{picture.name}.svg", svg_file(picture.figure, salt=picture.name))
    tables = tuple(folder / f"{table.name}.csv" for table in report.tables)
    for path, table in zip(tables, report.tables, strict=True):
        atomic_write_text(path, render_csv(table))
    atomic_write_text(folder / MARKDOWN_FILE, render_markdown(report))
    atomic_write_text(folder / HTML_FILE, render_html(report))
    return folder / HTML_FILE, folder / MARKDOWN_FILE, tables


def render_html(report: StudyReport) -> str:
    """The page."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("fastlora.study", package_path=""), PackageLoader("fastlora.analysis", package_path="")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = shown
    return environment.get_template("study.html.j2").render(
        report=report,
        svg={picture.name: Markup(svg_element(picture.figure, salt=picture.name)) for picture in report.pictures},
        tally=Counter(claim.verdict for claim in report.claims),
    )


def render_markdown(report: StudyReport) -> str:
    """GitHub's Markdown. Lines 3, 5 and 7 are what a reader may conclude, what not, and the setting."""
    setting = "; ".join(f"{key} {_code(value)}" for key, value in report.setting.items())
    blocks = [
        f"# {_text(report.title)}",
        f"**A reader may conclude:** {_sentences(report.may_conclude) or 'nothing.'}",
        f"**A reader may not conclude:** {_sentences(report.may_not_conclude)}",
        f"**Setting:** {setting}.",
        "## Verdicts",
    ]
    if report.claims:
        header = ("verdict", "claim", "published", "measured here", "test", "kind", "source")
        rows = [(f"**{c.verdict}**", *map(_text, (c.text, c.published, c.measured, c.test, c.kind, c.source))) for c in report.claims]
        blocks.append(_pipes(header, (False,) * len(header), rows))
    else:
        blocks.append("No claim was tested.")
    for table in report.tables:
        rows = [tuple(_text(shown(value)) for value in row) for row in table.rows]
        blocks += [f"## {_text(table.title)}", _pipes(tuple(map(_text, table.columns)), table.numeric, rows)]
        blocks.append(f"{_text(table.note)} [{table.name}.csv]({table.name}.csv)".strip())
    for picture in report.pictures:
        blocks += [f"## {_text(picture.title)}", f"![{_text(picture.title)}]({picture.name}.svg)", _text(picture.caption)]
    return "\n\n".join(blocks) + "\n"


def render_csv(table: Table) -> str:
    """Numbers in full; an empty field where nothing was measured."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows(table.rows)
    return text.getvalue()


def shown(value: Value) -> str:
    """A cell in print: four significant digits, thousands apart, a true minus; "–" for what is missing or not a number."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    whole = isinstance(value, int) or abs(value) >= 1000
    return (f"{value:,.0f}" if whole else f"{value:.4g}").replace("-", "−")


def _pipes(header: tuple[str, ...], numeric: tuple[bool, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A table whose cells are Markdown already."""
    rule = tuple("--:" if right else "---" for right in numeric)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def _sentences(sentences: tuple[str, ...]) -> str:
    """On one line, numbered if there are several."""
    plain = [_text(sentence).rstrip(".") + "." for sentence in sentences]
    return plain[0] if len(plain) == 1 else " ".join(f"({i}) {sentence}" for i, sentence in enumerate(plain, start=1))


def _text(text: str) -> str:
    """Words on one line in which nothing is Markdown or HTML."""
    line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", line)


def _code(text: str) -> str:
    """A code span; its fence is longer than any run of backticks inside."""
    line = " ".join(text.split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"


def _check_stem(name: str) -> None:
    if not FILE_STEM.fullmatch(name):
        raise ValueError(f"{name!r} names a file of the report: lower-case letters, digits and hyphens only")


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, times in Counter(names).items() if times > 1]
