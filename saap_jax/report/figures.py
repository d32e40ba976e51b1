"""Figures of a run as inline SVG: perplexity against ratio, and what each candidate keeps where.

Written by hand: a page may hold several without clashing identifiers, text stays text, and `currentColor` makes axes
follow the page, light or dark. Equal records give equal bytes.
"""

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from saap_jax.report.rows import DENSE, Record, labels
from saap_jax.report.tables import format_percent, format_ppl

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "currentColor")
"""Okabe and Ito's colours that stand out from white and from near black."""

_MARKERS = {
    "circle": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",
    "square": "M-4-4h8v8h-8z",
    "triangle": "M0-5.2L5 3.8H-5z",
    "diamond": "M0-5.5L5.5 0L0 5.5L-5.5 0z",
    "wedge": "M0 5.2L5-3.8H-5z",
    "cross": "M-4.5-4.5L4.5 4.5M4.5-4.5L-4.5 4.5",
    "plus": "M0-5.5V5.5M-5.5 0H5.5",
    "bar": "M-5-2h10v4h-10z",
}
"""Path of each marker about the origin. Seven colours and eight markers give 56 different pairs."""

_SCALE = ("#440154", "#482475", "#414487", "#355f8d", "#2a788e", "#21918c",
          "#22a884", "#44bf70", "#7ad151", "#bddf26", "#fde725")  # fmt: skip
"""Viridis at 0, 0.1, ..., 1."""

_LABEL_GAP, _LETTER = 17.0, 6.8

Number = float | int
"""A coordinate; checked at run time, `float` alone refuses whole numbers."""

Series = dict[str, list[tuple[float, float]]]
"""(actual ratio, perplexity) of each estimator, by ratio."""


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
        share = math.log(min(max(ppl, self.low), self.high) / self.low) / math.log(self.high / self.low)
        return self.bottom + (self.top - self.bottom) * share


def frontier(run: Record, candidates: Sequence[Record], metric: str) -> str:
    """Return perplexity (log axis) against the actual ratio, one line an estimator from the dense model on.

    Values far above the others (or infinite) are drawn on the upper edge, their number beside the name, so that they do
    not squeeze the rest; NaN is left out and named in the description.
    """
    series, missing = _series(run, candidates, metric)
    if not series:
        return ""
    right_margin = (
        _LETTER * max(len(f"{name} {format_ppl(points[-1][1])} at 20 %") for name, points in series.items()) + 44
    )
    width, height = 640 + right_margin, max(420.0, 70 + _LABEL_GAP * (len(series) + 1))
    plane = _plane(series, right=width - right_margin, bottom=height - 46)
    styles = {name: (_COLOURS[i % 7], list(_MARKERS)[i % 8]) for i, name in enumerate(series)}
    parts = [*_axes(plane), *_lines(series, styles, plane)]
    ends = {name: points[-1] for name, points in series.items()}
    ratio, dense = next(iter(series.values()))[0]
    if ratio == 0:
        parts += _dense_line(dense, plane)
        ends[DENSE], styles[DENSE] = (plane.ratio_max, dense), ("currentColor", "circle")
    parts += _end_labels(ends, styles, plane)
    beyond = any(ppl > plane.high for points in series.values() for _, ppl in points)
    said = [f"Perplexity {metric} on a logarithmic axis against the share of prunable parameters removed."]
    said += [f"{name}: " + ", ".join(f"{format_percent(r)} % {format_ppl(p)}" for r, p in points) + "."
             for name, points in series.items()]  # fmt: skip
    said += [f"Above {format_ppl(plane.high)} points are drawn on the upper edge."] if beyond else []
    said += [f"Without a value: {', '.join(missing)}."] if missing else []
    return _svg(width, height, f"Perplexity against ratio: {metric}", " ".join(said), parts)


