"""The figures of a run's report, each an SVG string to stand inside a page."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from fastlora.analysis.gradient_profile import LayerNorms, Measure, layer_norms, mean_ranks, measures
from fastlora.analysis.run_reader import Run
from fastlora.analysis.theme import SERIES, THEME, WIDTH, legend_above, styled, svg_element, ticks
from fastlora.metrics import layer_of
from fastlora.progress import STAGES
from fastlora.statistics import proportion_interval


@dataclass(frozen=True, slots=True)
class Panel:
    """One small plot of some metrics against the step."""

    title: str
    unit: str
    """Label of the vertical axis."""
    names: tuple[str, ...]
    """Metrics drawn, those that the run has."""
    scale: float = 1.0
    """Factor from the recorded unit to the shown one."""


PANELS = (
    Panel("Loss", "loss", ("loss",)),
    Panel("Cross-entropy", "nats / token", ("nll",)),
    Panel("Policy entropy", "nats / token", ("entropy",)),
    Panel("KL to the base model", "nats / token", ("kl",)),
    Panel("Clipped", "fraction of tokens", ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")),
    Panel("Gradient norm before clipping", "L2 norm", ("grad_norm",)),
    Panel("Optimizer steps clipped", "fraction", ("grad_clipped",)),
    Panel("Learning rate", "× 10⁻⁴", ("lr",), scale=1e4),
    Panel("Groups without spread", "fraction", ("reward/frac_zero_std",)),
    Panel("Completion length", "tokens", ("completion/length_mean",)),
    Panel("Truncated completions", "fraction", ("completion/truncated",)),
    Panel("Unscorable or timed out", "completions", ("reward/unscorable", "reward/timeouts")),
    Panel("Mismatch by place", "nats / token", ("mismatch/first_third", "mismatch/middle_third", "mismatch/last_third")),
    Panel("Ratio to the sampler", "π_old / π_sampler", ("mismatch/ratio_min", "mismatch/ratio_mean", "mismatch/ratio_max")),
    Panel("Ratios corrected", "fraction of tokens", ("mismatch/corrected",)),
    Panel("Steps skipped so far", "steps", ("skipped_steps",)),
    Panel("Tokens trained on", "tokens / step", ("tokens",)),
    Panel("Speed", "tokens / s", ("tokens_per_second",)),
    Panel("Peak memory", "GiB", ("memory/peak_bytes",), scale=2**-30),
)
"""The metrics with a name and a unit of their own; whatever else a run logs gets a panel under its own name."""

MISMATCH = {
    "mismatch/abs_p50": "median",
    "mismatch/abs_mean": "mean",
    "mismatch/abs_p99": "99th percentile",
    "mismatch/abs_max": "largest",
}
"""Sizes of the difference between sampler and trainer, and their names in the figure that has them beside `mismatch_kl`."""

MEASURES: dict[Measure, str] = {"raw": "‖g‖", "rank_normalised": "‖g‖ / √r", "delta_w": "‖∂L/∂ΔW‖"}
"""Measures of the gradient profile, as the figures write them."""

SHOWN_ELSEWHERE = (
    *("step", "reward/mean", "reward/std", "eval/accuracy", "eval/num_problems"),
    *("reallocation/moved_rank", "reallocation/delta_w_error"),
)


def _as_svg(draw: Callable[[Run], Figure]) -> Callable[[Run], str]:
    """Draws in the report's style and turns the figure into an SVG element in the colours of the page."""

    @wraps(draw)
    def drawn(run: Run) -> str:
        return svg_element(styled(draw)(run), salt=draw.__name__)

    return drawn


@_as_svg
def accuracy_intervals(run: Run) -> Figure:
    """Before and after as two dots with their intervals."""
    s = run.summary
    figure = Figure(figsize=(4.6, 1.5), layout="constrained")
    ax = figure.subplots()
    for y, value, interval, color in (
        (1, s.accuracy_before, s.accuracy_before_interval, THEME["muted"]),
        (0, s.accuracy_after, s.accuracy_after_interval, SERIES[0]),
    ):
        ax.plot(interval, (y, y), color=color, linewidth=5, alpha=0.35, solid_capstyle="round")
        ax.plot(value, y, "o", color=color, markersize=8)
    ax.set_yticks((1, 0), ("before", "after"))
    ax.set(ylim=(-0.6, 1.6), xlabel=f"greedy accuracy, {len(run.eval_after)} problems")
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.xaxis.set_major_locator(ticks(6))
    ax.grid(axis="y", visible=False)
    return figure


