"""A chart on a page: an HTML table with a small SVG in each cell, of heat, an interval or a band.

Names and numbers are text of the page, so that they are readable at any width and never overlap: where the page is
narrow, the drawings of a line go below its name. Widths within a drawing are shares of the cell. Colours are classes of
the page's style sheet. For papers `figures.charts` draws the same chart.
"""

import math
from collections.abc import Sequence
from html import escape
from itertools import groupby

from saap_jax.report.page.blocks import Axis, Band, Chart, Column, Heat, Interval, Note, Number
from saap_jax.runtime.words import MINUS

LEVELS = 20
"""Steps of the scale of heat, classes `h0` to `h20`: few enough for small files."""

_HIGH = 22
"""Pixels that a line is high."""


def chart_html(chart: Chart) -> str:
    """Return a chart as HTML. Empty without a line."""
    if not chart.strips:
        return ""
    numbered = any(column.axis is None for column in chart.columns)
    axes = [(place, column.axis) for place, column in enumerate(chart.columns) if column.axis and column.lines]
    grids = "".join(f"--g{place}:{_grid(axis)};" for place, axis in axes)
    head = f'<th scope="col">{escape(chart.first)}</th>' + "".join(map(_head, chart.columns))
    body = []
    for strip in chart.strips:
        cells = "".join(
            f"<td{_class(column, place)}>{_cell(cell, column.axis)}</td>"
            for place, (column, cell) in enumerate(zip(chart.columns, strip.cells, strict=True))
        )
        mark = f' class="{strip.mark}"' if strip.mark else ""
        body.append(f'<tr{mark}><th scope="row">{breakable(strip.name)}</th>{cells}</tr>')
    style = f' style="{grids}"' if grids else ""
    return (
        f'<table class="chart{" numbered" if numbered else ""}"{style}><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>"
    )


def scale_html() -> str:
    """Return the scale of all cells of heat."""
    cells = "".join(f'<path class="h{level}" d="M{level} 0h1"/>' for level in range(LEVELS + 1))
    return (
        '<div class="scale" role="img" aria-label="Scale: dark 0 %, bright 100 %"><span>0 %</span>'
        f'<svg viewBox="0 -.5 {LEVELS + 1} 1" preserveAspectRatio="none" class="heat" aria-hidden="true">{cells}</svg>'
        "<span>100 %</span></div>"
    )


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
    return Axis(low, high, [(at, text.replace("-", MINUS)) for at, text in ticks])


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


def _cell(cell: Interval | Heat | Band | Note, axis: Axis | None) -> str:
    if isinstance(cell, Note):
        words = [escape(cell.text)] if cell.text else []
        return " ".join([*words, f"<small>{escape(cell.small)}</small>"] if cell.small else words)
    if isinstance(cell, Heat):
        return _heat(cell.shares, cell.said)
    if axis is None:
        raise ValueError(f"chart: expected an axis for a drawing, got none: {cell.said}")
    parts = _interval(axis, cell) if isinstance(cell, Interval) else _band(axis, cell.quantiles)
    return f'<svg height="{_HIGH}" role="img"><title>{escape(cell.said)}</title>{"".join(parts)}</svg>'


def _heat(shares: Sequence[Number], said: str) -> str:
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


def _interval(axis: Axis, cell: Interval) -> list[str]:
    """Return a value with its interval; ends beyond the axis are cut, a value there is an arrow."""
    middle = _HIGH / 2
    parts = []
    if not math.isnan(cell.low) and not math.isnan(cell.high):
        parts.append(_bar(axis.share(cell.low), axis.share(cell.high), middle - 1, 2, "whisker"))
    kind = "point" if cell.sure else "open"
    if cell.value > axis.high:
        parts.append(f'<text x="100%" y="{middle + 5}" text-anchor="end">→</text>')
    elif cell.value < axis.low:
        parts.append(f'<text x="0" y="{middle + 5}">←</text>')
    elif not math.isnan(cell.value):
        parts.append(f'<circle class="{kind}" cx="{_percent(axis.share(cell.value))}" cy="{middle:g}" r="4"/>')
    return parts


def _band(axis: Axis, quantiles: Sequence[Number]) -> list[str]:
    low, lower, middle, upper, high = (axis.share(value) for value in quantiles)
    return [
        _bar(low, high, _HIGH / 2 - 1, 2, "whisker"),
        _bar(lower, upper, _HIGH / 2 - 5, 10, "box"),
        f'<rect class="middle" x="{_percent(middle)}" y="{_HIGH / 2 - 6:g}" width="2" height="12"/>',
    ]


def _bar(low: Number, high: Number, top: Number, height: Number, kind: str) -> str:
    at, wide = _percent(low), _percent(max(high - low, 0.0))
    return f'<rect class="{kind}" x="{at}" y="{top:g}" width="{wide}" height="{height:g}"/>'


def _class(column: Column, place: int) -> str:
    if column.axis is None:
        return ""
    return f' class="strip g{place}"' if column.lines else ' class="strip"'


def _head(column: Column) -> str:
    if column.axis is None:
        return f'<th scope="col">{escape(column.title)}</th>'
    axis = column.axis
    ticks = "".join(f'<span style="left:{_percent(axis.share(at))}">{escape(text)}</span>' for at, text in axis.ticks)
    return f'<th scope="col">{escape(column.title)}<div class="ticks">{ticks}</div></th>'


def _grid(axis: Axis) -> str:
    """Return lines at the ticks as a background; the one at 0 is darker."""
    return ",".join(
        f"linear-gradient(var(--{'soft' if at == 0 else 'rule'}) 0 0) {_percent(axis.share(at))} 0/1px 100% no-repeat"
        for at, _ in axis.ticks
    )


def _percent(share: Number) -> str:
    return f"{100 * share:.2f}".rstrip("0").rstrip(".") + "%"