def kept_map(run: Record, candidates: Sequence[Record], title: str) -> str:
    """Return the share of units that each candidate keeps in each layer, a panel a structure, a row a candidate."""
    structures = run.get("model", {}).get("units", {})
    rows = [(name, c["kept"]) for name, c in zip(labels(candidates), candidates, strict=True) if "kept" in c]
    layers = max((len(kept.get(s, ())) for _, kept in rows for s in structures), default=0)
    if not layers:
        return ""
    left = _LETTER * max(len(name) for name, _ in rows) + 14
    cell, tall = max(7.0, min(24.0, 720 / layers)), 20
    width, top, parts = left + cell * layers + 16, 0.0, []
    for structure, units in structures.items():
        parts.append(_text(left, top + 16, structure, anchor="start", weight=600))
        top += 24
        for name, kept in rows:
            parts.append(_text(left - 8, top + tall / 2 + 4, name, anchor="end"))
            counts = kept.get(structure, ())
            of = [units] * len(counts) if isinstance(units, int) else units
            for layer, (count, total) in enumerate(zip(counts, of, strict=True)):
                if total:
                    said = f"{name}, {structure}, layer {layer}: keeps {count} of {total}"
                    parts.append(_cell(left + cell * layer, top, cell - 1, tall - 1, count / total, said))
            top += tall
        step = next(step for step in (1, 2, 5, 10, 20, 50, 100) if step * cell >= 22 or step == 100)
        parts.append(_text(left - 8, top + 14, "layer", anchor="end", faint=True))
        parts += [_text(left + cell * (i + 0.5), top + 14, str(i)) for i in range(0, layers, step)]
        top += 26
    parts.append(_text(left - 8, top + 14, "units kept, %", anchor="end", faint=True))
    bar = 20.0
    for index in range(11):
        parts.append(_cell(left + bar * index, top + 4, bar, 12, index / 10, f"{10 * index} % kept"))
    parts += [_text(left + bar * (i + 0.5), top + 30, str(10 * i)) for i in (0, 5, 10)]
    said = f"Share of units kept, by layer, of {', '.join(structures)}; rows: {', '.join(name for name, _ in rows)}."
    return _svg(max(width, left + 240), top + 38, title, said, parts)


def _series(run: Record, candidates: Sequence[Record], metric: str) -> tuple[Series, list[str]]:
    """Return (actual ratio, perplexity) of each estimator, dense first, and the candidates without a number."""
    found: Series = {}
    missing = []
    for name, candidate in sorted(zip(labels(candidates), candidates, strict=True), key=lambda pair: pair[0]):
        ppl = candidate.get("ppl", {}).get(metric)
        if ppl is None or math.isnan(ppl) or ppl <= 0:
            missing.append(candidate["candidate"])
        else:
            found.setdefault(name, []).append((float(candidate["ratio_actual"]), float(ppl)))
    dense = run.get("dense", {}).get("ppl", {}).get(metric)
    start = [(0.0, float(dense))] if dense is not None and math.isfinite(dense) else []
    return {name: start + sorted(points) for name, points in found.items()}, missing


