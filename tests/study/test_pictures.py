"""Pictures: what is drawn is what was given, nothing lies over anything else, and equal pictures are equal bytes."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axis import Tick
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from scipy.stats import linregress, pearsonr

from fastlora.analysis import theme
from fastlora.analysis.gradient_profile import LayerNorms
from fastlora.analysis.theme import LIGHT, THEME, svg_element, svg_file
from fastlora.study.claims import Estimate
from fastlora.study.pictures import (
    MOST_SERIES,
    CurvePanel,
    against,
    consecutive_cosines,
    curves,
    heat_maps,
    intervals,
    pass_at_k_curves,
    scatter_fits,
    share_bars,
    stacked_shares,
)
from tests.study.sample_report import sample_report

STEPS = np.arange(1, 13)


def overlaps(figure: Figure) -> list[str]:
    """Pairs of words that are drawn over one another by more than two pixels each way."""
    figure.set_canvas(FigureCanvasAgg(figure))
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    unused = {tick.label1 for tick in figure.findobj(Tick)}  # matplotlib keeps labels outside the limits and of shared axes, undrawn
    unused -= {tick.label1 for ax in figure.axes for axis in (ax.xaxis, ax.yaxis) for tick in axis._update_ticks()}
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip() and text not in unused]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts]
    found = []
    for (first, a), (second, b) in combinations(boxes, 2):
        common = Bbox.intersection(a, b)
        if common is not None and common.width > 2 and common.height > 2:
            found.append(f"{first!r} over {second!r}")
    return found


def test_no_words_lie_over_others() -> None:
    found = {picture.name: overlaps(picture.figure) for picture in sample_report().pictures}
    assert {name: over for name, over in found.items() if over} == {}


def test_overlaps_are_seen() -> None:
    figure = Figure()
    figure.text(0.5, 0.5, "one")
    figure.text(0.51, 0.5, "two")
    assert overlaps(figure) == ["'one' over 'two'"]


def test_heat_maps_share_one_scale_and_leave_zeros_blank() -> None:
    norms_ls = np.array([[0.0, 2.0, 8.0], [np.nan, 4.0, 1.0]])
    layers, steps = np.array([3, 4], dtype=np.int32), np.array([1, 2, 3], dtype=np.int32)
    figure = heat_maps({"a": LayerNorms(layers, steps, norms_ls), "b": LayerNorms(layers, steps, 10 * norms_ls)}, "‖g‖")
    first, second = (ax.images[0] for ax in figure.axes[:2])
    assert (first.norm.vmin, first.norm.vmax) == (second.norm.vmin, second.norm.vmax) == (1.0, 80.0)
    assert np.ma.getmaskarray(first.get_array()).tolist() == [[True, False, False], [True, False, False]]
    assert [ax.get_title(loc="left") for ax in figure.axes[:2]] == ["a", "b"]
    with pytest.raises(ValueError, match="heat maps of a: no norm is positive"):
        heat_maps({"a": LayerNorms(layers, steps, np.zeros((2, 3)))}, "‖g‖")


def test_share_bars_show_both_and_cut_nothing_off() -> None:
    shares = {"uniform": np.array([0.5, 0.3, 0.2]), "proportional": np.array([0.7, 0.2, 0.1])}
    figure = share_bars([0, 1, 2], shares, {"proportional": np.array([0.75, 0.15, 0.1])})
    for ax, share_l in zip(figure.axes, shares.values(), strict=True):
        assert [bar.get_height() for bar in ax.patches] == share_l.tolist()
        assert ax.get_ylim()[0] == 0 and ax.get_ylim()[1] > 0.75
    assert [line.get_ydata().tolist() for line in figure.axes[1].lines if line.get_marker() == "_"] == [[0.75, 0.15, 0.1]]
    assert not [line for line in figure.axes[0].lines if line.get_marker() == "_"]


def test_the_line_and_r_are_scipys() -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=17)
    y = 2 * x + rng.normal(size=17)
    figure = scatter_fits({"noisy": (x, y), "constant": (np.ones(17), y), "few": (x[:3], y[:3])}, "rank", "share")
    line, r = linregress(x, y), pearsonr(x, y)
    drawn = figure.axes[0].lines[0]
    np.testing.assert_allclose(drawn.get_ydata(), line.intercept + line.slope * drawn.get_xdata())
    low, high = r.confidence_interval(0.95)
    assert figure.axes[0].get_title(loc="left") == f"noisy\nr = {r.statistic:.3f} [{low:.3f}, {high:.3f}]"
    assert [len(ax.lines) for ax in figure.axes] == [1, 0, 0]
    assert all("no correlation" in ax.get_title(loc="left") for ax in figure.axes[1:])


def test_against_draws_every_interval_at_its_x() -> None:
    points = {64.0: Estimate(0.5, 0.4, 0.65), 1.0: Estimate(0.3, 0.2, 0.35)}
    figure = against({"a": points, "b": {4.0: Estimate(0.1, 0.0, 0.2)}}, "rank", "pass@1", band=("full", Estimate(0.55, 0.5, 0.6)))
    (ax,) = figure.axes
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "4", "64"]
    bars = [bar.lines[2][0].get_segments() for bar in ax.containers]
    assert [[(s[0][1], s[1][1]) for s in segments] for segments in bars] == [
        [pytest.approx((0.2, 0.35)), pytest.approx((0.4, 0.65))],
        [pytest.approx((0.0, 0.2))],
    ]
    assert [round(segment[0][0]) for segment in (*bars[0], *bars[1])] == [0, 2, 1]
    assert sorted(text.get_text() for text in figure.legends[0].get_texts()) == ["a", "b", "full"]


def test_pass_at_k_has_a_tick_a_k() -> None:
    (ax,) = pass_at_k_curves({"student": {k: Estimate(k / 20, k / 25, k / 17) for k in (1, 8, 16)}}).axes
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "8", "16"]


def test_intervals_are_one_a_line_with_the_published_number() -> None:
    rows = {"uniform": Estimate(0.6, 0.5, 0.7), "base": Estimate(0.4, 0.3, 0.5)}
    figure = intervals(rows, "accuracy", published={"uniform": 0.745}, reference=0.0)
    (ax,) = figure.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["uniform", "base"] and ax.get_yticks().tolist() == [1, 0]
    diamonds = [line for line in ax.lines if line.get_marker() == "D"]
    assert [line.get_xydata().tolist() for line in diamonds] == [[[0.745, 1]]]
    assert len(intervals(rows, "accuracy").legends) == 0


def test_curves_are_means_with_a_band_over_seeds() -> None:
    values_ns = np.array([[1.0, np.nan, 3.0], [2.0, np.nan, np.nan]])
    panel = CurvePanel("t", "y", np.array([5, 6, 7]), {"a": values_ns, "b": np.ones((1, 3))}, references={"zero": 0.0})
    (ax,) = curves([panel]).axes
    assert ax.lines[0].get_xydata().tolist() == [[5, 1.5], [7, 3.0]], "step 6 was never measured"
    assert len(ax.collections) == 1, "one seed has no band"
    band = ax.collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in band.tolist()} >= {(5.0, 1.0), (5.0, 2.0), (7.0, 3.0)}
    assert "zero" in [text.get_text() for text in ax.texts]
    assert consecutive_cosines(STEPS, {"grpo": np.zeros((3, 12))}).axes[0].get_ylabel() == "cosine"


def test_a_series_looks_the_same_in_every_panel() -> None:
    one, two = np.ones((1, 12)), 2 * np.ones((1, 12))
    figure = curves([CurvePanel("1", "y", STEPS, {"a": one, "b": two}), CurvePanel("2", "y", STEPS, {"b": one})])
    looks = [{line.get_label(): (line.get_color(), line.get_linestyle()) for line in ax.lines} for ax in figure.axes]
    assert looks[0]["b"] == looks[1]["b"] != looks[0]["a"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_stacked_shares_begin_where_the_last_ended() -> None:
    figure = stacked_shares({"x": {"q": 0.2, "v": 0.77, "o": 0.03}, "y": {"v": 1.0}}, "share")
    (ax,) = figure.axes
    found = [[(bar.get_x(), bar.get_x() + bar.get_width()) for bar in container] for container in ax.containers]
    np.testing.assert_allclose(found, [[(0, 0.2), (0, 0)], [(0.2, 0.97), (0, 1)], [(0.97, 1), (1, 1)]], atol=1e-12)
    assert [text.get_text() for text in ax.texts] == ["20%", "77%", "100%"], "3 % has no room"


def test_too_many_series_are_an_error() -> None:
    many = {f"s{i}": {1.0: Estimate(0, 0, 0)} for i in range(MOST_SERIES + 1)}
    with pytest.raises(ValueError, match=f"{MOST_SERIES + 1} series in one figure"):
        against(many, "x", "y")
    with pytest.raises(ValueError, match="a figure of 0 panels"):
        curves([])


def test_svg_in_a_page_and_in_a_file() -> None:
    figure = intervals({"a": Estimate(0.5, 0.4, 0.6)}, "accuracy")
    element, file = svg_element(figure, "x"), svg_file(figure, "x")
    assert element.startswith("<svg") and "var(--series-1)" in element and not set(THEME.values()) & set(element.split('"'))
    assert LIGHT["series-1"] in file and "var(--" not in file and '<rect width="100%"' in file
    assert (element, file) == (svg_element(figure, "x"), svg_file(figure, "x")), "drawn twice, the same bytes"
    assert svg_element(figure, "y") != element, "two figures of a page share no id"


def test_files_have_the_colours_of_the_light_page() -> None:
    page = Path(theme.__file__).with_name("page.css.j2").read_text()
    light, dark = page.split("@media (prefers-color-scheme: dark)", maxsplit=1)
    for name, color in LIGHT.items():
        assert f"--{name}: {color};" in light
        assert f"--{name}: #" in dark
