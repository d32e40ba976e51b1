"""Perplexity against ratio as inline SVG, and what all hand-written drawings share.

Written by hand: a page may hold several without clashing identifiers, text stays text, and colours are classes of the
page's style sheet, so that a drawing follows the page, light or dark. Equal records give equal bytes.
"""

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from saap_jax.report.figures.palette import line_style
from saap_jax.report.kinds.tables import format_percent, format_ppl
from saap_jax.report.page.blocks import Number
from saap_jax.report.rows import DENSE, Record, labels

MARKERS = {
    "circle": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",
    "square": "M-4-4h8v8h-8z",
    "triangle": "M0-5.2L5 3.8H-5z",
    "diamond": "M0-5.5L5.5 0L0 5.5L-5.5 0z",
    "wedge": "M0 5.2L5-3.8H-5z",
    "cross": "M-4.5-4.5L4.5 4.5M4.5-4.5L-4.5 4.5",
    "plus": "M0-5.5V5.5M-5.5 0H5.5",
    "bar": "M-5-2h10v4h-10z",
}
"""Path of each marker about the origin, in the order of `palette.LineStyle.marker`."""

_SCALE = ("#440154", "#482475", "#414487", "#355f8d", "#2a788e", "#21918c",
          "#22a884", "#44bf70", "#7ad151", "#bddf26", "#fde725")  # fmt: skip
"""Viridis at 0, 0.1, ..., 1."""

_WIDTH, _HEIGHT, _NUMBER_GAP = 440.0, 320.0, 12.5

_NEAR = 0.05
"""Share of the axis within which the ends of curves count as one column of numbers."""


class Curve(NamedTuple):
    """Perplexity over ratio."""

    name: str
    points: Sequence[tuple[float, float]]
    """(actual ratio, perplexity) by ratio, the dense model first."""


class _Plane(NamedTuple):
    """Maps ratio (linear) and perplexity (logarithmic) to the drawing; values beyond an edge are drawn on it."""

    left: float
    right: float
    top: float
    bottom: float
    ratio_max: float
    low: float
    high: float

    def x(self, ratio: float) -> float:
        return self.left + (self.right - self.left) * ratio / self.ratio_max

    def y(self, ppl: float) -> float:
        low, high, at = (math.log(value) for value in (self.low, self.high, min(max(ppl, self.low), self.high)))
        share = (at - low) / (high - low)
        return self.bottom + (self.top - self.bottom) * share


def curves(run: Record, candidates: Sequence[Record], metric: str) -> tuple[list[Curve], list[str]]:
    """Return the curve of each variant on a metric, by name, and the candidates without a number."""
    found: dict[str, list[tuple[float, float]]] = {}
    missing = []
    for name, candidate in sorted(zip(labels(candidates), candidates, strict=True), key=lambda pair: pair[0]):
        ppl = candidate.get("ppl", {}).get(metric)
        if ppl is None or math.isnan(ppl) or ppl <= 0:
            missing.append(candidate["candidate"])
        else:
            ratio = candidate.get("ratio_actual")
            ratio = candidate["ratio_asked"] if ratio is None else ratio
            found.setdefault(name, []).append((float(ratio), float(ppl)))
    dense = run.get("dense", {}).get("ppl", {}).get(metric)
    start = [(0.0, float(dense))] if dense is not None and math.isfinite(dense) else []
    return [Curve(name, start + sorted(points)) for name, points in found.items()], missing


def frontier(found: Sequence[Curve], order: Sequence[str], title: str, missing: Sequence[str] = ()) -> str:
    """Return perplexity (log axis) over the actual ratio, a line a curve, numbered at its end by its place in `order`.

    Colour, dash and marker follow the place too, see `palette`, so that drawings of one order are read with one
    `legend`. Values far above the others (or infinite) are drawn on the upper edge with an arrow, so that they do not
    squeeze the rest. Empty without a curve.
    """
    shown = [curve for curve in found if curve.name in order]
    if not shown:
        return ""
    plane = _plane(shown)
    places = {name: place for place, name in enumerate(order)}
    shown.sort(key=lambda curve: -places[curve.name])  # the first lies on top
    starts = {curve.points[0] for curve in shown}
    dense = next(iter(starts))[1] if len(starts) == 1 and next(iter(starts))[0] == 0 else None
    parts = [*_axes(plane)]
    if dense is not None:
        parts += _dense_line(dense, plane, [plane.y(curve.points[-1][1]) for curve in shown])
    for curve in shown:
        parts += _curve(curve, places[curve.name], plane, start=dense is None)
    parts += _numbers(shown, places, plane)
    said = ["Perplexity on a logarithmic axis against the share of prunable parameters removed."]
    said += [f"{c.name}: " + ", ".join(f"{format_percent(r)} % {format_ppl(p)}" for r, p in c.points) + "."
             for c in sorted(shown, key=lambda curve: places[curve.name])]  # fmt: skip
    if any(ppl > plane.high for curve in shown for _, ppl in curve.points):
        said.append(f"Above {format_ppl(plane.high)} points are drawn on the upper edge.")
    said += [f"Without a value: {', '.join(missing)}."] if missing else []
    return _svg(_WIDTH, _HEIGHT, title, " ".join(said), parts, style="plot")


