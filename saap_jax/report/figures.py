"""Every figure, drawn by matplotlib: curves, maps, ranks. One style, equal bytes for equal figures.

Axes and text have the colour `INK`, for which the page's style sheet puts the colour of its text, light or dark; lines
have colours that are seen on both. Matplotlib is imported when the first figure is drawn, since that takes long.
"""

import io
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from saap_jax.evaluation.scales import PERPLEXITY, Scale, format_figure, format_ppl
from saap_jax.extras import missing, need
from saap_jax.report.blocks import Figure
from saap_jax.report.formats import Number, short_name
from saap_jax.runtime.words import MINUS
from saap_jax.types import Scores

INK = "#010203"

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#c98a00", "#56b4e9", "#8c6bb1")
"""Told apart by the colour-blind, on white and on black: Okabe and Ito's with a darker orange, and violet for black."""

GREY = "#808080"
"""Baselines, in which nobody is interested but to see that the others are better, and what there is no colour for."""

NAMED = 6
"""Lines in colour, which are named at their ends; others are grey, and named below."""

BASELINES = ("random", "magnitude")
"""Estimators that others are held against."""

MOST = 14
"""Lines of a figure."""

_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
_MARKERS = "osD^vP*X"
_STEPS: tuple[Sequence[int], ...] = (
    (10,),
    (10, 20, 50),
    (10, 15, 20, 30, 40, 50, 60, 80),
    range(10, 100, 2),
    range(100, 1000, 5),
)
"""Round numbers of a decade, coarse to fine, in units of which the first one is the decade itself."""

_LINE = 0.165
_LETTERS = 62
_BESIDE = 24
"""Inches of a line of the legend, its letters at most, and those of a name beside a line."""

STYLE = {
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "font.size": 8.5,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.handlelength": 3.2,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "pdf.fonttype": 42,  # text stays text, as in SVG
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.04,
    "savefig.dpi": 200,
    "svg.fonttype": "none",
    "svg.hashsalt": "saap_jax",
    "text.color": INK,
    "text.parse_math": False,  # names are no formulas
    "xtick.color": INK,
    "ytick.color": INK,
}


def undrawn() -> str:
    """Say in one line why there are no figures; empty where they can be drawn."""
    return missing("figures", "no figures here")


def inline(figure: Figure) -> str:
    """Draw a figure as SVG within a page, on the page's own background."""
    svg = saved(figure, "svg", "none").decode()
    return svg[svg.index("<svg") :]


def saved(figure: Figure, ending: str = "svg", background: str = "white") -> bytes:
    """Draw a figure as a file: svg, png or pdf.

    Raises:
        ValueError: matplotlib is not installed.
    """
    need("figures", "figures")
    import matplotlib.style

    # without a date, so that equal figures have equal bytes
    about = {
        "svg": {"Creator": "saap_jax", "Date": None, "Title": figure.title},
        "png": {"Software": "saap_jax"},
        "pdf": {"Creator": "saap_jax", "CreationDate": None, "Title": figure.title},
    }
    file = io.BytesIO()
    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a letter that the font lacks is drawn in the page's
        painted(figure).savefig(file, format=ending, metadata=about[ending], facecolor=background)
    return file.getvalue()


def painted(figure: Figure) -> Any:
    """Make a matplotlib figure, not yet rendered."""
    import matplotlib.style
    from matplotlib.figure import Figure as Drawing

    with matplotlib.style.context(["default", STYLE]):
        drawing = Drawing(figsize=(figure.width, figure.height))
        figure.paint(drawing)
    return drawing


def line_style(place: int, name: str = "") -> dict[str, Any]:
    """Say by what matplotlib draws the line at a place: the first ones in colours, others and baselines grey.

    >>> line_style(1), line_style(1, "random > uniform")["color"] == GREY
    ({'color': '#d55e00', 'linestyle': '-', 'marker': 's', 'zorder': 2.1}, True)
    """
    marker = _MARKERS[place % len(_MARKERS)]
    if place >= NAMED or is_baseline(name):
        # dashes tell the grey ones apart; they lie below those in colour
        return {"color": GREY, "linestyle": _DASHES[place % len(_DASHES)], "marker": marker, "zorder": 2.0}
    return {"color": COLOURS[place], "linestyle": "-", "marker": marker, "zorder": 2.1}


