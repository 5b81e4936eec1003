"""The figures that several studies need, from plain arrays; a study wraps them in `Picture`s.

    heat_maps      gradient norm by layer and step, a panel a run, one colour scale
    share_bars     each layer's share, a panel a strategy, with a prediction as a mark
    scatter_fits   y against x with least-squares line, Pearson's r and its 95 % interval (Fisher)
    against        estimates with intervals against rank or k, with a reference band
    intervals      estimates with intervals, one a line, a published number as a mark
    curves         several cells over the steps, a band over seeds
    stacked_shares parts of a whole, one bar a strategy

A series keeps its colour, marker and dash in all panels of a figure, so colour alone is never what tells two apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray
from scipy.stats import linregress

from fastlora.analysis.figures import draw_heat_map
from fastlora.analysis.gradient_profile import LayerNorms
from fastlora.analysis.theme import SERIES, THEME, WIDTH, styled, ticks
from fastlora.statistics import correlation
from fastlora.study.claims import HasInterval

Floats = NDArray[np.float64]

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1.5)), (0, (8, 2)), (0, (4, 1, 1, 1, 1, 1)), (0, (2, 3)))

MOST_SERIES = len(SERIES)
"""More than these no figure can tell apart."""

PERCENT = FuncFormatter(lambda fraction, _: f"{100 * fraction:g}%")
"""As many decimals as the tick needs."""

READABLE_SHARE = 0.055
"""A part of a bar smaller than this has no room for its number."""


@dataclass(frozen=True, slots=True)
class CurvePanel:
    """Some cells over the steps."""

    title: str
    y_label: str
    """With its unit."""
    steps: NDArray[np.int64]
    """[s], increasing."""
    curves: Mapping[str, Floats]
    """Name -> [seeds, s]; NaN where nothing was measured (accuracy every tenth step)."""
    log: bool = False
    percent: bool = False
    references: Mapping[str, float] = field(default_factory=dict)
    """Label -> height of a horizontal line."""


@styled
def heat_maps(norms: Mapping[str, LayerNorms], label: str) -> Figure:
    """Layer × step, a panel a name, two a row; one logarithmic colour scale. Raises ValueError if no norm is positive."""
    values = np.concatenate([one.norms_ls[one.norms_ls > 0] for one in norms.values()])  # NaN is not > 0
    if not len(values):
        raise ValueError(f"heat maps of {', '.join(norms)}: no norm is positive, there is nothing to draw")
    figure, axes = _grid(len(norms), columns=2, height=2.5, sharex=True, sharey=True)
    colors = LogNorm(values.min(), values.max())
    for ax, (name, one) in zip(axes, norms.items(), strict=True):
        image = draw_heat_map(ax, one, colors)
        ax.set(title=name, xlabel="step", ylabel="layer")
        ax.label_outer()
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.6, aspect=45, pad=0.02)
    bar.set_label(f"{label}, log scale")
    low, high = bar.mappable.get_clim()
    bar.ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))  # all nine of a decade would overlap
    bar.ax.xaxis.set_major_formatter("{x:.2g}")
    bar.ax.xaxis.set_minor_formatter(NullFormatter())
    for mesh in bar.ax.collections:
        mesh.set_rasterized(True)  # one image instead of 256 paths
    bar.outline.set_visible(False)
    return figure


@styled
def share_bars(layers: Sequence[int], shares: Mapping[str, Floats], predicted: Mapping[str, Floats]) -> Figure:
    """Each layer's share, a panel a strategy; `predicted` (√r, say) as a mark for the strategies that it has."""
    figure, axes = _grid(len(shares), columns=1, height=1.5, sharex=True, sharey=True)
    for ax, (name, share_l), color in zip(axes, shares.items(), _colors(shares), strict=True):
        ax.bar(layers, share_l, width=0.72, color=color, alpha=0.8, label="measured")
        if name in predicted:
            ax.plot(layers, predicted[name], linestyle="none", marker="_", markersize=9, markeredgewidth=2, color=THEME["ink"])
        ax.axhline(1 / len(layers), color=THEME["muted"], linewidth=1, linestyle=(0, (4, 3)))
        ax.set(title=name, ylabel="share of Σ norm")
        ax.yaxis.set_major_formatter(PERCENT)
        ax.yaxis.set_major_locator(ticks(4))
        ax.xaxis.set_major_locator(ticks(30))
        ax.margins(x=0.01)
        ax.grid(axis="x", visible=False)
    axes[-1].set_xlabel("layer")
    axes[-1].set_ylim(0, 1.06 * max(np.max(share_l) for share_l in (*shares.values(), *predicted.values())))
    figure.supxlabel("bar: measured · black mark: predicted · dashed: equal shares", fontsize=8.5, color=THEME["muted"], x=0.99, ha="right")
    return figure


