"""The figures of a report for papers: SVG, PNG and PDF of a column's or a page's width, drawn by matplotlib.

The same numbers as on the page, in Okabe and Ito's colours on white, with a marker or a place of its own for everything
that a colour tells. Equal records give equal files.
"""

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from saap_jax.report.figures.palette import COLOURS, line_style
from saap_jax.report.figures.ratio import Curve, curves, log_ticks
from saap_jax.report.kinds.against import Against, percent_axis, percent_ends
from saap_jax.report.kinds.attached import slug
from saap_jax.report.kinds.compare import Compared
from saap_jax.report.kinds.distributions import Distribution, distributions, log_axis
from saap_jax.report.kinds.kept_map import kept_shares
from saap_jax.report.kinds.overview import drawn_runs, joint_curves
from saap_jax.report.kinds.scores import short_name
from saap_jax.report.kinds.summary import DOMAINS
from saap_jax.report.kinds.tables import format_ppl
from saap_jax.report.page.blocks import RunView
from saap_jax.report.rows import DENSE, leading, metrics
from saap_jax.report.score_arrays import read_scores
from saap_jax.types import STRUCTURES

WIDTH = 6.75
"""Inches: the width of a page's text, or of two columns."""

LIMIT = 10
"""Variants of a figure."""

_RUNS = 20
"""Runs of a figure; more are drawn on several."""

_MARKERS = "osD^vP*X"
_LETTERS = 38
_ENDINGS = ("svg", "png", "pdf")

_STYLE = {
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "font.size": 8,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "pdf.fonttype": 42,  # text stays text
    "savefig.dpi": 300,
    "svg.fonttype": "path",  # looks alike wherever it is placed
    "svg.hashsalt": "saap_jax",
    "text.parse_math": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}

Plot = tuple[str, float, Callable[[Any], None]]
"""Stem of the files, inches of height, and who draws on an empty figure."""


def paper_figures(views: Sequence[RunView]) -> Iterator[tuple[str, bytes]]:
    """Return every figure of a report as (name of the file, content)."""
    for stem, height, paint in plots(views):
        figure = painted(height, paint)
        for ending in _ENDINGS:
            yield f"{stem}.{ending}", saved(figure, ending)


def plots(views: Sequence[RunView]) -> list[Plot]:
    """Return the figures of all runs, and of several runs together."""
    found: list[Plot] = []
    for view in views:
        if view.compared:
            found += compare_plots(slug(view.name), view.compared)
    for number, (metric, lines) in enumerate(joint_curves(views).items(), start=1):
        order = drawn_runs(views)
        for start in range(0, len(lines), _RUNS):
            part = f"-part-{start // _RUNS + 1}" if len(lines) > _RUNS else ""
            shown = lines[start : start + _RUNS]
            height = 2.9 + 0.15 * max(0, len(shown) / 2 - 4)
            found.append((f"runs-frontier-{number}{part}", height, _frontier([(metric, shown)], order)))
    return found


def compare_plots(stem: str, compared: Compared) -> list[Plot]:
    """Return the figures of a comparison."""
    order = leading(compared.rows, LIMIT)
    panels = [(f"{DOMAINS[m['domain']]}\n{m['name']}", curves(compared.run, compared.variants, m["name"])[0])
              for m in metrics(compared.run)]  # fmt: skip
    panels = [(title, lines) for title, lines in panels if lines]
    found: list[Plot] = [(f"{stem}-frontier", 2.9, _frontier(panels, order))] if panels else []
    named = {variant["candidate"]: variant for variant in compared.variants}
    for asked in dict.fromkeys(row.asked for row in compared.rows if row.candidate != DENSE):
        of = f"{100 * asked:g}"
        group = [one for one in compared.against if one.asked == asked]
        if group:
            many = min(len({one.label for one in group}), LIMIT)
            found.append((f"{stem}-intervals-{of}", 0.9 + 0.2 * many, _intervals(group)))
        rows = [row for row in compared.rows if row.asked == asked and "kept" in named[row.candidate]][:LIMIT]
        maps = {row.label: kept_shares(compared.run, named[row.candidate]["kept"]) for row in rows}
        if any(any(each.values()) for each in maps.values()):
            found.append((f"{stem}-kept-{of}", 1.1 + 0.17 * len(maps), _kept(maps)))
    scores = next(iter(read_scores(compared.path).values()), {})
    for structure in STRUCTURES:
        if shown := dict(list(distributions(scores, structure).items())[:LIMIT]):
            found.append((f"{stem}-scores-{structure}", 0.9 + 0.2 * len(shown), _scores(shown)))
    return found