def is_baseline(name: str) -> bool:
    """Say whether a variant is one of a baseline alone, whatever follows its scores.

    >>> [is_baseline(name) for name in ("random", "magnitude,global", "magnitude(order=1) > uniform", "random+wanda")]
    [True, True, True, False]
    """
    return name.partition(",")[0].partition(" > ")[0].partition("(")[0] in BASELINES


def logarithmic(axis: Any) -> None:
    """Give the vertical axis a logarithmic scale with few round numbers, written out, and lines across."""
    from matplotlib.ticker import NullLocator

    def label(tick: float) -> str:
        if tick < 1e5:
            return f"{tick:g}"
        return format_ppl(tick)

    axis.set_yscale("log")
    ticks = log_ticks(*axis.get_ylim())
    axis.set_yticks(ticks, [*map(label, ticks)])
    axis.yaxis.set_minor_locator(NullLocator())
    axis.grid(axis="y", color=INK, alpha=0.15, linewidth=0.6)


def log_ticks(low: float, high: float) -> list[float]:
    """Choose round numbers within [low, high], the coarsest set that has at least four, thinned to nine at most; none
    so close below another that their labels meet.

    >>> log_ticks(9.0, 20_000.0)
    [10.0, 100.0, 1000.0, 10000.0]
    >>> log_ticks(11.0, 90.0)
    [15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 80.0]
    >>> log_ticks(9.4, 21.0)
    [10.0, 12.0, 14.0, 16.0, 18.0, 20.0]
    """
    ticks: list[float] = []
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for steps in _STEPS:
        # parsed, since products with negative powers of ten are not round
        every = [float(f"{step}e{decade}") / steps[0] for decade, step in itertools.product(decades, steps)]
        ticks = [tick for tick in every if low <= tick <= high]
        if len(ticks) >= 4:
            break
    if not ticks:
        ticks = [low]
    ticks = ticks[:: math.ceil(len(ticks) / 9)]
    # a label takes about an eighteenth of the axis
    room = math.log(high / low) / 18
    return [one for one, after in zip(ticks, [*ticks[1:], math.inf], strict=True) if math.log(after / one) > room]


# --- curves ------------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """A figure over the ratio."""

    name: str
    points: Sequence[tuple[float, float]]
    """(actual ratio, figure) by ratio, from the unpruned model on."""
    ends: Sequence[tuple[float, float, float]] = ()
    """(actual ratio, low, high) of the points that have an interval."""
    crossing: float = math.nan
    """The largest ratio that holds the limit."""

    @property
    def ratios(self) -> list[Number]:
        """The ratios of its points."""
        return [ratio for ratio, _ in self.points]

    @property
    def values(self) -> list[Number]:
        """The figures of its points."""
        return [value for _, value in self.points]


class Limit(NamedTuple):
    """A figure that is not to be exceeded."""

    value: float
    said: str


def ratio_figure(
    name: str, title: str, curves: Sequence[Curve], scale: Scale = PERPLEXITY, limit: Limit | None = None
) -> Figure | None:
    """Draw the first curves over the ratio, None without any.

    A perplexity is on a logarithmic axis, and so is a loss above 0. The axis ends at four times the middle one of the
    curves' ends, baselines aside; what is above, or infinite, is drawn on the upper edge, lest it squeeze the rest.
    Upright lines are intervals; where there is a limit, a line down is the largest ratio that holds it.
    """
    curves = [curve for curve in curves if curve.points][:MOST]
    if not curves:
        return None
    height = 3.0 + _LINE * _grey(curve.name for curve in curves)

    def paint(figure: Any) -> None:
        axis = figure.add_axes((0.11, 1 - 2.6 / height, 0.58, 2.5 / height))
        low, high = _ends(curves, limit)
        up = scale.noun
        if low > 0:
            up += " (log)"
            axis.set_ylim(low / 1.06, high * 1.06)
            logarithmic(axis)
        else:
            more = 0.05 * (high - low)
            axis.set_ylim(low - more, high + more)
        for place, curve in reversed([*enumerate(curves)]):  # the first on top
            _draw_curve(axis, curve, line_style(place, curve.name), limit)
        _draw_levels(axis, curves, scale, limit)
        ratios = itertools.chain.from_iterable(curve.ratios for curve in curves)
        axis.set_xlim(0, 1.02 * max(ratios) or 1)
        axis.xaxis.set_major_formatter(lambda ratio, _: f"{100 * ratio:.3g} %")
        _label(axis, "prunable parameters removed", up)

    return Figure(name, title, paint, height)