@styled
def scatter_fits(groups: Mapping[str, tuple[Floats, Floats]], x_label: str, y_label: str) -> Figure:
    """y against x, a panel a name, three a row. A group whose x or y is constant has neither line nor r."""
    figure, axes = _grid(len(groups), columns=min(3, len(groups)), height=3.0, sharey=True)
    for ax, (name, (x, y)), color, marker in zip(axes, groups.items(), _colors(groups), MARKERS, strict=False):
        ax.scatter(x, y, s=26, color=color, marker=marker, alpha=0.75, linewidths=0)
        ax.set(title=f"{name}\n{_fit(ax, x, y)}", xlabel=x_label)
        ax.xaxis.set_major_locator(ticks(6))
        ax.yaxis.set_major_locator(ticks(6))
    for ax in axes[:: min(3, len(groups))]:
        ax.set_ylabel(y_label)
    return figure


def _fit(ax: Axes, x: Floats, y: Floats) -> str:
    """Draws the line; "r = 0.95 [0.90, 0.98]"."""
    if len(x) < 4 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return "no correlation: constant, or fewer than 4 points"
    line, r = linregress(x, y), correlation(x.tolist(), y.tolist())
    ends = np.array([x.min(), x.max()])
    ax.plot(ends, line.intercept + line.slope * ends, color=THEME["ink"], linewidth=1.2)
    return f"r = {r.value:.3f} [{r.low:.3f}, {r.high:.3f}]".replace("-", "−")


@styled
def against(
    series: Mapping[str, Mapping[float, HasInterval]],
    x_label: str,
    y_label: str,
    *,
    band: tuple[str, HasInterval] | None = None,
    percent: bool = True,
) -> Figure:
    """Estimates with their intervals against x (rank, k), evenly spaced; `band` (full fine-tuning, the base model) lies behind all."""
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    ax = figure.subplots()
    places = {x: i for i, x in enumerate(sorted({x for points in series.values() for x in points}))}
    if band is not None:
        label, estimate = band
        ax.axhspan(estimate.low, estimate.high, color=THEME["muted"], alpha=0.14, linewidth=0)
        ax.axhline(estimate.value, color=THEME["muted"], linewidth=1.2, linestyle=(0, (4, 3)), label=label)
    shift = min(0.1, 0.5 / len(series))  # intervals of several series at one x stand beside one another
    for i, ((name, points), color) in enumerate(zip(series.items(), _colors(series), strict=True)):
        xs = sorted(points)
        at = [places[x] + shift * (i - (len(series) - 1) / 2) for x in xs]
        estimates = [points[x] for x in xs]
        ax.plot(at, [e.value for e in estimates], color=color, linewidth=1.2, alpha=0.6, linestyle=DASHES[i])
        ax.errorbar(
            at, [e.value for e in estimates], _reach(estimates), fmt=MARKERS[i], color=color, markersize=6, elinewidth=1.4, label=name
        )
    ax.set(xlabel=x_label, ylabel=y_label, xlim=(-0.5, len(places) - 0.5))
    ax.set_xticks(list(places.values()), [f"{x:,g}" for x in places])
    ax.yaxis.set_major_locator(ticks(7))
    if percent:
        ax.yaxis.set_major_formatter(PERCENT)
    ax.grid(axis="x", visible=False)
    _legend(figure, ax)
    return figure


@styled
def intervals(
    rows: Mapping[str, HasInterval],
    x_label: str,
    *,
    published: Mapping[str, float] | None = None,
    reference: float | None = None,
    percent: bool = True,
) -> Figure:
    """One estimate a line, the first on top; a published number as an open diamond, `reference` (no difference) as a vertical line."""
    figure = Figure(figsize=(WIDTH, 0.34 * len(rows) + 1.0), layout="constrained")
    ax = figure.subplots()
    heights = range(len(rows) - 1, -1, -1)
    if reference is not None:
        ax.axvline(reference, color=THEME["ink"], linewidth=1)
    for y, estimate in zip(heights, rows.values(), strict=True):
        ax.plot((estimate.low, estimate.high), (y, y), color=SERIES[0], linewidth=5, alpha=0.35, solid_capstyle="round")
    ax.plot([e.value for e in rows.values()], heights, "o", color=SERIES[0], markersize=7, label="measured here, 95 % interval")
    known = [(published[name], y) for y, name in zip(heights, rows, strict=True) if name in published] if published else []
    if known:
        ax.plot(
            *zip(*known, strict=True), "D", color=SERIES[1], markerfacecolor="none", markersize=6, markeredgewidth=1.6, label="published"
        )
        _legend(figure, ax)
    ax.set(xlabel=x_label, ylim=(-0.6, len(rows) - 0.4))
    ax.set_yticks(list(heights), list(rows))
    ax.xaxis.set_major_locator(ticks(8))
    if percent:
        ax.xaxis.set_major_formatter(PERCENT)
    ax.grid(axis="y", visible=False)
    return figure