@_as_svg
def learning_curves(run: Run) -> Figure:
    """Reward with its spread (where there is one) above the held-out accuracy with its intervals."""
    rewarded = "reward/mean" in run.metrics
    figure = Figure(figsize=(WIDTH, 5.2 if rewarded else 2.8), layout="constrained")
    axes = figure.subplots(1 + rewarded, 1, sharex=True, squeeze=False)[:, 0]
    if rewarded:
        _draw_reward(axes[0], run.metrics)
    _draw_accuracy(axes[-1], run)
    axes[-1].set_xlabel("step (generation batches)")
    axes[-1].xaxis.set_major_locator(ticks(10))
    return figure


def _draw_reward(ax: Axes, metrics: Mapping[str, NDArray[np.float64]]) -> None:
    step, mean, spread = metrics["step"], metrics["reward/mean"], metrics["reward/std"]
    ax.fill_between(step, mean - spread, mean + spread, color=SERIES[0], alpha=0.15, linewidth=0, label="± 1 standard deviation")
    ax.plot(step, mean, color=SERIES[0], label="mean")
    ax.set(title="Reward of the sampled completions", ylabel="reward")
    legend_above(ax, 2)


def _draw_accuracy(ax: Axes, run: Run) -> None:
    s, step = run.summary, run.metrics["step"]
    during = np.flatnonzero(np.isfinite(run.metrics.get("eval/accuracy", np.full(len(step), np.nan))))
    points = []
    for row in during:
        n = int(run.metrics["eval/num_problems"][row])
        points.append((step[row], proportion_interval(round(run.metrics["eval/accuracy"][row] * n), n)))
    ends = [
        (0, s.accuracy_before, s.accuracy_before_interval),
        (s.steps, s.accuracy_after, s.accuracy_after_interval),
    ]
    if points:
        _error_bars(ax, [(x, p.value, (p.low, p.high)) for x, p in points], SERIES[1], f"during, first {points[0][1].n} problems", 5)
    _error_bars(ax, ends, SERIES[0], f"before and after, all {len(run.eval_after)} problems", 7)
    ax.set(title="Held-out greedy accuracy", ylabel="accuracy")
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    legend_above(ax, 2)


def _error_bars(ax: Axes, points: Sequence[tuple[float, float, tuple[float, float]]], color: str, label: str, size: float) -> None:
    """Points (x, value, (low, high)) with their intervals."""
    x, y = [p[0] for p in points], [p[1] for p in points]
    reach = [[value - low for _, value, (low, _) in points], [high - value for _, value, (_, high) in points]]
    ax.errorbar(x, y, reach, fmt="o", color=color, markersize=size, elinewidth=1.4, capsize=3, label=label)


@_as_svg
def metric_panels(run: Run) -> Figure:
    """Small multiples of every metric that changes during the run; a line where an alarm went off on it."""
    panels = panels_of(run)
    columns = 3
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(WIDTH, 1.75 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).flat
    for ax, panel in zip(axes, panels, strict=False):
        for name, color in zip(panel.names, SERIES, strict=False):
            label = name.rpartition("/")[2].removesuffix("_mean")
            ax.plot(run.metrics["step"], run.metrics[name] * panel.scale, color=color, linewidth=1.3, label=label)
        for alarm in run.alarms:
            if alarm.metric in panel.names:
                ax.axvline(alarm.step, color=THEME["bad"], linewidth=1.2, linestyle=(0, (2, 2)))
        ax.set(title=panel.title, ylabel=panel.unit)
        ax.yaxis.set_major_locator(ticks(4))
        ax.xaxis.set_major_locator(ticks(5))
        if len(panel.names) > 1:
            legend_above(ax, len(panel.names))
    for ax in axes[max(0, len(panels) - columns) : len(panels)]:
        ax.set_xlabel("step")
        ax.tick_params(labelbottom=True)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    return figure


def constant_metrics(run: Run) -> dict[str, float]:
    """The metrics that `metric_panels` leaves out because they never change, with their value; NaN = never measured."""
    constant = {}
    for name in _panel_metrics(run):
        values = run.metrics[name][np.isfinite(run.metrics[name])]
        if len(values) == 0 or np.all(values == values[0]):
            constant[name] = float(values[0]) if len(values) else float("nan")
    return constant


def _panel_metrics(run: Run) -> list[str]:
    drawn = {*SHOWN_ELSEWHERE, *((*MISMATCH, "mismatch_kl") if has_mismatch(run) else ())}
    return [name for name in run.metrics if name not in drawn and not name.startswith("seconds/")]