def _draw_curve(axis: Any, curve: Curve, style: Mapping[str, Any], limit: Limit | None) -> None:
    """Draw a curve, the intervals of its points, and the largest ratio that holds the limit."""
    bottom, top = axis.get_ylim()
    upright = {"colors": style["color"], "linewidth": 1.0}
    label = short_name(curve.name, _LETTERS)
    if curve.crossing > 0:
        label += f": {100 * curve.crossing:.1f} %"
    # what is above the axis is drawn on its edge; markers there are not cut in half
    axis.plot(curve.ratios, np.minimum(curve.values, top), label=label, clip_on=False, **style)
    at, lows, highs = np.reshape(curve.ends, (-1, 3)).T
    axis.vlines(at, lows, np.minimum(highs, top), **upright)
    if limit and curve.crossing > 0:
        axis.vlines(curve.crossing, bottom, limit.value, **upright)


def _draw_levels(axis: Any, curves: Sequence[Curve], scale: Scale, limit: Limit | None) -> None:
    """Draw a line across at the unpruned model, where all curves begin with the same one, and at the limit."""
    levels = {}
    first, *others = {curve.points[0] for curve in curves}
    ratio, dense = first
    if not others and ratio == 0:
        levels[f"unpruned {format_figure(dense, scale)}"] = dense
    if limit:
        levels[limit.said] = limit.value
    for value in levels.values():
        axis.axhline(value, color=INK, linewidth=0.7, linestyle=(0, (2, 3)), zorder=1)
    if levels:  # in one line of text, since they may be closer than two
        place = {"xycoords": ("axes fraction", "data"), "xytext": (0, 2), "textcoords": "offset points"}
        axis.annotate(", ".join(levels), (1, max(levels.values())), ha="right", **place)


