"""Curves: figures against the ratio with their intervals and the ratio at which a limit is crossed, and learning."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from saap_jax.evaluation.scales import PERPLEXITY, Scale, format_figure
from saap_jax.report.blocks import Figure
from saap_jax.report.figures.draw import INK, is_baseline, line_style, logarithmic
from saap_jax.report.formats import Number, short_name

MOST = 14
"""Lines of a figure."""

_LINE = 0.165
"""Inches of a line of the legend."""

_LETTERS = 62


class Curve(NamedTuple):
    """A figure over the ratio."""

    name: str
    points: Sequence[tuple[float, float]]
    """(actual ratio, figure) by ratio, from the unpruned model on."""
    ends: Sequence[tuple[float, float, float]] = ()
    """(actual ratio, low, high) of the points that have an interval."""
    crossing: float = math.nan
    """The largest ratio that holds the limit."""
    knee: float = math.nan


class Limit(NamedTuple):
    """A figure that is not to be exceeded."""

    value: float
    said: str


def ratio_figure(
    name: str, title: str, curves: Sequence[Curve], scale: Scale = PERPLEXITY, limit: Limit | None = None
) -> Figure | None:
    """Return the first curves over the ratio, None without any.

    A perplexity is on a logarithmic axis, and so is a loss above 0. The axis ends at four times the middle one of the
    curves' ends, baselines aside; what is above, or infinite, is drawn on the upper edge, lest it squeeze the rest.
    Upright lines are intervals; where there is a limit, a line down is the largest ratio that holds it, a ring a knee.
    """
    curves = [curve for curve in curves if curve.points][:MOST]
    if not curves:
        return None
    height = 3.0 + _LINE * len(curves)
    return Figure(name, title, lambda figure: _paint(figure, curves, scale, limit, height), height)


def _paint(figure: Any, curves: Sequence[Curve], scale: Scale, limit: Limit | None, height: float) -> None:
    axis = figure.add_axes((0.11, 1 - 2.6 / height, 0.87, 2.5 / height))
    low, high = _ends(curves, limit)
    log = low > 0
    axis.set_ylim(*((low / 1.06, high * 1.06) if log else (low - 0.05 * (high - low), high + 0.05 * (high - low))))
    if log:
        logarithmic(axis)
    top = axis.get_ylim()[1]
    for place, curve in reversed([*enumerate(curves)]):  # the first on top
        ratios, values = zip(*curve.points, strict=True)
        style = line_style(place, curve.name)
        label = short_name(curve.name, _LETTERS)
        label += f": {100 * curve.crossing:.1f} %" if curve.crossing > 0 else ""
        axis.plot(ratios, np.minimum(values, top), label=label, clip_on=False, **style.options)
        axis.vlines(
            [at for at, *_ in curve.ends], [end for _, end, _ in curve.ends], [min(end, top) for *_, end in curve.ends],
            colors=style.colour, linewidth=1.0,
        )  # fmt: skip
        if limit and curve.crossing > 0:
            axis.vlines(curve.crossing, axis.get_ylim()[0], limit.value, colors=style.colour, linewidth=1.0)
        if not math.isnan(curve.knee):
            at = float(np.interp(curve.knee, ratios, values))
            axis.plot([curve.knee], [at], "o", color=style.colour, markersize=11, markerfacecolor="none")
    dense = {curve.points[0] for curve in curves}
    lines = [(value, f"unpruned {format_figure(value, scale)}") for at, value in dense if len(dense) == 1 and at == 0]
    for value, said in [*lines, *([(limit.value, limit.said)] if limit else [])]:
        axis.axhline(value, color=INK, linewidth=0.7, linestyle=(0, (2, 3)), zorder=1)
        axis.annotate(
            said, (1, value), xycoords=("axes fraction", "data"), xytext=(0, 2), textcoords="offset points", ha="right",
        )  # fmt: skip
    axis.set_xlim(0, 1.02 * max(ratio for curve in curves for ratio, _ in curve.points) or 1)
    axis.xaxis.set_major_formatter(lambda ratio, _: f"{100 * ratio:.3g} %")
    axis.set_xlabel("prunable parameters removed")
    axis.set_ylabel(scale.noun + " (log)" * log)
    _legend(axis, reverse=True)


def _ends(curves: Sequence[Curve], limit: Limit | None) -> tuple[float, float]:
    """Return the lowest and the highest figure of the axis."""
    judged = [curve for curve in curves if not is_baseline(curve.name) and math.isfinite(curve.points[-1][1])] or curves
    values = [value for curve in judged for _, value in curve.points if math.isfinite(value)]
    values += [end for curve in judged for end in (curve.ends[0][1:2] if curve.ends else ())]
    low, high = min(values, default=1.0), max(values, default=10.0)
    last = sorted(curve.points[-1][1] for curve in judged if math.isfinite(curve.points[-1][1]))
    if last and low > 0:
        high = min(high, 4 * last[(len(last) - 1) // 2])
    return low, max(high, limit.value if limit else high, low + 0.06 * abs(low))


def learning_figure(
    name: str, title: str, curves: Mapping[str, Sequence[tuple[Number, Number]]], *labels: str
) -> Figure:
    """Return a line a name, of (step, value), with labels below and beside the axes."""
    shown = dict([(each, points) for each, points in curves.items() if points][:MOST])
    height = 2.6 + _LINE * len(shown)

    def paint(figure: Any) -> None:
        axis = figure.add_axes((0.11, 1 - 2.2 / height, 0.87, 2.1 / height))
        for place, (each, points) in enumerate(shown.items()):
            steps, values = zip(*points, strict=True)
            style = line_style(place).options | {"markersize": 3 if len(steps) < 50 else 0}
            axis.plot(steps, values, label=short_name(each, _LETTERS), **style)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_xlabel(labels[0])
        axis.set_ylabel(labels[1])
        if shown:
            _legend(axis)

    return Figure(name, title, paint, height)


def _legend(axis: Any, reverse: bool = False) -> None:
    """Name the lines below the axes, one below the other."""
    inches = axis.get_position().height * axis.figure.get_figheight()
    axis.legend(loc="upper left", bbox_to_anchor=(-0.12, -0.42 / inches), reverse=reverse)
