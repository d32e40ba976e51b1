"""Perplexity against ratio: a line a variant, or of several runs, a line a run."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from saap_jax.evaluation.scales import PERPLEXITY, Scale, format_figure
from saap_jax.report.figures.axes import in_one, logarithmic, removed_across, spread
from saap_jax.report.figures.palette import INK, PAPER, is_baseline, line_style
from saap_jax.report.page.blocks import Plot
from saap_jax.report.page.formats import format_percent, short_name
from saap_jax.runs.records import Row, RunRecord
from saap_jax.runs.standing import DENSE, labels

RUNS = 20
"""Lines of a figure on paper; more are drawn on several."""

_LETTERS = 38

_WIDTH, _HEIGHT = 4.4, 3.5
_ROOM = {"left": 0.13, "right": 0.71, "bottom": 0.16, "top": 0.97}
"""Inches of a figure on the screen, and shares of it that the axes reach."""

_GAP, _LETTER = 11.0, 8.0
"""Points between the names at the ends of lines, and of these names; many are closer."""

_NAMED = 14
"""Letters of a name at the end of a line; the legend has all."""

_NEAR = 0.15
"""Share of the axis within which the ends of curves count as one column of names."""


class Curve(NamedTuple):
    """Perplexity over ratio."""

    name: str
    points: Sequence[tuple[float, float]]
    """(actual ratio, perplexity) by ratio, the dense model first."""
    ends: Sequence[tuple[float, float, float]] = ()
    """(actual ratio, low, high) of the points that have an interval."""


def curves(run: RunRecord, candidates: Sequence[Row], metric: str) -> tuple[list[Curve], list[str]]:
    """Return the curve of each variant on a metric, by name, and the candidates without a number."""
    found: dict[str, list[tuple[float, float]]] = {}
    missing = []
    for name, candidate in sorted(zip(labels(candidates), candidates, strict=True), key=lambda pair: pair[0]):
        ppl = candidate.get("ppl", {}).get(metric)
        if ppl is None or math.isnan(ppl) or ppl <= 0:
            missing.append(candidate["candidate"])
        else:
            ratio = candidate.get("ratio_actual", candidate.get("ratio_asked", math.nan))
            found.setdefault(name, []).append((float(ratio), float(ppl)))
    dense = run.get("dense", {}).get("ppl", {}).get(metric)
    start = [(0.0, float(dense))] if dense is not None and math.isfinite(dense) and dense > 0 else []
    return [Curve(name, start + sorted(points)) for name, points in found.items()], missing


def ratio_plot(
    title: str, found: Sequence[Curve], order: Sequence[str], missing: Sequence[str] = (), scale: Scale = PERPLEXITY
) -> Plot | None:
    """Return perplexity (log axis) over the actual ratio, each line named at its end, after its place in `order`.

    A line that ends before the others has its number alone there. Colour, dash and marker follow the place too, see
    `palette`, so that figures of one order are read with one legend. Values far above the others (or infinite), and
    what baselines have above all others, are drawn on the upper edge, their names with an arrow, so that they do not
    squeeze the rest. Baselines are grey. None without a line.
    """
    shown = _shown(found, order)
    if not shown:
        return None
    high = _highest(shown)
    said = [f"{scale.noun.capitalize()} on a logarithmic axis against the share of prunable parameters removed."]
    said += [f"{c.name}: " + ", ".join(f"{format_percent(r)} % {format_figure(p, scale)}" for r, p in c.points) + "."
             for c in shown]  # fmt: skip
    if any(ppl > high for curve in shown for _, ppl in curve.points):
        said.append(f"Above {format_figure(high, scale)} points are drawn on the upper edge.")
    if any(curve.ends for curve in shown):
        said.append("Upright lines are intervals.")
    said += [f"Without a value above 0: {', '.join(missing)}."] if missing else []

    def paint(figure: Any) -> None:
        figure.set_layout_engine(None)
        figure.subplots_adjust(**_ROOM)
        axis = figure.subplots()
        _paint(axis, shown, order, scale)
        _name_ends(axis, shown, order, 72 * _HEIGHT * (_ROOM["top"] - _ROOM["bottom"]))

    return Plot("frontier", title, " ".join(said), paint, _HEIGHT, _WIDTH)


def beyond(found: Sequence[Curve], order: Sequence[str], scale: Scale = PERPLEXITY) -> list[str]:
    """Say which values of each line lie beyond the scale of its figure, a sentence a line."""
    shown = _shown(found, order)
    far = {curve.name: [(r, p) for r, p in curve.points if p > _highest(shown)] for curve in shown}
    return [
        f"{name}: {', '.join(f'{format_figure(p, scale)} at {format_percent(r)} %' for r, p in points)}"
        for name, points in far.items()
        if points
    ]


def ratio_panels(
    name: str, panels: Sequence[tuple[str, Sequence[Curve]]], order: Sequence[str], scale: Scale = PERPLEXITY
) -> list[Plot]:
    """Return the same lines for papers, a panel a text, with one legend of names; so many lines a figure."""
    drawn = [curve.name for _, found in panels for curve in found]
    names = [name for name in order if name in drawn]
    plots = []
    for start in range(0, len(names), RUNS):
        part = f"-part-{start // RUNS + 1}" if len(names) > RUNS else ""
        chosen = names[start : start + RUNS]
        some = [(title, shown) for title, found in panels if (shown := _shown(found, chosen))]
        height = 2.9 + 0.15 * max(0.0, len(chosen) / 2 - 5)
        paint = _panels(some, order, chosen, scale)
        plots.append(Plot(f"{name}{part}", f"{scale.noun.capitalize()} against ratio", "", paint, height, 6.75))
    return plots


def _panels(
    panels: Sequence[tuple[str, Sequence[Curve]]], order: Sequence[str], chosen: Sequence[str], scale: Scale
) -> Any:
    def paint(figure: Any) -> None:
        handles: dict[str, Any] = {}
        for axis, (title, shown) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            handles |= _paint(axis, shown, order, scale)
            letters = 34 if len(panels) < 3 else 22
            axis.set_title("\n".join(short_name(line, letters) for line in title.split("\n")))
        figure.axes[0].set_ylabel(f"{scale.noun} (log)")
        named = [short_name(name, _LETTERS) for name in chosen]
        columns = 3 if max(map(len, named)) < 24 else 2
        options = {"loc": "outside lower center", "ncols": columns, "handlelength": 3.6}
        figure.legend([handles[name] for name in chosen], named, **options)

    return paint


def _shown(found: Sequence[Curve], order: Sequence[str]) -> list[Curve]:
    return sorted((curve for curve in found if curve.name in order), key=lambda curve: order.index(curve.name))


def _highest(shown: Sequence[Curve]) -> float:
    """Return the upper end of the axis, at most four times the middle one of the curves' ends, baselines aside."""
    judged = [curve for curve in shown if not is_baseline(curve.name) and math.isfinite(curve.points[-1][1])]
    shown = judged or shown
    values = [ppl for curve in shown for _, ppl in curve.points if math.isfinite(ppl)]
    ends = sorted(curve.points[-1][1] for curve in shown if math.isfinite(curve.points[-1][1]))
    low, high = min(values, default=1.0), max(values, default=10.0)
    high = min(high, 4 * ends[(len(ends) - 1) // 2]) if ends else high
    return max(high, low * 1.06) * 1.06


def _paint(axis: Any, shown: Sequence[Curve], order: Sequence[str], scale: Scale) -> dict[str, Any]:
    """Draw the lines, the first on top, and the dense model if they have one; return the line of each name."""
    starts = {curve.points[0] for curve in shown}
    dense = next(iter(starts))[1] if len(starts) == 1 and next(iter(starts))[0] == 0 else None
    high = _highest(shown)
    low = min((ppl for curve in shown for _, ppl in curve.points if math.isfinite(ppl)), default=1.0)
    axis.set_ylim(low / (high / low) ** 0.09, high)  # below the lowest there is room for a name
    logarithmic(axis)
    handles = {}
    for curve in shown[::-1]:
        ratios, values = zip(*curve.points, strict=True)
        several = dense is not None and len(values) > 1
        options = line_style(order.index(curve.name), curve.name).options()
        whiskers = [((ratio, low), (ratio, min(top, high))) for ratio, low, top in curve.ends if low < high]
        in_one(axis, whiskers, axis.transData, color=options["color"], linewidth=1.0, alpha=0.8)
        options |= {"markevery": (1, 1) if several else None}
        (handles[curve.name],) = axis.plot(ratios, np.minimum(values, high), clip_on=False, **options)
    if dense is not None:
        axis.axhline(dense, color=INK, alpha=0.6, linewidth=0.8, linestyle=(0, (2, 4)), zorder=1, clip_on=False)
        axis.plot([0], [dense], "o", color=INK, clip_on=False)
        taken = any(dense / (high / low) ** 0.1 < curve.points[-1][1] < dense for curve in shown)
        place = {"xytext": (0, 4 if taken else -4), "va": "bottom" if taken else "top", "zorder": 3}
        place["bbox"] = {"facecolor": PAPER, "alpha": 0.7, "linewidth": 0, "pad": 1}
        axis.annotate(
            f"{DENSE} {format_figure(dense, scale)}", (1, dense), xycoords=("axes fraction", "data"), ha="right",
            textcoords="offset points", **place,
        )  # fmt: skip
    removed_across(axis, max(ratio for curve in shown for ratio, _ in curve.points))
    return handles


def _name_ends(axis: Any, shown: Sequence[Curve], order: Sequence[str], points: float) -> None:
    """Write number and name of each line beside its last point, moved apart where they would touch.

    The axis is so many points high.
    """
    from matplotlib.transforms import ScaledTranslation

    (low, high), right = map(float, axis.get_ylim()), float(axis.get_xlim()[1])
    decades = math.log(high) - math.log(low)
    columns: list[list[Curve]] = []
    for curve in sorted(shown, key=lambda curve: curve.points[-1][0]):
        near = columns and curve.points[-1][0] - columns[-1][-1].points[-1][0] < _NEAR * right
        columns[-1].append(curve) if near else columns.append([curve])
    for column in columns:
        column.sort(key=lambda curve: (curve.points[-1][1], order.index(curve.name)))
        wanted = [points * (math.log(min(curve.points[-1][1], high)) - math.log(low)) / decades for curve in column]
        gap = min(_GAP, points / max(len(column) - 1, 1))
        heights = spread(wanted, gap=gap, low=0.0, high=points)
        apart = max(abs(height - place) for height, place in zip(heights, wanted, strict=True)) > _GAP
        end = max(curve.points[-1][0] for curve in column)
        for curve, height in zip(column, heights, strict=True):
            number = f"{order.index(curve.name) + 1}{'↑' if curve.points[-1][1] > high else ''}"
            said = f"{number} {short_name(curve.name, _NAMED)}" if column is columns[-1] else number
            axis.annotate(
                said, (end, height / points), xytext=(18 if apart else 7, 0), xycoords=axis.get_xaxis_transform(),
                textcoords="offset points", va="center", annotation_clip=False, fontsize=_LETTER,
            )  # fmt: skip
        if apart:
            aside = axis.get_xaxis_transform() + ScaledTranslation(4 / 72, 0, axis.figure.dpi_scale_trans)
            wide = 12 / 72 / (axis.get_position().width * axis.figure.get_figwidth()) * right
            leaders = [((end, place / points), (end + wide, height / points))
                       for height, place in zip(heights, wanted, strict=True)]  # fmt: skip
            in_one(axis, leaders, aside, alpha=0.5)
