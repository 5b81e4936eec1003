"""One self-contained page about a finished run.

    python -m fastlora.analysis.report RUN_DIR      writes RUN_DIR/report.html

Nothing is fetched when it is opened: figures are inline SVG, style is inline. What a model or a data set wrote is escaped.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fastlora.analysis import figures
from fastlora.analysis.gradient_profile import has_gradient, layer_norms, measures
from fastlora.analysis.run_reader import Run, RunReadError, read_run
from fastlora.atomic import atomic_write_text
from fastlora.evaluate import Answer
from fastlora.metrics import MetricsError, RunSummary
from fastlora.progress import STAGES, format_p
from fastlora.statistics import paired_test

REPORT_FILE = "report.html"

EXAMPLES = {"gained": 3, "lost": 2, "wrong": 2, "right": 1}
"""How many example problems of each kind are shown: newly right, newly wrong, wrong twice, right twice."""

SAMPLES_SHOWN = 12
"""Completions sampled while training that are shown, the latest."""

SIGNIFICANCE = 0.05
"""Level of the paired test below which the page says that accuracy rose or fell; that of its 95% intervals."""

TOP_LAYERS = 0.3
"""Fraction of layers whose share of the gradient is quoted (the rank-allocation study's figure)."""

MAIN_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "safetensors")