@styled
def curves(panels: Sequence[CurvePanel]) -> Figure:
    """Panels under one another over the same steps: mean of the seeds, and their smallest and largest as a band."""
    figure, axes = _grid(len(panels), columns=1, height=2.3, sharex=True)
    names = list(dict.fromkeys(name for panel in panels for name in panel.curves))
    looks = dict(zip(names, zip(_colors(names), DASHES, strict=False), strict=True))
    for ax, panel in zip(axes, panels, strict=True):
        for name, values_ns in panel.curves.items():
            _curve(ax, panel.steps, values_ns, name, *looks[name])
        for label, height in panel.references.items():
            ax.axhline(height, color=THEME["muted"], linewidth=1, linestyle=(0, (4, 3)))
            ax.annotate(
                label, (1, height), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8,
                color=THEME["muted"],
            )  # fmt: skip
        ax.set(title=panel.title, ylabel=panel.y_label, yscale="log" if panel.log else "linear")
        if panel.percent:
            ax.yaxis.set_major_formatter(PERCENT)
    axes[-1].set_xlabel("step (generation batches)")
    axes[-1].xaxis.set_major_locator(ticks(10))
    _legend(figure, *axes)
    return figure


def _curve(ax: Axes, steps: NDArray[np.int64], values_ns: Floats, name: str, color: str, dash: object) -> None:
    measured = ~np.all(np.isnan(values_ns), axis=0)
    values_nm, at = values_ns[:, measured], steps[measured]
    if len(values_nm) > 1:
        ax.fill_between(at, np.nanmin(values_nm, axis=0), np.nanmax(values_nm, axis=0), color=color, alpha=0.16, linewidth=0)
    few = "." if len(at) <= 40 else ""
    ax.plot(at, np.nanmean(values_nm, axis=0), color=color, linestyle=dash, marker=few, markersize=5, label=name)


@styled
def stacked_shares(shares: Mapping[str, Mapping[str, float]], x_label: str) -> Figure:
    """One bar a strategy, its parts side by side in the order of the first strategy; a part with room for it has its percentage."""
    parts = list(dict.fromkeys(part for row in shares.values() for part in row))
    figure = Figure(figsize=(WIDTH, 0.42 * len(shares) + 1.1), layout="constrained")
    ax = figure.subplots()
    heights = range(len(shares) - 1, -1, -1)
    start = np.zeros(len(shares))
    for part, color in zip(parts, _colors(parts), strict=True):
        width = np.array([row.get(part, 0.0) for row in shares.values()])
        ax.barh(heights, width, left=start, height=0.7, color=color, alpha=0.9, label=part, edgecolor=THEME["page"], linewidth=1)
        for y, left, share in zip(heights, start, width, strict=True):
            if share >= READABLE_SHARE:
                ax.text(left + share / 2, y, f"{share:.0%}", ha="center", va="center", fontsize=8, color=THEME["page"])
        start = start + width
    ax.set(xlabel=x_label, xlim=(0, max(1.0, start.max())))
    ax.set_yticks(list(heights), list(shares))
    ax.xaxis.set_major_formatter(PERCENT)
    ax.grid(visible=False)
    _legend(figure, ax)
    return figure


def consecutive_cosines(steps: NDArray[np.int64], cosines: Mapping[str, Floats]) -> Figure:
    """Cosine of each step's gradient with the next one's: name -> [seeds, s]."""
    references = {"orthogonal": 0.0}
    return curves([CurvePanel("Cosine of consecutive gradients", "cosine", steps, cosines, references=references)])


def pass_at_k_curves(estimates: Mapping[str, Mapping[int, HasInterval]]) -> Figure:
    """pass@k against k: name -> k -> estimate."""
    return against(
        {name: {float(k): one for k, one in points.items()} for name, points in estimates.items()},
        "k, samples a problem",
        "pass@k",
    )


def _grid(panels: int, columns: int, height: float, *, sharex: bool = False, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """As many axes as panels, `columns` a row; the rest of the last row stays empty. Raises ValueError for none, or too many."""
    if not 0 < panels <= 2 * MOST_SERIES:
        raise ValueError(f"a figure of {panels} panels: draw 1 to {2 * MOST_SERIES}, or split it")
    rows = -(-panels // columns)
    figure = Figure(figsize=(WIDTH, height * rows + 0.5), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey).flat)
    for ax in axes[panels:]:
        ax.remove()
    return figure, axes[:panels]


def _colors(names: Sequence[str] | Mapping[str, object]) -> tuple[str, ...]:
    """One a name, in order. Raises ValueError for more than can be told apart."""
    if len(names) > MOST_SERIES:
        raise ValueError(f"{len(names)} series in one figure ({', '.join(names)}): {MOST_SERIES} can be told apart, split them")
    return SERIES[: len(names)]


def _reach(estimates: Sequence[HasInterval]) -> list[list[float]]:
    """Below and above, as matplotlib's error bars want them."""
    return [[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]]


def _legend(figure: Figure, *axes: Axes) -> None:
    """Above all axes, each name once: nothing that is drawn can lie under it."""
    found = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    per_row = max(1, 110 // (max(map(len, found)) + 6))  # characters of 8.5-point type in WIDTH, handle and gap being some six
    figure.legend(
        found.values(), found.keys(), loc="outside upper right", ncols=min(len(found), per_row), handlelength=2.2, columnspacing=1.2
    )