def panels_of(run: Run) -> list[Panel]:
    """The run's panels: the named ones, the rewards by function, the rest under their own names; none after a single step."""
    constant = constant_metrics(run)
    left = [name for name in _panel_metrics(run) if name not in constant]
    panels = []
    for panel in PANELS:
        names = tuple(name for name in panel.names if name in left)
        if names:
            panels.append(replace(panel, names=names))
            left = [name for name in left if name not in names]
    functions = tuple(name for name in left if name.startswith("reward/"))
    if len(functions) > 1:  # a single function is the reward itself, drawn above
        panels.append(Panel("Reward by function", "mean reward", functions))
    return panels + [Panel(name, "", (name,)) for name in left if name not in functions]


def has_mismatch(run: Run) -> bool:
    """The run's completions came from a sampler that is not the trainer."""
    return all(name in run.metrics for name in (*MISMATCH, "mismatch_kl"))


@_as_svg
def mismatch(run: Run) -> Figure:
    """|sampler − trainer| of the log-probabilities on a logarithmic scale, beside the KL divergence; zeros are left out of the former."""
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    sizes, kl = figure.subplots(1, 2, width_ratios=(2, 1))
    for (name, label), color in zip(MISMATCH.items(), SERIES[: len(MISMATCH)], strict=True):
        values = run.metrics[name]
        sizes.plot(run.metrics["step"], np.where(values > 0, values, np.nan), color=color, marker=".", markersize=3, label=label)
    sizes.set(title="|sampler − trainer|", ylabel="nats / token", yscale="log")
    kl.plot(run.metrics["step"], run.metrics["mismatch_kl"], color=SERIES[0], marker=".", markersize=3)
    kl.set(title="KL(sampler ‖ trainer)", ylabel="nats / token")
    for ax in (sizes, kl):
        ax.set_xlabel("step")
        ax.xaxis.set_major_locator(ticks(6))
    legend_above(sizes, 4)
    return figure


@_as_svg
def rank_matrix(run: Run) -> Figure:
    """Projection × layer, each cell with its rank, the darker the larger."""
    cells = {}
    for module, rank in run.summary.rank_pattern.items():
        cells[module.rpartition(".")[2], layer_of(module)] = rank
    projections = list(dict.fromkeys(projection for projection, _ in cells))
    layers = sorted({layer for _, layer in cells})
    largest = max(cells.values())
    figure = Figure(figsize=(max(WIDTH, 0.3 * len(layers) + 1), 0.32 * len(projections) + 0.9), layout="constrained")
    ax = figure.subplots()
    for (projection, layer), rank in cells.items():
        x, y = layers.index(layer), projections.index(projection)
        shade = 0.06 + 0.74 * rank / largest if rank else 0.0
        ax.add_patch(Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, facecolor=SERIES[0], alpha=shade, linewidth=0))
        ax.text(x, y, str(rank), ha="center", va="center", fontsize=8, color=THEME["ink" if rank else "muted"])
    ax.set(xlim=(-0.5, len(layers) - 0.5), ylim=(len(projections) - 0.5, -0.5), xlabel="layer")
    ax.set_xticks(range(len(layers)), map(str, layers))
    ax.set_yticks(range(len(projections)), projections)
    ax.tick_params(length=0)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    return figure


@_as_svg
def ranks_over_steps(run: Run) -> Figure:
    """Layer × step, the darker the larger the mean rank of the layer's modules; its number where it has changed."""
    layers, steps, mean_ls = mean_ranks(run.gradient_profile)
    figure = Figure(figsize=(WIDTH, max(2.2, 0.22 * len(layers) + 0.9)), layout="constrained")
    ax = figure.subplots()
    changes = [0, *(np.flatnonzero(np.any(np.diff(mean_ls, axis=1) != 0, axis=0)) + 1), len(steps)]
    for first, end in itertools.pairwise(changes):
        for row, mean in enumerate(mean_ls[:, first]):
            left, right = steps[first] - 0.5, steps[end - 1] + 0.5
            shade = 0.06 + 0.74 * mean / mean_ls.max()
            ax.add_patch(Rectangle((left, row - 0.46), right - left, 0.92, facecolor=SERIES[0], alpha=shade, linewidth=0))
            ax.text((left + right) / 2, row, f"{mean:.3g}", ha="center", va="center", fontsize=8)
    ax.set(xlim=(steps[0] - 0.5, steps[-1] + 0.5), ylim=(-0.5, len(layers) - 0.5), xlabel="step", ylabel="layer")
    ax.set_yticks(range(len(layers)), map(str, layers))
    ax.xaxis.set_major_locator(ticks(8))
    ax.grid(visible=False)
    return figure