def _plane(series: Series, right: float, bottom: float) -> _Plane:
    values = [ppl for points in series.values() for _, ppl in points if math.isfinite(ppl)]
    last = sorted(points[-1][1] for points in series.values() if math.isfinite(points[-1][1]))
    low, high = min(values, default=1.0), max(values, default=10.0)
    if last:
        high = min(high, 4 * last[(len(last) - 1) // 2])
    low, high = low / 1.15, max(high, low) * 1.06
    ratio = max(ratio for points in series.values() for ratio, _ in points)
    return _Plane(58.0, right, 14.0, bottom, ratio_max=max(ratio, 0.01) * 1.03, low=low, high=high)


def _axes(plane: _Plane) -> list[str]:
    parts = []
    for tick in log_ticks(plane.low, plane.high):
        y = plane.y(tick)
        parts.append(_line(plane.left, y, plane.right, y, opacity=0.15))
        parts.append(_text(plane.left - 8, y + 4, f"{tick:g}" if tick < 1e5 else format_ppl(tick), anchor="end"))
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if plane.ratio_max / s <= 8)
    for index in range(int(plane.ratio_max / step) + 1):
        x = plane.x(index * step)
        parts.append(_line(x, plane.bottom, x, plane.bottom + 5, opacity=0.6))
        parts.append(_text(x, plane.bottom + 19, f"{100 * index * step:.0f} %"))
    parts.append(_line(plane.left, plane.bottom, plane.right, plane.bottom, opacity=0.6))
    middle = (plane.left + plane.right) / 2
    parts.append(_text(middle, plane.bottom + 38, "prunable parameters removed", faint=True))
    turned = f"rotate(-90 14 {(plane.top + plane.bottom) / 2:.1f})"
    parts.append(_text(14, (plane.top + plane.bottom) / 2, "perplexity (log)", faint=True, transform=turned))
    return parts


def _lines(series: Series, styles: dict[str, tuple[str, str]], plane: _Plane) -> list[str]:
    parts = []
    for index, (name, points) in enumerate(series.items()):
        colour, marker = styles[name]
        dash = ' stroke-dasharray="6 3"' if index % 14 >= 7 else ""
        places = [(plane.x(ratio), plane.y(ppl)) for ratio, ppl in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"{dash}/>')
        for (x, y), (ratio, ppl) in zip(places, points, strict=True):
            said = f"{name}: {format_percent(ratio)} % removed, perplexity {format_ppl(ppl)}"
            parts.append(_marker(x, y, marker, colour, said) if ratio else "")  # the dense model has its own mark
    return parts


def _dense_line(dense: float, plane: _Plane) -> list[str]:
    x, y = plane.x(0.0), plane.y(dense)
    line = f'<path d="M{x:.1f} {y:.1f}H{plane.right:.1f}" stroke="currentColor" stroke-opacity="0.6"'
    return [f'{line} stroke-dasharray="2 4"/>', _marker(x, y, "circle", "currentColor", f"{DENSE} {format_ppl(dense)}")]


def _end_labels(ends: dict[str, tuple[float, float]], styles: dict[str, tuple[str, str]], plane: _Plane) -> list[str]:
    """Return the name and last value of each line at the right edge, moved apart, with a leader to the last point."""
    parts = []
    down = sorted(ends.items(), key=lambda end: (-end[1][1], end[0]))
    wanted = [plane.y(ppl) for _, (_, ppl) in down]
    heights = spread(wanted, gap=_LABEL_GAP, low=plane.top, high=plane.bottom)
    for (name, (ratio, ppl)), y, height in zip(down, wanted, heights, strict=True):
        colour, marker = styles[name]
        x = plane.x(ratio)
        leader = f"M{x + 7:.1f} {y:.1f}L{plane.right + 16:.1f} {height:.1f}"
        parts.append(f'<path d="{leader}" fill="none" stroke="{colour}" stroke-opacity="0.45"/>')
        parts.append(_marker(plane.right + 24, height, marker, colour, name))
        value = f"{format_ppl(ppl)}{' ↑' if ppl > plane.high else ''}"
        value += f" at {100 * ratio:.0f} %" if ratio < 0.9 * plane.ratio_max else ""
        parts.append(_text(plane.right + 35, height + 4, name, anchor="start", then=value))
    return parts


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
    """Return places near the wanted ones (ascending) that are at least `gap` apart, within [low, high] if they fit.

    >>> spread([10.0, 11.0, 50.0], gap=10.0, low=0.0, high=60.0)
    [10.0, 20.0, 50.0]
    """
    places: list[float] = []
    for place in wanted:
        places.append(max(place, low, places[-1] + gap if places else -math.inf))
    limit = high
    for index in reversed(range(len(places))):
        places[index] = min(places[index], limit)
        limit = places[index] - gap
    return places


def _svg(width: Number, height: Number, title: str, description: str, parts: Iterable[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" role="img" aria-label="{escape(title)}" font-size="12" fill="currentColor">'
    )
    return "\n".join((head, f"<title>{escape(title)}</title>", f"<desc>{escape(description)}</desc>", *parts, "</svg>"))


def _text(
    x: Number,
    y: Number,
    text: str,
    *,
    anchor: str = "middle",
    weight: int = 400,
    faint: bool = False,
    transform: str = "",
    then: str = "",
) -> str:
    """Return a text, and a fainter one after it."""
    extra = f' font-weight="{weight}"' if weight != 400 else ""
    extra += ' fill-opacity="0.75"' if faint else ""
    extra += f' transform="{transform}"' if transform else ""
    after = f'<tspan dx="6" fill-opacity="0.75">{escape(then)}</tspan>' if then else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(text)}{after}</text>'


def _line(x1: Number, y1: Number, x2: Number, y2: Number, *, opacity: Number) -> str:
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="currentColor" stroke-opacity="{opacity}"/>'


def _marker(x: Number, y: Number, marker: str, colour: str, said: str) -> str:
    return (
        f'<path transform="translate({x:.1f} {y:.1f})" d="{_MARKERS[marker]}" fill="{colour}" stroke="{colour}" '
        f'stroke-width="1.6"><title>{escape(said)}</title></path>'
    )


def _cell(x: Number, y: Number, width: Number, height: Number, share: Number, said: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour_of(share)}">'
        f"<title>{escape(said)}</title></rect>"
    )


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