def legend(order: Sequence[str]) -> str:
    """Return the names of an order as an HTML list, each with its number, line and marker."""
    lines = []
    for place, name in enumerate(order):
        kind = f"k{line_style(place).colour}"
        key = f'<svg class="{kind}" width="54" height="14" viewBox="-27 -7 54 14" aria-hidden="true">'
        line = f'<path d="M-27 0H27" class="curve"{_dash(place)}/>'
        lines.append(f"<li>{key}{line}{_path(place)}</svg> {escape(name)}</li>")
    return f'<ol class="legend">{"".join(lines)}</ol>'


def log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers within [low, high], the coarsest set that has at least four, thinned to nine at most.

    >>> log_ticks(9.0, 20_000.0)
    [10.0, 100.0, 1000.0, 10000.0]
    >>> log_ticks(11.0, 90.0)
    [15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 80.0]
    """
    ticks: list[float] = []
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for steps in ((10,), (10, 20, 50), (10, 15, 20, 30, 40, 50, 60, 80), tuple(range(10, 100, 2)), range(100, 1000, 5)):
        unit = 10 if steps[0] == 10 else 100
        ticks = [float(f"{step}e{decade}") / unit for decade in decades for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 4:
            break
    return ticks[:: math.ceil(len(ticks) / 9)] if ticks else [low]


def spread(wanted: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Return the places nearest to the wanted ones (ascending) that are `gap` apart, within [low, high] if they fit.

    Nearest is least squares: less the gaps before them, the places are the isotonic regression of the wanted ones.

    >>> spread([10.0, 11.0, 50.0], gap=10.0, low=0.0, high=60.0)
    [5.5, 15.5, 50.0]
    """
    blocks: list[tuple[float, int]] = []  # mean and number of neighbours that touch
    for index, place in enumerate(wanted):
        mean, many = place - gap * index, 1
        while blocks and blocks[-1][0] > mean:
            before, number = blocks.pop()
            mean, many = (before * number + mean * many) / (number + many), number + many
        blocks.append((mean, many))
    last = high - gap * (len(wanted) - 1)
    means = [min(max(mean, low), max(last, low)) for mean, many in blocks for _ in range(many)]
    return [mean + gap * index for index, mean in enumerate(means)]


