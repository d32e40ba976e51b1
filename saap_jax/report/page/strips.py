"""Charts of one line a name, as an HTML table with a small SVG in each cell: cells of heat, intervals, bands.

Names and numbers are text of the page, so that they are readable at any width and never overlap: where the page is
narrow, the drawings of a line go below its name. Widths within a drawing are shares of the cell. Colours are classes of
the page's style sheet.
"""

import math
from collections.abc import Sequence
from html import escape
from itertools import groupby
from typing import NamedTuple

from saap_jax.report.page.blocks import Number

LEVELS = 20
"""Steps of the scale of heat, classes `h0` to `h20`: few enough for small files."""

_HIGH = 22
"""Pixels that a line is high."""


class Axis(NamedTuple):
    """Maps values to shares of a cell, linear; values beyond an end are drawn on it."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]

    def share(self, value: Number) -> float:
        return (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)


class Column(NamedTuple):
    """A column of drawings, or without an axis, of numbers."""

    title: str
    axis: Axis | None = None
    lines: bool = True
    """Whether the ticks are lines through all cells."""


class Strip(NamedTuple):
    """A line: a name, and a cell a column (an SVG, or a text that is safe as HTML)."""

    name: str
    cells: Sequence[str]
    mark: str = ""
    """ "best", or nothing."""


def chart(first: str, columns: Sequence[Column], strips: Sequence[Strip]) -> str:
    """Return a chart as HTML; `first` is the heading of the names. Empty without a line."""
    if not strips:
        return ""
    numbered = any(column.axis is None for column in columns)
    grids = "".join(f"--g{i}:{_grid(column.axis)};" for i, column in enumerate(columns) if column.axis and column.lines)
    head = f'<th scope="col">{escape(first)}</th>' + "".join(map(_head, columns))
    body = []
    for strip in strips:
        cells = "".join(
            f"<td{_class(column, i)}>{cell}</td>"
            for i, (column, cell) in enumerate(zip(columns, strip.cells, strict=True))
        )
        mark = f' class="{strip.mark}"' if strip.mark else ""
        body.append(f'<tr{mark}><th scope="row">{breakable(strip.name)}</th>{cells}</tr>')
    style = f' style="{grids}"' if grids else ""
    return (
        f'<table class="chart{" numbered" if numbered else ""}"{style}><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>"
    )


def heat(shares: Sequence[Number], said: str) -> str:
    """Return shares in [0, 1] as cells side by side, dark = 0; NaN is left blank. `said` is what it says in words."""
    levels = [-1 if math.isnan(share) else round(LEVELS * min(max(share, 0.0), 1.0)) for share in shares]
    paths: dict[int, str] = {}
    start = 0
    for level, group in groupby(levels):
        length = len(list(group))
        if level >= 0:
            paths[level] = f"{paths.get(level, '')}M{start} 0h{length}"
        start += length
    drawn = "".join(f'<path class="h{level}" d="{path}"/>' for level, path in sorted(paths.items()))
    return (
        f'<svg viewBox="0 -.5 {len(levels)} 1" preserveAspectRatio="none" class="heat" role="img">'
        f"<title>{escape(said)}</title>{drawn}</svg>"
    )


def interval(axis: Axis, value: Number, low: Number, high: Number, said: str, *, sure: bool = True) -> str:
    """Return a value with its interval; where it is not `sure`, the point is hollow. Ends beyond the axis are cut."""
    middle = _HIGH / 2
    parts = []
    if not math.isnan(low) and not math.isnan(high):
        parts.append(_bar(axis.share(low), axis.share(high), middle - 1, 2, "whisker"))
    kind = "point" if sure else "open"
    if value > axis.high:
        parts.append(f'<text x="100%" y="{middle + 5}" text-anchor="end">→</text>')
    elif value < axis.low:
        parts.append(f'<text x="0" y="{middle + 5}">←</text>')
    elif not math.isnan(value):
        parts.append(f'<circle class="{kind}" cx="{_percent(axis.share(value))}" cy="{middle:g}" r="4"/>')
    return _cell(parts, said)


def band(axis: Axis, quantiles: Sequence[Number], said: str) -> str:
    """Return five quantiles: a thin bar between the outer ones, a thick one between the inner ones and a mark."""
    low, lower, middle, upper, high = (axis.share(value) for value in quantiles)
    parts = [
        _bar(low, high, _HIGH / 2 - 1, 2, "whisker"),
        _bar(lower, upper, _HIGH / 2 - 5, 10, "box"),
        f'<rect class="middle" x="{_percent(middle)}" y="{_HIGH / 2 - 6:g}" width="2" height="12"/>',
    ]
    return _cell(parts, said)


def nice_axis(low: Number, high: Number, *, most: int = 5, unit: str = "") -> Axis:
    """Return an axis that holds both ends, with few round ticks, signed.

    >>> nice_axis(-1.0, 11.0).ticks
    [(0.0, '0'), (5.0, '+5'), (10.0, '+10')]
    """
    width = max(high - low, 1e-9)
    power = 10.0 ** math.floor(math.log10(width))
    step = next(s * power for s in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0) if width / (s * power) <= most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    ticks = [(float(f"{i * step:.6g}"), f"{i * step:+.6g}{unit}" if i else "0") for i in range(first, last + 1)]
    return Axis(low, high, [(at, text.replace("-", "\N{MINUS SIGN}")) for at, text in ticks])


def layer_axis(layers: int) -> Axis:
    """Return the axis of a heat of so many layers; each number stands below the middle of its cell.

    >>> [at for at, _ in layer_axis(30).ticks]
    [0, 10, 20, 29]
    """
    last = layers - 1
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if last <= 4 * step or step == 1000)
    shown = [layer for layer in range(0, last, step) if last - layer > step / 2] + [last]
    return Axis(-0.5, last + 0.5, [(layer, str(layer)) for layer in shown])


def breakable(text: str) -> str:
    """Return text as HTML that may be broken behind a comma, as names of variants want it.

    >>> breakable("a<b,global")
    'a&lt;b,<wbr>global'
    """
    return escape(text).replace(",", ",<wbr>")


def _cell(parts: Sequence[str], said: str) -> str:
    return f'<svg height="{_HIGH}" role="img"><title>{escape(said)}</title>{"".join(parts)}</svg>'


def _bar(low: Number, high: Number, top: Number, height: Number, kind: str) -> str:
    at, wide = _percent(low), _percent(max(high - low, 0.0))
    return f'<rect class="{kind}" x="{at}" y="{top:g}" width="{wide}" height="{height:g}"/>'


def _class(column: Column, index: int) -> str:
    if column.axis is None:
        return ""
    return f' class="strip g{index}"' if column.lines else ' class="strip"'


def _head(column: Column) -> str:
    if column.axis is None:
        return f'<th scope="col">{escape(column.title)}</th>'
    axis = column.axis
    ticks = "".join(
        f'<span style="left:{_percent(axis.share(at))}">{escape(text)}</span>' for at, text in column.axis.ticks
    )
    return f'<th scope="col">{escape(column.title)}<div class="ticks">{ticks}</div></th>'


def _grid(axis: Axis) -> str:
    """Return lines at the ticks as a background; the one at 0 is darker."""
    return ",".join(
        f"linear-gradient(var(--{'soft' if at == 0 else 'rule'}) 0 0) {_percent(axis.share(at))} 0/1px 100% no-repeat"
        for at, _ in axis.ticks
    )


def _percent(share: Number) -> str:
    return f"{100 * share:.2f}".rstrip("0").rstrip(".") + "%"