@_as_svg
def gradient_heat_maps(run: Run) -> Figure:
    """Layer × step: dA and dB, raw and divided by √r; one logarithmic colour scale per column."""
    by_matrix: tuple[Measure, ...] = ("raw", "rank_normalised")
    figure = Figure(figsize=(WIDTH, 6.4), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    for column, measure in enumerate(by_matrix):
        maps = {matrix: layer_norms(run.gradient_profile, measure, matrix) for matrix in "AB"}
        positive = np.concatenate([norms.norms_ls[norms.norms_ls > 0] for norms in maps.values()])
        colors = LogNorm(positive.min(), positive.max())
        for ax, (matrix, norms) in zip(axes[:, column], maps.items(), strict=True):
            image = draw_heat_map(ax, norms, colors)
            ax.set_title(f"d{matrix}, {MEASURES[measure]}")
        _color_bar(figure, image, axes[:, column], f"{MEASURES[measure]} of a layer's gradient, log scale", "bottom")
    for ax in axes[:, 0]:
        ax.set_ylabel("layer")
    for ax in axes[-1]:
        ax.set_xlabel("step")
    return figure


@_as_svg
def delta_w_heat_map(run: Run) -> Figure:
    """Layer × step of the norm of the gradient with respect to ΔW."""
    norms = layer_norms(run.gradient_profile, "delta_w")
    positive = norms.norms_ls[norms.norms_ls > 0]
    figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
    ax = figure.subplots()
    image = draw_heat_map(ax, norms, LogNorm(positive.min(), positive.max()))
    ax.set(title=f"{MEASURES['delta_w']}, estimated", xlabel="step", ylabel="layer")
    _color_bar(figure, image, [ax], "log scale", "right")
    return figure


def _color_bar(figure: Figure, image: matplotlib.image.AxesImage, axes: Sequence[Axes], label: str, location: str) -> None:
    bar = figure.colorbar(image, ax=axes, location=location, shrink=0.9, aspect=45 if location == "bottom" else 20, pad=0.02)
    bar.set_label(label)
    for mesh in bar.ax.collections:
        mesh.set_rasterized(True)  # one image instead of 256 paths
    bar.outline.set_visible(False)


def draw_heat_map(ax: Axes, norms: LayerNorms, colors: LogNorm) -> matplotlib.image.AxesImage:
    """Steps to the right, layer 0 at the bottom; a zero or non-finite gradient is left blank."""
    values = np.ma.masked_invalid(np.where(norms.norms_ls > 0, norms.norms_ls, np.nan))
    step, layer = norms.steps, norms.layers
    ax.grid(visible=False)
    ax.xaxis.set_major_locator(ticks(8))
    ax.yaxis.set_major_locator(ticks(8))
    extent = (step[0] - 0.5, step[-1] + 0.5, layer[0] - 0.5, layer[-1] + 0.5)
    return ax.imshow(values, norm=colors, origin="lower", aspect="auto", interpolation="nearest", extent=extent)


@_as_svg
def gradient_shares(run: Run) -> Figure:
    """Each layer's share of the summed gradient norm, in all measures that the profile has."""
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    ax = figure.subplots()
    shown = measures(run.gradient_profile)
    width = 0.8 / len(shown)
    for i, (measure, color) in enumerate(zip(shown, SERIES, strict=False)):
        norms = layer_norms(run.gradient_profile, measure)
        ax.bar(norms.layers + (i - (len(shown) - 1) / 2) * width, norms.share_l, width=0.95 * width, color=color, label=MEASURES[measure])
    ax.axhline(1 / len(norms.layers), color=THEME["muted"], linewidth=1, linestyle=(0, (4, 3)), label="equal shares")
    ax.set(title="Share per layer, mean over steps", xlabel="layer", ylabel="share of Σ norm")
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.xaxis.set_major_locator(ticks(30))
    ax.margins(x=0.01)
    ax.grid(axis="x", visible=False)
    legend_above(ax, len(shown) + 1)
    return figure


@_as_svg
def time_split(run: Run) -> Figure:
    """Seconds of every step, stacked by stage."""
    step = run.metrics["step"]
    figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
    ax = figure.subplots()
    base = np.zeros(len(step))
    edges = np.append(step - 0.5, step[-1] + 0.5)
    for stage, color in zip((*STAGES, "other"), (*SERIES[:3], THEME["muted"]), strict=True):
        top = base + np.nan_to_num(run.metrics[f"seconds/{stage}"])
        ax.stairs(top, edges, baseline=base, fill=True, color=color, alpha=0.85, linewidth=0, label=stage)
        base = top
    ax.set(title="Wall-clock time per step", xlabel="step", ylabel="seconds", xlim=(edges[0], edges[-1]), ylim=(0, None))
    ax.xaxis.set_major_locator(ticks(10))
    ax.grid(axis="x", visible=False)
    legend_above(ax, 4)
    return figure
