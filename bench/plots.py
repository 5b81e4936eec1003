"""The figures of docs/bench, each from result rows. SVG without date or random ids: the same rows give the same bytes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from bench.report import GIB
from bench.rows import Row

STYLE = {
    "svg.hashsalt": "fastlora", "font.size": 9, "axes.titlesize": 9.5, "axes.titlelocation": "left", "axes.spines.top": False,
    "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": True, "grid.color": "#dddddd", "legend.frameon": False,
    "figure.facecolor": "white",
}  # fmt: skip
OURS, OTHERS, WORK = "#1f6fb4", "#b0b0b0", "#d9822b"
BAR_INCHES = 0.24

AXIS_LABELS = {
    "group size": "completions a prompt (16 in all)",
    "rank": "rank of all modules",
    "completion tokens": "tokens of a completion",
    "vocabulary": "vocabulary (tokens), head alone",
    "trainable entries": "trainable entries of B, optimizer alone",
}


def save(figure: Figure, path: Path) -> None:
    """As SVG."""
    with mpl.rc_context(STYLE):
        figure.savefig(path, metadata={"Date": None})


def _title(rows: Sequence[Row], what: str) -> str:
    return f"{what}: {rows[0]['device']}, {rows[0]['threads']} threads"


@mpl.rc_context(STYLE)
def contenders_figure(rows: Sequence[Row]) -> Figure:
    """Horizontal bars, seconds, of the update and of the whole step; the fastest on top."""
    kinds = list(dict.fromkeys(row["op"] for row in rows))
    fastest = {op: {r["implementation"]: r for r in sorted(rows, key=lambda r: -r["median"]) if r["op"] == op} for op in kinds}
    heights = [len(found) for found in fastest.values()]
    figure = Figure(figsize=(9, 1.0 + BAR_INCHES * sum(heights) + 0.5 * len(kinds)), layout="constrained")
    figure.suptitle(_title(rows, "Median seconds, p20 to p80"))
    panels = figure.subplots(len(kinds), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (op, found) in zip(panels, fastest.items(), strict=True):
        bars = sorted(found.values(), key=lambda row: -row["median"])
        spread = [[row["median"] - row["p20"] for row in bars], [row["p80"] - row["median"] for row in bars]]
        colours = [OURS if row["implementation"].startswith("fastlora") else OTHERS for row in bars]
        axes.barh([row["implementation"] for row in bars], [row["median"] for row in bars], xerr=spread, color=colours)
        axes.set(title=op.partition(".")[2], xlabel="seconds")
        axes.grid(axis="y", visible=False)
    return figure


@mpl.rc_context(STYLE)
def ops_figure(rows: Sequence[Row]) -> Figure:
    """× reference of every implementation but the reference, one bar each, log axis; 1 is the reference."""
    faster = [row for row in rows if row["implementation"] != "reference"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in faster))
    names = list(dict.fromkeys((row["op"], row["shape"], row["implementation"]) for row in faster))
    figure = Figure(figsize=(9, 1.2 + BAR_INCHES * len(names)), layout="constrained")
    figure.suptitle(_title(rows, "Speed of the ops"))
    axes = figure.subplots()
    for index, dtype in enumerate(dtypes):
        bars = [row for row in faster if row["dtype"] == dtype]
        places = [names.index((row["op"], row["shape"], row["implementation"])) + 0.38 * (index - (len(dtypes) - 1) / 2) for row in bars]
        axes.barh(places, [row["x_baseline"] for row in bars], height=0.36, label=dtype, color=(OURS, OTHERS)[index % 2])
    shapes = Counter(op for op, _, _ in names)
    labels = [f"{op} {shape.split(':')[0]} ({name})" if shapes[op] > 1 else f"{op} ({name})" for op, shape, name in names]
    axes.set_yticks(range(len(names)), labels, fontsize=8)
    axes.set(xlabel="× reference (median over median, log)", xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.legend()
    return figure


@mpl.rc_context(STYLE)
def scaling_figure(rows: Sequence[Row]) -> Figure:
    """A column for each axis: seconds above, with the predicted work scaled to the first point; below, memory where it was measured."""
    by_axis: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_axis[row["axis"]].append(row)
    figure = Figure(figsize=(3.1 * len(by_axis), 5.6), layout="constrained")
    figure.suptitle(
        _title(rows, "Growth of time and memory; dashed: in proportion to the predicted work (FLOPs, or the optimizer's bytes)")
    )
    panels = figure.subplots(2, len(by_axis), squeeze=False)
    for column, (axis, found) in enumerate(by_axis.items()):
        _draw_time(panels[0, column], found)
        _draw_memory(panels[1, column], found)
        for axes in panels[:, column]:
            axes.set(xlabel=AXIS_LABELS[axis], xscale="log")
    panels[0, 0].legend(fontsize=7.5)
    return figure


def _series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["value"]):
        found[row["implementation"]].append(row)
    return found


def _draw_time(axes: Axes, rows: Sequence[Row]) -> None:
    for (name, line), marker in zip(_series(rows).items(), "os^D", strict=False):
        values, seconds = [row["value"] for row in line], [row["median"] for row in line]
        work = [row.get("gflop", row.get("gb")) for row in line]
        spread = [[row["median"] - row["p20"] for row in line], [row["p80"] - row["median"] for row in line]]
        axes.errorbar(values, seconds, yerr=spread, marker=marker, markersize=4, color=OURS, label=name)
        axes.plot(values, [seconds[0] * w / work[0] for w in work], "--", color=WORK, label="predicted")
    axes.set(ylabel="seconds", yscale="log", title=rows[0]["axis"])
    if len(_series(rows)) > 1:
        axes.legend(fontsize=7.5)


def _draw_memory(axes: Axes, rows: Sequence[Row]) -> None:
    if "state_bytes" in rows[0]:
        values, label = [row["state_bytes"] / 1e6 for row in rows], "optimizer state, MB"
        axes.set_yscale("log")
    elif rows[0]["peak_bytes"] is not None:
        values, label = [row["peak_bytes"] / GIB for row in rows], "peak of the process, GiB"
    else:
        axes.set_visible(False)
        return
    axes.plot([row["value"] for row in rows], values, "o-", markersize=4, color=OURS)
    axes.set_ylabel(label)
    axes.set_ylim(bottom=None if "state_bytes" in rows[0] else 0)


@mpl.rc_context(STYLE)
def split_figure(rows: Sequence[Row]) -> Figure:
    """One stacked bar for each contender, seconds by kind of op."""
    figure = Figure(figsize=(9, 1.3 + 0.45 * len(rows)), layout="constrained")
    figure.suptitle(_title(rows, "Time of one update"))
    axes = figure.subplots()
    names, colours = [row["implementation"] for row in rows], mpl.colormaps["tab10"].colors
    left = [0.0] * len(rows)
    for index, label in enumerate(rows[0]["seconds"]):
        widths = [row["seconds"][label] for row in rows]
        axes.barh(names, widths, left=left, label=label, color=OTHERS if label == "rest" else colours[index])
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set(xlabel="seconds, profiled")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.legend(ncols=6, loc="upper center", bbox_to_anchor=(0.45, -0.35), fontsize=7.5)
    return figure