def _plane(found: Sequence[Curve]) -> _Plane:
    values = [ppl for curve in found for _, ppl in curve.points if math.isfinite(ppl)]
    last = sorted(curve.points[-1][1] for curve in found if math.isfinite(curve.points[-1][1]))
    low, high = min(values, default=1.0), max(values, default=10.0)
    if last:
        high = min(high, 4 * last[(len(last) - 1) // 2])
    top, bottom, room = 12.0, _HEIGHT - 44, 22.0
    high = max(high, low * 1.06) * 1.06
    low /= (high / low) ** (room / (bottom - top - room))  # below the lowest there is room for a label
    ratio = max(ratio for curve in found for ratio, _ in curve.points)
    return _Plane(56.0, _WIDTH - 36, top, bottom, ratio_max=max(ratio, 0.01) * 1.02, low=low, high=high)


def _axes(plane: _Plane) -> list[str]:
    parts = []
    for tick in log_ticks(plane.low, plane.high):
        y = plane.y(tick)
        parts.append(_line(plane.left, y, plane.right, y, opacity=0.15))
        parts.append(_text(plane.left - 7, y + 4, f"{tick:g}" if tick < 1e5 else format_ppl(tick), anchor="end"))
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if plane.ratio_max / s <= 8)
    for index in range(int(plane.ratio_max / step) + 1):
        x = plane.x(index * step)
        parts.append(_line(x, plane.bottom, x, plane.bottom + 5, opacity=0.6))
        parts.append(_text(x, plane.bottom + 20, f"{100 * index * step:.0f} %"))
    parts.append(_line(plane.left, plane.bottom, plane.right, plane.bottom, opacity=0.6))
    middle = (plane.left + plane.right) / 2
    return [*parts, _text(middle, plane.bottom + 39, "prunable parameters removed", faint=True)]


def _curve(curve: Curve, place: int, plane: _Plane, *, start: bool) -> list[str]:
    """Return a line with its markers; the dense model has one of its own unless it is the `start` of this line."""
    places = [(plane.x(ratio), plane.y(ppl)) for ratio, ppl in curve.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    said = ", ".join(f"{format_percent(ratio)} % removed {format_ppl(ppl)}" for ratio, ppl in curve.points)
    marks = [
        f'<g transform="translate({x:.1f} {y:.1f})">{_path(place)}</g>'
        for (x, y), (ratio, _) in zip(places, curve.points, strict=True)
        if ratio or start
    ]
    line = f'<polyline points="{path}" class="curve"{_dash(place)}/>'
    title = f"<title>{escape(curve.name)}: {said}</title>"
    return [f'<g class="k{line_style(place).colour}">{title}{line}', *marks, "</g>"]


def _dash(place: int) -> str:
    lengths = " ".join(f"{length:g}" for length in line_style(place).dash)
    return f' stroke-dasharray="{lengths}"' if lengths else ""


def _path(place: int) -> str:
    """Return the marker of a place about the origin."""
    path = list(MARKERS.values())[line_style(place).marker]
    return f'<path class="mark" d="{path}"/>'


def _dense_line(dense: float, plane: _Plane, ends: Sequence[float]) -> list[str]:
    """Return the level of the dense model with its name, below the line unless a curve ends there."""
    x, y = plane.x(0.0), plane.y(dense)
    taken = any(y < end < y + 26 for end in ends)
    line = f'<path d="M{x:.1f} {y:.1f}H{plane.right:.1f}" stroke="currentColor" stroke-opacity="0.6"'
    return [
        f'{line} stroke-dasharray="2 4"/>',
        f'<g transform="translate({x:.1f} {y:.1f})">{_path(0)}<title>{DENSE} {format_ppl(dense)}</title></g>',
        _text(plane.right, y + (-7 if taken else 15), f"{DENSE} {format_ppl(dense)}", anchor="end", faint=True),
    ]


def _numbers(found: Sequence[Curve], places: dict[str, int], plane: _Plane) -> list[str]:
    """Return the number of each curve beside its last point, moved apart where they would touch."""
    parts = []
    columns: list[list[Curve]] = []
    for curve in sorted(found, key=lambda curve: curve.points[-1][0]):
        near = columns and curve.points[-1][0] - columns[-1][-1].points[-1][0] < _NEAR * plane.ratio_max
        columns[-1].append(curve) if near else columns.append([curve])
    for column in columns:
        column.sort(key=lambda curve: (-curve.points[-1][1], -places[curve.name]))
        wanted = [plane.y(curve.points[-1][1]) for curve in column]
        heights = spread(wanted, gap=_NUMBER_GAP, low=plane.top, high=plane.bottom)
        end = max(plane.x(curve.points[-1][0]) for curve in column)
        apart = max(abs(height - place) for height, place in zip(heights, wanted, strict=True))
        left = end + (20 if apart > _NUMBER_GAP else 9)
        for curve, height, place in zip(column, heights, wanted, strict=True):
            said = f"{places[curve.name] + 1}{'↑' if curve.points[-1][1] > plane.high else ''}"
            text = f'<text x="{left:.1f}" y="{height + 4:.1f}">{said}</text>'
            if apart > _NUMBER_GAP:
                text += f'<path d="M{end + 7:.1f} {place:.1f}L{left - 2:.1f} {height:.1f}" class="leader"/>'
            parts.append(f'<g class="k{line_style(places[curve.name]).colour}">{text}</g>')
    return parts


def _svg(
    width: Number, height: Number, title: str, description: str, parts: Iterable[str], style: str | None = None
) -> str:
    """Return a drawing; of a `style` of the page it is as wide as its place, else as wide as it says."""
    size = f'class="{style}"' if style else f'width="{width:.0f}" height="{height:.0f}"'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" {size} role="img" '
        f'aria-label="{escape(title)}" font-size="12" fill="currentColor">'
    )
    return "\n".join((head, f"<title>{escape(title)}</title>", f"<desc>{escape(description)}</desc>", *parts, "</svg>"))


def _text(x: Number, y: Number, text: str, *, anchor: str = "middle", weight: int = 400, faint: bool = False) -> str:
    extra = f' font-weight="{weight}"' if weight != 400 else ""
    extra += ' class="faint" fill-opacity="0.75"' if faint else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(text)}</text>'


def _line(x1: Number, y1: Number, x2: Number, y2: Number, *, opacity: Number) -> str:
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="currentColor" stroke-opacity="{opacity}"/>'


def colour_of(share: float) -> str:
    """Return the colour of a share in [0, 1] on the viridis scale, dark = 0.

    >>> colour_of(0.0), colour_of(1.0)
    ('#440154', '#fde725')
    """
    position = min(max(share, 0.0), 1.0) * (len(_SCALE) - 1)
    index = min(int(position), len(_SCALE) - 2)
    below, above = (tuple(bytes.fromhex(colour[1:])) for colour in _SCALE[index : index + 2])
    mixed = (round(a + (b - a) * (position - index)) for a, b in zip(below, above, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)