def painted(height: float, paint: Callable[[Any], None]) -> Any:
    """Return a matplotlib figure, in the style of a paper whatever the user's settings are."""
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        paint(figure)
        figure.draw_without_rendering()
    return figure


def saved(figure: Any, ending: str) -> bytes:
    """Return a figure as a file; equal figures give equal bytes."""
    import matplotlib.style

    about = {"svg": {"Creator": "saap_jax", "Date": None}, "png": {"Software": "saap_jax"},
             "pdf": {"Creator": "saap_jax", "CreationDate": None}}[ending]  # fmt: skip
    file = io.BytesIO()
    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(file, format=ending, metadata=about)
    return file.getvalue()


def _frontier(panels: Sequence[tuple[str, Sequence[Curve]]], order: Sequence[str]) -> Callable[[Any], None]:
    """Return who draws perplexity against ratio, a panel a text, with one legend."""

    def paint(figure: Any) -> None:
        from matplotlib.ticker import NullLocator, PercentFormatter

        handles: dict[str, Any] = {}
        for axis, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            shown = sorted((c for c in lines if c.name in order), key=lambda curve: order.index(curve.name))
            ends = sorted(curve.points[-1][1] for curve in shown)
            most = max((ppl for curve in shown for _, ppl in curve.points if np.isfinite(ppl)), default=1.0)
            high = min(4 * ends[(len(ends) - 1) // 2], 1.1 * most)
            for curve in shown:
                place = order.index(curve.name)
                ratios, values = zip(*curve.points, strict=True)
                drawn = line_style(place)
                style = {
                    "color": drawn.paint,
                    "linestyle": drawn.lengths(_STYLE["lines.linewidth"]),
                    "marker": _MARKERS[drawn.marker],
                }
                (handles[curve.name],) = axis.plot(ratios, np.minimum(values, 10 * high), **style)
            axis.set_yscale("log")
            axis.set_ylim(top=min(axis.get_ylim()[1], high))
            ticks = log_ticks(*axis.get_ylim())
            axis.set_yticks(ticks, [f"{tick:g}" if tick < 1e5 else format_ppl(tick) for tick in ticks])
            axis.yaxis.set_minor_locator(NullLocator())
            axis.grid(axis="y", alpha=0.25, linewidth=0.5)
            axis.set_xlim(left=0)
            axis.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %", decimals=0))
            axis.set_title("\n".join(short_name(line, 34 if len(panels) < 3 else 22) for line in title.split("\n")))
            axis.set_xlabel("prunable parameters removed")
        figure.axes[0].set_ylabel("perplexity (log)")
        names = [name for name in order if name in handles]
        labels = [short_name(name, _LETTERS) for name in names]
        columns = 3 if max(map(len, labels)) < 24 else 2
        options = {"loc": "outside lower center", "ncols": columns, "handlelength": 3.6}
        figure.legend([handles[name] for name in names], labels, **options)

    return paint


def _intervals(group: Sequence[Against]) -> Callable[[Any], None]:
    """Return who draws the differences from the best of a ratio, a panel a text; hollow where they may be chance."""

    def paint(figure: Any) -> None:
        texts = list(dict.fromkeys(one.metric for one in group))
        labels = list(dict.fromkeys(one.label for one in group))[:LIMIT]
        panels = figure.subplots(1, len(texts), sharey=True, squeeze=False)[0]
        for axis, metric in zip(panels, texts, strict=True):
            mine = {one.label: one for one in group if one.metric == metric and one.label in labels}
            scale = percent_axis([one.difference for one in mine.values()])
            axis.axvline(0.0, color="black", linewidth=0.6)
            for height, label in enumerate(labels):
                if label in mine:
                    _interval(axis, height, mine[label], scale.low, scale.high)
            axis.set_xlim(scale.low, scale.high)
            axis.set_title(short_name(metric, 40))
            axis.spines["left"].set_visible(False)
            axis.tick_params(axis="y", length=0)
        panels[0].set_yticks(range(len(labels)), [short_name(label, _LETTERS) for label in labels])
        panels[0].set_ylim(len(labels) - 0.5, -0.5)
        figure.supxlabel(f"perplexity above that of {short_name(group[0].best, 60)}, %", fontsize=8)

    return paint


def _interval(axis: Any, place: int, one: Against, lowest: float, highest: float) -> None:
    value, low, high = percent_ends(one.difference)
    axis.plot([max(low, lowest), min(high, highest)], [place] * 2, color=COLOURS[0], solid_capstyle="butt")
    if value > highest:
        axis.plot([highest], [place], ">", color=COLOURS[0], clip_on=False)
    else:
        face = COLOURS[0] if one.sure else "white"
        axis.plot([value], [place], "o", color=COLOURS[0], markerfacecolor=face)


def _kept(maps: dict[str, dict[str, list[float]]]) -> Callable[[Any], None]:
    """Return who draws the share of units that each layer keeps, a panel a structure."""

    def paint(figure: Any) -> None:
        structures = [name for name in next(iter(maps.values())) if any(each[name] for each in maps.values())]
        panels = figure.subplots(1, len(structures), sharey=True, squeeze=False)[0]
        image = None
        for axis, name in zip(panels, structures, strict=True):
            image = _heat(axis, np.array([each[name] for each in maps.values()]))
            axis.set_title(f"{name} kept")
        panels[0].set_yticks(range(len(maps)), [short_name(label, _LETTERS) for label in maps])
        figure.colorbar(image, ax=list(panels), label="units kept, %", shrink=0.9)

    return paint


def _scores(shown: dict[str, Distribution]) -> Callable[[Any], None]:
    """Return who draws the distributions of scores, sizes on the left, ranks by layer on the right."""

    def paint(figure: Any) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        scale = log_axis(list(shown.values()))
        for height, one in enumerate(shown.values()):
            logs = [np.log10(q) if q > 0 else scale.low for q in one.quantiles]
            left.plot([logs[0], logs[4]], [height] * 2, color=COLOURS[0])
            left.plot([logs[1], logs[3]], [height] * 2, color=COLOURS[0], linewidth=5, alpha=0.5, solid_capstyle="butt")
            left.plot([logs[2]], [height], "|", color="black", markersize=7)
        left.set_xticks([at for at, _ in scale.ticks], [text for _, text in scale.ticks])
        left.set_xlim(scale.low, scale.high)
        left.set_title("score / middle score")
        left.set_yticks(range(len(shown)), [short_name(name, _LETTERS) for name in shown])
        image = _heat(right, np.array([one.ranks for one in shown.values()]))
        right.set_title("mean rank of the layer's units")
        figure.colorbar(image, ax=right, label="percentile", shrink=0.9)

    return paint


def _heat(axis: Any, shares: np.ndarray) -> Any:
    """Draw shares as cells, a line a name and a column a layer; return the image."""
    image = axis.imshow(100 * shares, cmap="viridis", vmin=0, vmax=100, aspect="auto", interpolation="none")
    for height in range(1, len(shares)):
        axis.axhline(height - 0.5, color="white", linewidth=0.8)
    axis.set_xlabel("layer")
    axis.locator_params(axis="x", integer=True, min_n_ticks=1)
    axis.spines[:].set_visible(False)
    axis.tick_params(axis="y", length=0)
    return image