def _ends(curves: Sequence[Curve], limit: Limit | None) -> tuple[float, float]:
    """Find the lowest and the highest figure of the axis."""
    judged = [curve for curve in curves if not is_baseline(curve.name) and math.isfinite(curve.values[-1])]
    judged = judged or [*curves]
    values = []
    for curve in judged:
        values += filter(math.isfinite, curve.values)
    for curve in judged:  # the lower end of the first interval may be below all points
        values += [low for _, low, _ in curve.ends[:1]]
    low = min(values, default=1.0)
    high = max(values, default=10.0)
    # 4 times the middle one of the curves' ends: a few that explode do not squeeze the others
    last = sorted(curve.values[-1] for curve in judged if math.isfinite(curve.values[-1]))
    if last and low > 0:
        high = min(high, 4 * last[(len(last) - 1) // 2])
    if limit:
        high = max(high, limit.value)
    # an axis has some length, also where all figures are one
    return low, max(high, low + (0.06 * abs(low) or 0.06))


def learning_figure(
    name: str, title: str, curves: Mapping[str, Sequence[tuple[Number, Number]]], across: str, up: str
) -> Figure:
    """Draw a line a name, of (step, value), the finite ones, with labels below and beside the axes."""
    shown: dict[str, list[tuple[Number, Number]]] = {}
    for each, points in curves.items():
        finite = [point for point in points if math.isfinite(point[1])]
        if finite and len(shown) < MOST:
            shown[each] = finite
    height = 2.6 + _LINE * _grey(shown)

    def paint(figure: Any) -> None:
        axis = figure.add_axes((0.11, 1 - 2.2 / height, 0.58, 2.1 / height))
        for place, (each, points) in enumerate(shown.items()):
            steps, values = zip(*points, strict=True)
            markers = 3
            if len(steps) >= 50:  # they would hide the line
                markers = 0
            axis.plot(steps, values, label=short_name(each, _LETTERS), markersize=markers, **line_style(place))
        axis.xaxis.get_major_locator().set_params(integer=True)
        _label(axis, across, up)

    return Figure(name, title, paint, height)


def _grey(names: Iterable[str]) -> int:
    """Count the lines that are named in the legend."""
    return sum(line_style(place, name)["color"] == GREY for place, name in enumerate(names))


def _label(axis: Any, across: str, up: str) -> None:
    """Name the axes, lines in colour at their ends, none upon another, and grey ones in a legend below."""
    from matplotlib.colors import to_hex
    from scipy.optimize import isotonic_regression

    axis.set_xlabel(across)
    axis.set_ylabel(up)
    lines = [line for line in axis.get_lines() if not line.get_label().startswith("_")]
    grey = [line for line in lines if to_hex(line.get_color()) == GREY]
    inches = axis.get_position().height * axis.figure.get_figheight()
    if grey:
        axis.legend(handles=grey[::-1], loc="upper left", bbox_to_anchor=(-0.18, -0.42 / inches))
    named = [line for line in lines if line not in grey]
    if not named:
        return

    # (x, y) of the ends of lines, as fractions of the axes, the lowest first
    to_fraction = axis.transAxes.inverted()
    ends = [to_fraction.transform(axis.transData.transform(line.get_xydata()[-1])) for line in named]
    order = sorted(range(len(named)), key=lambda place: ends[place][1])
    # The labels are as near to the ends as they can be (least squares), each at least a line of text above the one
    # before. Less i lines of the i-th label, that is an isotonic regression.
    apart = _LINE / inches * np.arange(len(order))
    places = isotonic_regression(np.array([ends[place][1] for place in order]) - apart).x
    for place, at in zip(order, places + apart, strict=True):
        line = named[place]
        (x, y) = ends[place]
        arrow = {"arrowstyle": "-", "color": line.get_color(), "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
        where = {"xycoords": "axes fraction", "xytext": (1.07, at), "arrowprops": arrow, "annotation_clip": False}
        label, _, found = line.get_label().partition(": ")
        text = short_name(label, _BESIDE) + f": {found}" * bool(found)
        axis.annotate(text, (x, y), va="center", fontsize=8, **where)


# --- maps --------------------------------------------------------------------------------------------


def share_figure(
    name: str, title: str, panels: Mapping[str, np.ndarray], rows: Sequence[str], of: str, across: str = "layer"
) -> Figure:
    """Draw shares in [0, 1] as a map, `[rows, layers]` a panel: dark is 0, bright is 1, NaN is blank."""
    percent = {panel: 100.0 * cells for panel, cells in panels.items()}
    return _map(name, title, percent, rows, (across, f"{of}, %"), lambda: {"cmap": "viridis", "vmin": 0, "vmax": 100.0})


def change_figure(name: str, title: str, panels: Mapping[str, np.ndarray], rows: Sequence[str], of: str) -> Figure:
    """Draw changes as a map, `[rows, layers]` a panel, NaN where a layer has no such unit.

    Colours diverge from 0, linear near it and logarithmic beyond, since a few places cost far more than the rest; all
    panels have one scale.
    """
    every = np.concatenate([cells[np.isfinite(cells)] for cells in panels.values()] or [np.empty(0)])
    sizes = np.abs(every[every != 0])
    unit = 1.0
    if len(sizes):
        unit = float(np.median(sizes))

    def colours() -> dict[str, Any]:
        from matplotlib.colors import AsinhNorm

        most = float(max(sizes, default=unit))
        return {"cmap": "RdBu_r", "norm": AsinhNorm(unit, vmin=-most, vmax=most)}

    return _map(name, title, panels, rows, ("layer", of), colours)


def _map(
    name: str,
    title: str,
    panels: Mapping[str, np.ndarray],
    rows: Sequence[str],
    labels: tuple[str, str],
    colours: Callable[[], dict[str, Any]],
) -> Figure:
    """Draw a panel a structure, a row of 0.2 inches each; labels are of the axis across and of the colours."""
    each = 0.75 + 0.2 * len(rows)
    height = len(panels) * each + 0.6

    def paint(figure: Any) -> None:
        options = colours()
        image = None
        for place, (panel, cells) in enumerate(panels.items()):
            bottom = height - (place + 1) * each + 0.42
            axis = figure.add_axes((0.06, bottom / height, 0.92, 0.2 * len(rows) / height))
            image = axis.pcolormesh(np.ma.masked_invalid(cells), edgecolors="face", linewidth=0.2, **options)
            axis.set_title(panel)
            axis.set_yticks(np.arange(len(rows)) + 0.5, [short_name(row, 30) for row in rows])
            axis.tick_params(axis="y", length=0)
            axis.invert_yaxis()
            step = next(step for step in (1, 2, 5, 10, 20, 50, 1000) if cells.shape[1] <= 16 * step or step == 1000)
            numbers = np.arange(0, cells.shape[1], step)
            axis.set_xticks(numbers + 0.5, [str(number) for number in numbers])
            axis.set_xlabel(labels[0], labelpad=1)
        beside = figure.add_axes((0.06, 0.3 / height, 0.5, 0.1 / height))
        bar = figure.colorbar(image, cax=beside, orientation="horizontal")
        if "norm" in options:
            ticks = _ticks(options["norm"])
            bar.set_ticks(ticks, labels=[f"{tick:.2g}".replace("-", MINUS) for tick in ticks])
            bar.minorticks_off()
        bar.outline.set_visible(False)
        bar.ax.annotate(labels[1], (1.03, 0.5), xycoords="axes fraction", va="center", color=INK)

    return Figure(name, title, paint, height)


def _ticks(norm: Any) -> list[float]:
    """Choose 0 and powers of ten from the width of the linear part on, on both sides, as far as they do not crowd."""
    unit = math.log10(norm.linear_width)
    powers = [10.0**power for power in range(math.floor(unit), math.ceil(unit) + 8)]
    ticks = [0.0]
    for power in reversed(powers):  # from the ends inwards: the ends say most
        for tick in (-power, power):
            inside = norm.vmin <= tick <= norm.vmax
            if inside and all(abs(norm(tick) - norm(other)) > 0.12 for other in ticks):
                ticks.append(tick)
    return sorted(ticks)


# --- ranks -------------------------------------------------------------------------------------------


def rank_figure(
    scores: Mapping[str, Scores], exact: Scores, panels: Mapping[str, Sequence[tuple[str, str]]]
) -> Figure | None:
    """Draw the rank of each unit's score against its exact change: a panel an estimator, four side by side.

    Each structure has rows of its own, with one axis of changes; None without a measured unit. Colour is depth.

    Args:
        panels: structure -> its estimators, best first, each with its correlation in words.
    """
    changes = {name: np.asarray(exact[name], np.float64) for name in panels if panels[name] and name in exact}
    changes = {name: each for name, each in changes.items() if np.isfinite(each).any()}
    if not changes:
        return None
    heights = [0.5 + 2.0 * math.ceil(len(panels[name]) / 4) for name in changes]

    def paint(figure: Any) -> None:
        parts = figure.subfigures(len(changes), 1, height_ratios=heights, squeeze=False)[:, 0]
        for part, height, (name, each) in zip(parts, heights, changes.items(), strict=True):
            part.subplots_adjust(left=0.09, right=0.99, bottom=0.06, top=1 - 0.6 / height, hspace=0.35)
            _ranks(part, name, panels[name], {e: np.asarray(scores[e][name]) for e, _ in panels[name]}, each)
        said = "across: rank of the score, lowest to highest; up: change of the loss without the unit;\n"
        parts[-1].text(0.06, 0.0, f"{said}ρ: Spearman's correlation; colour: layer, dark first", va="top")

    return Figure("fidelity", "Scores against exact changes", paint, sum(heights), 9.0)


def _ranks(
    part: Any, name: str, panels: Sequence[tuple[str, str]], scores: Mapping[str, np.ndarray], exact: np.ndarray
) -> None:
    """Draw the panels of a structure, `exact` and scores `[layers, units]`, on the units that were measured."""
    from matplotlib.ticker import NullLocator
    from scipy.stats import rankdata

    where = np.isfinite(exact)
    changes = exact[where]
    layers = np.nonzero(where)[0]
    # the axis is linear up to about the median size of a change, and logarithmic beyond
    sizes = np.abs(changes[changes != 0])
    unit = 1.0
    if len(sizes):
        unit = 10.0 ** math.floor(math.log10(np.median(sizes)))
    powers = [unit * 10.0**power for power in range(8)]
    every = sorted([0.0, *powers, *(-power for power in powers)])
    ticks = [tick for tick in every if changes.min() <= tick <= changes.max()]
    part.suptitle(f"{name}, {len(changes)} units", x=0.06, ha="left", weight="bold", y=0.995)
    grid = part.subplots(math.ceil(len(panels) / 4), 4, sharex=True, sharey=True, squeeze=False).ravel()
    for axis, (estimator, value) in zip(grid, panels, strict=False):
        ranks = rankdata(scores[estimator][where]) / (len(changes) + 1)
        axis.scatter(ranks, changes, s=6, c=layers, cmap="viridis", vmin=0, vmax=1.25 * max(len(exact) - 1, 1))
        axis.set_yscale("asinh", linear_width=unit)
        axis.axhline(0.0, alpha=0.6, linewidth=0.6, color=INK)
        axis.set_title(f"{short_name(estimator, 28)}\nρ {value}")
        axis.set_yticks(ticks, [f"{tick:g}".replace("-", MINUS) for tick in ticks], minor=False)
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set_xlim(0, 1)
        axis.set_xticks([])
    for axis in grid[len(panels) :]:
        axis.set_visible(False)
