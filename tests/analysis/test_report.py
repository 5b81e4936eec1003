"""The report: one well-formed page that fetches nothing, escapes what models write, and prints the numbers of the run."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pytest

from fastlora.alarms import Alarm
from fastlora.analysis.figures import MISMATCH, panels_of
from fastlora.analysis.report import EXAMPLES, answer_pairs, change_of_accuracy, render_report, time_facts, write_report
from fastlora.analysis.run_reader import Run, read_run
from fastlora.metrics import GRADIENT_PROFILE_SCHEMA
from tests.analysis.synthetic_run import HOSTILE, make_run

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Tags balanced, ids, links, and the text of the elements of each class."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            if name == "id":
                self.ids[value or ""] += 1
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.links.append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"[ \n]+", " ", "".join(self.words))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return read_run(make_run(tmp_path_factory.mktemp("runs") / "sums & <more>", layers=4, steps=12, problems=64))


@pytest.fixture(scope="module")
def html(run: Run) -> str:
    return render_report(run)


def test_the_page_stands_alone(html: str) -> None:
    page = Page(html)
    assert page.links, "heat maps are inline images"
    assert [link[:40] for link in page.links if not link.startswith(("data:image/png;base64,", "#"))] == []
    assert re.findall(r"url\((?!#)[^)]*\)", html) == []
    assert page.tags["script"] == page.tags["link"] == page.tags["iframe"] == 0
    assert "@import" not in html


def test_what_models_write_is_escaped(html: str) -> None:
    assert "<script" not in html
    assert Page(html).text.count(re.sub(r"[ \n]+", " ", HOSTILE)) == 2 + 4, "before, after, and four training samples, as text"
    assert "<h1>sums &amp; &lt;more&gt;</h1>" in html


def test_figures_are_well_formed_with_colours_of_the_page(html: str) -> None:
    figures = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(figures) == 8
    for figure in figures:
        ElementTree.fromstring(figure)
    assert "#01fe" not in html, "a placeholder colour was left"
    assert set(re.findall(r"var\(--([\w-]+)\)", html)) <= set(re.findall(r"--([\w-]+):", html)), "a colour without a definition"
    assert [name for name, count in Page(html).ids.items() if count > 1] == []


def test_the_headline_is_the_summary(run: Run, html: str) -> None:
    s, text = run.summary, Page(html).text
    before = sum(answer.correct for answer in run.eval_before) / 64
    after = sum(answer.correct for answer in run.eval_after) / 64
    gained = sum(b.correct < a.correct for b, a in zip(run.eval_before, run.eval_after, strict=True))
    lost = sum(b.correct > a.correct for b, a in zip(run.eval_before, run.eval_after, strict=True))
    for fact in (
        f"{before:.1%} → {after:.1%}",
        f"{100 * (after - before):+.1f} points, 95% interval",
        f"{gained} gained, {lost} lost of 64; exact McNemar",
        f"{s.train_seconds / 60:.1f} min",
        "3.05 GiB",
        f"{s.trainable_parameters:,}".replace(",", "\u202f"),
        f"commit {str(run.environment['commit'])[:10]}",
        "trainer.steps",
        f"torch {run.environment['packages']['torch']}",
    ):
        assert fact in text, fact


def test_examples_are_the_first_of_each_kind(run: Run, html: str) -> None:
    expected = []
    for kind, number in EXAMPLES.items():
        expected += [pair.before.index for pair in answer_pairs(run) if pair.kind == kind][:number]
    assert [int(index) for index in re.findall(r"problem (\d+) ·", html)] == expected
    kinds = {pair.before.index: pair.kind for pair in answer_pairs(run)}
    for before, after in zip(run.eval_before, run.eval_after, strict=True):
        right = {"gained": (False, True), "lost": (True, False), "wrong": (False, False), "right": (True, True)}
        assert right[kinds[before.index]] == (before.correct, after.correct)


def test_time_shares_are_those_of_the_rows(run: Run) -> None:
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_bytes().splitlines()]
    total = sum(value for row in rows for name, value in row.items() if name.startswith("seconds/"))
    for stage, share in time_facts(run).items():
        assert share == pytest.approx(sum(row[f"seconds/{stage}"] for row in rows) / total)


@pytest.mark.parametrize(
    ("interval", "p_value", "change"),
    [
        ((0.01, 0.2), 0.03, "rose"),
        ((-0.2, -0.01), 0.03, "fell"),
        ((-0.01, 0.2), 0.03, "did not change"),
        ((0.01, 0.2), 0.06, "did not change"),
    ],
)
def test_a_change_needs_interval_and_test(run: Run, interval: tuple[float, float], p_value: float, change: str) -> None:
    summary = dataclasses.replace(run.summary, accuracy_gain_interval=interval, mcnemar_p=p_value)
    assert change_of_accuracy(summary) == change


def test_every_changing_metric_is_drawn_and_every_constant_one_named(run: Run, html: str) -> None:
    assert "reward/timeouts" in html, "constant: named in the caption"
    odd = dataclasses.replace(run, metrics={**run.metrics, "mismatch_kl": run.metrics["kl"]})
    assert "mismatch_kl" in render_report(odd), "a metric without a panel of its own gets one"


def test_a_sampler_that_is_not_the_trainer_has_a_figure(run: Run, html: str) -> None:
    """Four sizes and the KL in one figure and nowhere else; places, ratio and share among the panels. Zeros and gaps do no harm."""
    assert "Sampler and trainer" not in html
    size = run.metrics["kl"]
    drawn = {name: factor * size for factor, name in enumerate((*MISMATCH, "mismatch_kl"))}  # the median is 0 throughout
    drawn["mismatch/abs_max"] = np.where(run.metrics["step"] == 3, np.nan, drawn["mismatch/abs_max"])
    panels = {f"mismatch/{name}": size for name in ("first_third", "last_third", "ratio_mean", "corrected")}
    other = dataclasses.replace(run, metrics={**run.metrics, **drawn, **panels})
    page = Page(render_report(other))
    assert page.tags["svg"] == Page(html).tags["svg"] + 1
    assert "Sampler and trainer" in page.text and "Correction: none." in page.text
    titles = {panel.title: panel.names for panel in panels_of(other)}
    assert titles["Mismatch by place"] == ("mismatch/first_third", "mismatch/last_third")
    assert titles["Ratio to the sampler"] == ("mismatch/ratio_mean",) and "Ratios corrected" in titles
    assert not {*drawn} & {name for names in titles.values() for name in names}


def test_alarms_are_listed_and_marked_on_their_panel(run: Run, html: str) -> None:
    """One on a metric with a panel, one on a metric that never changes: two rows, one mark."""
    assert "<h2>Alarms</h2>" not in html and "var(--bad)" not in "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    alarms = (
        Alarm(5, "entropy", "entropy", 0.0123456, 0.02, "below", 3, "warn"),
        Alarm(9, "zero_std", "reward/timeouts", None, 1.0, "above", 9, "stop"),
    )
    page = render_report(dataclasses.replace(run, alarms=alarms))
    (table,) = re.findall(r'<table class="alarms">.*?</table>', page, flags=re.DOTALL)
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in table.split("<tr>")[2:]]
    assert cells == [
        ["5", "<code>entropy</code>", "0.01235", "at or below 0.02", "3", "warn"],
        ["9", "<code>reward/timeouts</code>", "infinite", "at or above 1", "9", "stop"],
    ]
    (panels,) = re.findall(r'<figure class="metrics".*?</figure>', page, flags=re.DOTALL)
    assert panels.count("var(--bad)") == 1


def test_the_gradient_table_has_a_row_a_measure(run: Run, html: str) -> None:
    """Shares, ratio and correlation from the rows of the file, by a plain loop."""
    squares: dict[tuple[int, int], float] = {}
    for row in run.gradient_profile.to_pylist():
        key = (row["layer"], row["step"])
        squares[key] = squares.get(key, 0.0) + row["norm"] ** 2
    totals = {step: sum(math.sqrt(value) for (_, s), value in squares.items() if s == step) for step in range(1, 13)}
    shares = [[math.sqrt(squares[layer, step]) / totals[step] for step in range(1, 13)] for layer in range(4)]
    means = sorted(sum(of_layer) / 12 for of_layer in shares)
    early_late = np.corrcoef([sum(s[:4]) for s in shares], [sum(s[8:]) for s in shares])[0, 1]
    expected = ["‖g‖", f"{means[-1] / means[0]:.2f}", f"{100 * (means[-1] + means[-2]):.1f}%", f"{early_late:.3f}"]  # 30% of 4 layers is 2
    (row,) = re.findall(r"<tr>(<td>‖g‖</td>.*?)</tr>", html)
    assert re.findall(r"<td[^>]*>(.*?)</td>", row) == expected
    assert "‖∂L/∂ΔW‖" in Page(html).text
    profile = run.gradient_profile
    masked = profile.set_column(7, profile.schema.field("delta_w_norm"), pa.nulls(profile.num_rows, pa.float32()))
    page = Page(render_report(dataclasses.replace(run, gradient_profile=masked)))
    assert page.tags["svg"] == 7 and "estimated norm" not in page.text


@pytest.mark.parametrize(
    ("case", "verdict"),
    [
        ({"learns": False}, "did not change measurably. The gain that the config requires was not reached"),
        ({"objective": "sft"}, "rose"),
        ({"steps": 1}, "After 1 step, greedy accuracy"),
        ({"layers": 1, "steps": 2}, "rose"),
    ],
)
def test_other_runs_have_a_report_too(tmp_path: Path, case: dict[str, object], verdict: str) -> None:
    folder = make_run(tmp_path / "run", **{"layers": 2, "steps": 11, "problems": 200, **case})  # type: ignore[arg-type]
    assert verdict in Page(write_report(folder).read_text()).text


def test_full_fine_tuning_has_no_ranks_and_no_adapter_gradient(run: Run) -> None:
    full = dataclasses.replace(
        run,
        summary=dataclasses.replace(run.summary, rank_pattern={}, learned=None),
        gradient_profile=GRADIENT_PROFILE_SCHEMA.empty_table(),
        completions=(),
    )
    page = Page(render_report(full))
    assert page.tags["svg"] == 4
    assert "Rank pattern" not in page.text
    assert "Where the gradient goes" not in page.text


def test_command_line_names_what_is_missing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastlora.analysis.report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "is no run folder: it has no config.json" in done.stderr
    assert "Traceback" not in done.stderr
