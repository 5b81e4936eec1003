"""One look for every figure: drawn by matplotlib in placeholder colours, written as SVG in the page's colours or in fixed ones.

    inside a page     placeholder -> CSS variable, so that one figure serves light and dark pages; text stays text, in the page's font
    a file of its own placeholder -> the light page's colour, on its background: Markdown shows it on any page

Equal figures give equal bytes: element ids come from a fixed salt and nothing carries a date.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

P = ParamSpec("P")

LIGHT = {
    "ink": "#1c1f24", "muted": "#666d78", "grid": "#e6e8eb", "page": "#fcfcfb", "bad": "#b3382c",
    "series-1": "#2563c9", "series-2": "#d9730d", "series-3": "#2a8f6a", "series-4": "#9159c9",
    "series-5": "#b3382c", "series-6": "#3fa7c4", "series-7": "#8a6d1f", "series-8": "#c2589a",
}  # fmt: skip
"""CSS variable -> its colour on a light page (page.css.j2 has the same, and the dark ones). Neighbours differ in lightness too, and
every curve has a marker or a dash of its own besides: 8 hues alone are not told apart by everyone."""

THEME = {name: f"#01fe{i:02x}" for i, name in enumerate(LIGHT, start=1)}
"""CSS variable -> placeholder colour, one that no colour map produces."""

SERIES = tuple(THEME[f"series-{i}"] for i in range(1, 9))

WIDTH = 10.5
"""Inches; 9-point type then shows at 12–13 pixels in the page's column."""

STYLE = {
    "svg.fonttype": "none", "font.size": 9, "axes.titlesize": 9.5, "axes.titlelocation": "left", "axes.titleweight": "bold",
    "text.color": THEME["ink"], "axes.labelcolor": THEME["muted"], "axes.edgecolor": THEME["muted"],
    "xtick.color": THEME["muted"], "ytick.color": THEME["muted"], "axes.titlecolor": THEME["ink"],
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.7, "axes.axisbelow": True,
    "axes.grid": True, "grid.color": THEME["grid"], "grid.linewidth": 0.7, "lines.linewidth": 1.6,
    "figure.facecolor": "none", "axes.facecolor": "none", "legend.frameon": False, "legend.fontsize": 8.5,
    "savefig.facecolor": "none", "image.cmap": "viridis",
}  # fmt: skip

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'Liberation Sans', Arial, sans-serif"


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """`draw` in the report's style, laid out once: constrained layout moves everything a little whenever a figure is drawn again."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            figure = draw(*args, **kwargs)
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
            return figure

    return drawn


def svg_element(figure: Figure, salt: str) -> str:
    """The figure as an SVG element in the colours of the page that holds it. `salt` must differ between the figures of one page."""
    svg = _svg(figure, salt)
    for name, placeholder in THEME.items():
        svg = svg.replace(placeholder, f"var(--{name})")
    return svg


def svg_file(figure: Figure, salt: str) -> str:
    """The figure as a file of its own, readable on any background."""
    svg = _svg(figure, salt)
    for name, placeholder in THEME.items():
        svg = svg.replace(placeholder, LIGHT[name])
    page = f'<style>text {{ font-family: {FONT} !important; }}</style>\n<rect width="100%" height="100%" fill="{LIGHT["page"]}"/>\n'
    end = svg.index(">") + 1
    return svg[:end] + "\n" + page + svg[end:].lstrip("\n")


def _svg(figure: Figure, salt: str) -> str:
    """From `<svg` on, in placeholder colours."""
    text = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": salt}):
        figure.savefig(text, format="svg", dpi=150, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    # Names of groups (figure_1, matplotlib.axis_1) repeat in every figure and nothing refers to them.
    svg = re.sub(r'<g id="[^"]+">', "<g>", text.getvalue())
    return svg[svg.index("<svg") :]


def legend_above(ax: Axes, columns: int) -> None:
    """A legend in one line, right of the title."""
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=columns, borderaxespad=0.1, handlelength=1.2, columnspacing=1.0)


def ticks(most: int) -> MaxNLocator:
    """At most `most` intervals, at round numbers."""
    return MaxNLocator(most, steps=[1, 2, 5, 10])