@dataclass(frozen=True, slots=True)
class Pair:
    """One held-out problem, answered before and after training."""

    kind: str
    """gained, lost, wrong or right."""
    before: Answer
    after: Answer


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` into the run's folder. Raises RunReadError or MetricsError naming a missing or damaged file."""
    path = run_dir / REPORT_FILE
    atomic_write_text(path, render_report(read_run(run_dir)))
    return path


def render_report(run: Run) -> str:
    """The page."""
    environment = Environment(
        loader=PackageLoader("fastlora.analysis", package_path=""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "points": _points, "duration": _duration, "gib": _gib, "count": _count}
    pairs = answer_pairs(run)
    test = paired_test([pair.before.correct for pair in pairs], [pair.after.correct for pair in pairs])
    return environment.get_template("report.html.j2").render(
        run=run,
        summary=run.summary,
        test=test,
        change=change_of_accuracy(run.summary),
        verdict=verdict(run.summary, len(pairs)),
        p_value=format_p(run.summary.mcnemar_p),
        examples=list(_chosen(pairs)),
        samples=run.completions[-SAMPLES_SHOWN:],
        figures={name: Markup(svg) for name, svg in _figures(run).items()},
        constant=figures.constant_metrics(run),
        reallocations=list(reallocations(run)),
        gradient=gradient_facts(run) if has_gradient(run.gradient_profile) else None,
        top_layers=TOP_LAYERS,
        time=time_facts(run),
        ranks=list(run.summary.rank_pattern.values()),
        settings=list(_flat(run.config)),
        main_packages=MAIN_PACKAGES,
    )


def _figures(run: Run) -> dict[str, str]:
    """The run's figures by name; those of the adapter only where there is one."""
    drawn = {
        "accuracy": figures.accuracy_intervals(run),
        "learning": figures.learning_curves(run),
        "time": figures.time_split(run),
    }
    if figures.has_mismatch(run):
        drawn["mismatch"] = figures.mismatch(run)
    if figures.panels_of(run):
        drawn["metrics"] = figures.metric_panels(run)
    if run.summary.rank_pattern:
        drawn["ranks"] = figures.rank_matrix(run)
    if any(reallocations(run)):
        drawn["moves"] = figures.ranks_over_steps(run)
    if has_gradient(run.gradient_profile):
        drawn |= {"gradients": figures.gradient_heat_maps(run), "shares": figures.gradient_shares(run)}
        if "delta_w" in measures(run.gradient_profile):
            drawn["delta_w"] = figures.delta_w_heat_map(run)
    return drawn


def change_of_accuracy(summary: RunSummary) -> str:
    """The word "rose" or "fell" if the difference's interval excludes 0 and the exact test agrees, else "did not change"."""
    low, high = summary.accuracy_gain_interval
    if summary.mcnemar_p >= SIGNIFICANCE or low <= 0 <= high:
        return "did not change"
    return "rose" if low > 0 else "fell"


def verdict(summary: RunSummary, problems: int) -> str:
    """What happened to the accuracy, in words."""
    change = change_of_accuracy(summary)
    if change == "did not change":
        change += " measurably"
    steps = f"{summary.steps} step" + ("s" if summary.steps > 1 else "")
    sentence = f"After {steps}, greedy accuracy on the same {problems} held-out problems {change}."
    if summary.learned is not None:
        sentence += " The gain that the config requires was " + ("reached." if summary.learned else "not reached.")
    return sentence


def answer_pairs(run: Run) -> list[Pair]:
    """Every held-out problem with both answers."""
    kinds = {(False, True): "gained", (True, False): "lost", (False, False): "wrong", (True, True): "right"}
    return [
        Pair(kinds[before.correct, after.correct], before, after) for before, after in zip(run.eval_before, run.eval_after, strict=True)
    ]


def _chosen(pairs: list[Pair]) -> Iterator[Pair]:
    """The first problems of each kind, in the order of the split: chosen by position, not by how they look."""
    for kind, number in EXAMPLES.items():
        yield from [pair for pair in pairs if pair.kind == kind][:number]


@dataclass(frozen=True, slots=True)
class GradientFacts:
    """One row of the table below the shares."""

    measure: str
    """As the figures write it."""
    ratio: float
    """Largest share over smallest."""
    top: float
    """Share of the strongest `TOP_LAYERS`."""
    early_late: float | None
    """Correlation of the first third of the steps with the last; None below 3 steps or when shares are all alike."""


def gradient_facts(run: Run) -> list[GradientFacts]:
    """What the page says about the gradient's shares, by measure."""
    facts = []
    for measure in measures(run.gradient_profile):
        norms = layer_norms(run.gradient_profile, measure)
        early_late = norms.early_late_correlation if norms.shares_ls.shape[1] >= 3 else math.nan
        shown = early_late if math.isfinite(early_late) else None
        facts.append(GradientFacts(figures.MEASURES[measure], norms.share_ratio, norms.top_share(TOP_LAYERS), shown))
    return facts


def reallocations(run: Run) -> Iterator[dict[str, float]]:
    """After which steps ranks moved, by how much, and what that cut off; a metrics row has it of the step before."""
    moved = run.metrics.get("reallocation/moved_rank", np.array([]))
    for row in np.flatnonzero(np.isfinite(moved)):
        error = run.metrics["reallocation/delta_w_error"][row]
        yield {"after": run.metrics["step"][row] - 1, "moved": moved[row], "delta_w_error": error}


def time_facts(run: Run) -> dict[str, float]:
    """Share of each stage in the time of all steps."""
    seconds = {stage: float(np.nansum(run.metrics[f"seconds/{stage}"])) for stage in (*STAGES, "other")}
    return {stage: value / sum(seconds.values()) for stage, value in seconds.items()}


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Settings as dotted keys, the way the command line takes them."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "" if value is None else str(value)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}%"


def _points(fraction: float) -> str:
    """A difference of fractions in percentage points, signed, with a true minus."""
    return f"{100 * fraction:+.1f}".replace("-", "−")


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds < 6000 else str(timedelta(seconds=round(seconds)))


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _count(number: float) -> str:
    """Thousands set apart by narrow spaces that do not break."""
    return f"{number:,.0f}".replace(",", "\u202f")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m fastlora.analysis.report", description="Write report.html for a finished run.")
    parser.add_argument("run_dir", type=Path, help="folder of a finished run, such as runs/NAME")
    try:
        print(write_report(parser.parse_args().run_dir))
    except (RunReadError, MetricsError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
