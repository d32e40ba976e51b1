"""How faithful estimators are to the oracle: the ranking as a table, and each score against the exact change."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text
from scipy.stats import rankdata

from saap_jax.evaluation.fidelity import MEASURES, SCOPES, Fidelity
from saap_jax.evaluation.paired import FEWEST, LEVEL
from saap_jax.report.figures.ratio import _line, _svg, _text, colour_of
from saap_jax.report.kinds.tables import BEST, TIED
from saap_jax.report.page.blocks import plural
from saap_jax.report.page.csv_text import csv_text
from saap_jax.types import STRUCTURES, Scores

MINUS = "\N{MINUS SIGN}"

_COLUMNS, _WIDE, _HIGH = 5, 172.0, 132.0
"""Panels side by side, and the size of one."""

_LEFT, _HEAD, _GAP, _LETTERS = 74.0, 40.0, 14.0, 26
"""Room for the axis, room for a panel's two lines of title, between panels; letters of a name that fit."""

_BUCKETS = 10
"""Colours that tell layers apart."""

Ranked = tuple[str, dict[str, Fidelity]]
"""An estimator and its correlations by measure."""


class _Axis(NamedTuple):
    """Maps a change to [0, 1]: linear near 0, logarithmic beyond `unit` on both sides."""

    unit: float
    low: float
    high: float

    def share(self, change: float) -> float:
        low, high, at = (math.asinh(value / self.unit) for value in (self.low, self.high, change))
        return (at - low) / (high - low)


def ranking(rows: Sequence[Fidelity], scope: str) -> list[Ranked]:
    """Return the estimators of a scope by Spearman's correlation, best first, those without one last."""
    found: dict[str, dict[str, Fidelity]] = {}
    for row in rows:
        if row.scope == scope:
            found.setdefault(row.estimator, {})[row.measure] = row

    def quality(item: Ranked) -> float:
        value = item[1]["spearman"].value
        return -value if math.isfinite(value) else math.inf

    return sorted(found.items(), key=quality)


def marked(estimator: str, found: dict[str, Fidelity], ranked: Sequence[Ranked]) -> str:
    """Return the name of an estimator with the mark of the highest correlation, or of what cannot be told from it."""
    row = found["spearman"]
    if row is ranked[0][1]["spearman"] and math.isfinite(row.value):
        return f"{estimator} {BEST}"
    return f"{estimator} {TIED}" if row.tied else estimator


def legend(ranked: Sequence[Ranked]) -> str:
    """Say what the marks mean, or why nothing is tested."""
    rows = [found["spearman"] for _, found in ranked]
    said = f"{BEST} highest Spearman"
    if any(row.tied for row in rows):
        return f"{said}   {TIED} cannot be told apart from it (paired bootstrap, Holm, {100 * LEVEL:g} %)"
    why = untested(rows)
    return f"{said}; without intervals and tests: {why}" if why else said


def untested(rows: Sequence[Fidelity]) -> str:
    """Say why correlations of a scope have no intervals: few units or windows; empty where they suffice."""
    units, windows = (max((getattr(row, name) for row in rows), default=0) for name in ("units", "windows"))
    few = [(units, "unit")] + ([(windows, "window")] if windows else [])
    return next((f"{plural(many, of)}, where it takes {FEWEST}" for many, of in few if many < FEWEST), "")


def rich_fidelity_table(rows: Sequence[Fidelity], scope: str) -> Table:
    """Return the ranking of one scope (`attention`, `mlp`, `pooled`) for a terminal of 100 columns."""
    ranked = ranking(rows, scope)
    shown = [m for m in ("spearman", "kendall", "spearman_in_layers") if scope != "pooled" or "layers" not in m]
    title = f"{_about(scope, ranked)}: rank correlation with the exact change of the loss"
    table = Table(
        title=Text(title, style="italic"),
        caption=Text(legend(ranked)) if ranked else None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        padding=(0, 1, 0, 0),
    )
    table.add_column("estimator", overflow="fold")
    for measure in shown:
        table.add_column(heading(measure), justify="right", no_wrap=True)
    for estimator, found in ranked:
        table.add_row(
            Text(marked(estimator, found, ranked)), *(format_interval(found[measure], width=5) for measure in shown)
        )
    return table


def markdown_fidelity(rows: Sequence[Fidelity]) -> str:
    """Return the rankings of all scopes as Markdown."""
    parts = []
    for scope in SCOPES:
        ranked = ranking(rows, scope)
        measures = [m for m in MEASURES if scope != "pooled" or "layers" not in m]
        lines = [["estimator", *map(heading, measures)], [":--", *["--:"] * len(measures)]]
        for name, found in ranked:
            said = marked(name, found, ranked).replace("|", "\\|").replace("*", "\\*")
            lines.append([said, *(format_interval(found[m]) for m in measures)])
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        said = f"\n{legend(ranked)}\n".replace("*", "\\*") if ranked else ""
        parts.append(f"{_about(scope, ranked)}\n\n{table}\n{said}")
    return "\n".join(parts)


def csv_fidelity(rows: Sequence[Fidelity]) -> str:
    """Return all correlations as CSV, one a line, in full precision; NaN is an empty cell."""
    return csv_text(Fidelity._fields, (["" if value != value else value for value in row] for row in rows))


def format_interval(row: Fidelity, *, width: int = 0) -> str:
    """Return a correlation with its interval, each number padded to `width`.

    >>> format_interval(Fidelity("wanda", "mlp", "kendall", 90, -0.181, -0.25, 0.004))
    '−0.18 [−0.25, 0.00]'
    """
    if math.isnan(row.value):
        return "n/a"
    value, low, high = (f"{_signed(number):>{width}}" for number in (row.value, row.low, row.high))
    return value if math.isnan(row.low) else f"{value} [{low}, {high}]"


def fidelity_scatter(scores: dict[str, Scores], exact: Scores, rows: Sequence[Fidelity]) -> str:
    """Return the rank of each unit's score against its exact change as SVG: a panel an estimator, best first.

    Each structure has rows of its own, with one axis of changes (linear near 0, logarithmic beyond). Colour is depth.
    Structures without a measured unit are left out; without any the drawing is empty.
    """
    depth = max(len(np.asarray(exact[name])) for name in STRUCTURES)
    parts: list[str] = []
    said: list[str] = []
    top, columns = 0.0, 1
    for name in STRUCTURES:
        ranked = ranking(rows, name)
        where = np.isfinite(np.asarray(exact[name], np.float64))
        if not (where.any() and ranked):
            continue
        changes, layers = np.asarray(exact[name], np.float64)[where], np.nonzero(where)[0]
        axis = _axis(changes)
        parts.append(_text(_LEFT, top + 16, _about(name, ranked), anchor="start", weight=600))
        top += 24
        columns = max(columns, min(_COLUMNS, len(ranked)))
        for index, (estimator, found) in enumerate(ranked):
            row, column = divmod(index, _COLUMNS)
            left, upper = _LEFT + column * (_WIDE + _GAP), top + row * (_HEAD + _HIGH + _GAP) + _HEAD
            ranks = rankdata(np.asarray(scores[estimator][name])[where]) / (len(changes) + 1)
            parts += _panel(left, upper, estimator, found["spearman"], axis, numbered=column == 0)
            parts += _points(left, upper, ranks, [axis.share(change) for change in changes], layers / max(depth - 1, 1))
        top += -(-len(ranked) // _COLUMNS) * (_HEAD + _HIGH + _GAP) + 8
        said.append(f"{name}: " + ", ".join(f"{e} {format_interval(f['spearman'])}" for e, f in ranked) + ".")
    if not parts:
        return ""
    width = max(_LEFT + columns * (_WIDE + _GAP), 700.0)
    parts += _legend(top, depth)
    about = "Rank of each unit's score against the exact change of the loss, colour by layer. Spearman's correlation:"
    return _svg(width, top + 44, "Scores against exact changes", " ".join([about, *said]), parts)


def _panel(left: float, top: float, estimator: str, spearman: Fidelity, axis: _Axis, *, numbered: bool) -> list[str]:
    """Return the frame, the ticks (numbered in the first column) and the two lines of title."""
    half = _LETTERS // 2  # both ends are shown: hyper-parameters come last
    short = estimator if len(estimator) <= _LETTERS else f"{estimator[: half - 1]}…{estimator[-half:]}"
    parts = [
        _text(left, top - 22, short, anchor="start"),
        _text(left, top - 7, f"ρ {format_interval(spearman)}", anchor="start", faint=True),
    ]
    for tick in _ticks(axis):
        y = top + _HIGH * (1 - axis.share(tick))
        parts.append(_line(left, y, left + _WIDE, y, opacity=0.15 if tick else 0.6))
        if numbered:
            text = "0" if tick == 0 else f"{MINUS if tick < 0 else '+'}{abs(tick):g}"
            parts.append(_text(left - 7, y + 4, text, anchor="end"))
    bottom = top + _HIGH
    frame = f"M{left:.1f} {top:.1f}H{left + _WIDE:.1f}V{bottom:.1f}H{left:.1f}Z"
    line = f'<path d="{frame}" fill="none" stroke="currentColor" stroke-opacity="0.3" pointer-events="all">'
    return [*parts, f"{line}<title>{escape(estimator)}</title></path>"]


def _points(left: float, top: float, across: np.ndarray, up: Sequence[float], depths: np.ndarray) -> Iterable[str]:
    """Return the units as round dots: one path a colour, which keeps thousands of them small."""
    buckets = np.minimum((depths * _BUCKETS).astype(int), _BUCKETS - 1)
    for bucket in np.unique(buckets).tolist():
        dots = "".join(
            f"M{left + 4 + (_WIDE - 8) * x:.1f} {top + _HIGH * (1 - y):.1f}h0"
            for x, y, of in zip(across, up, buckets, strict=True)
            if of == bucket
        )
        yield (
            f'<path d="{dots}" fill="none" stroke="{_colour(bucket)}" stroke-width="4" stroke-linecap="round" '
            'stroke-opacity="0.75"/>'
        )


def _legend(top: float, depth: int) -> list[str]:
    """Say what the axes and the colours are."""
    parts = [_text(_LEFT, top + 14, "across: rank of the score, lowest to highest", anchor="start", faint=True)]
    parts.append(
        _text(_LEFT, top + 32, "up: change of the loss without the unit, nats a token", anchor="start", faint=True)
    )
    right = _LEFT + 360
    parts.append(_text(right - 8, top + 14, "layer 0", anchor="end"))
    for bucket in range(_BUCKETS):
        corner = f'x="{right + 9 * bucket:.1f}" y="{top + 4:.1f}" width="9" height="12"'
        parts.append(f'<rect {corner} fill="{_colour(bucket)}"/>')
    parts.append(_text(right + 9 * _BUCKETS + 8, top + 14, str(depth - 1), anchor="start"))
    return [*parts, _text(right, top + 32, "ρ: Spearman's correlation and its interval", anchor="start", faint=True)]


def _colour(bucket: int) -> str:
    """Return viridis without its ends, which vanish on dark or on white."""
    return colour_of(0.2 + 0.65 * bucket / (_BUCKETS - 1))


def _axis(changes: np.ndarray) -> _Axis:
    """Choose an axis that holds 0 and all changes; linear below the power of ten that half of them exceed."""
    sizes = np.abs(changes[changes != 0])
    unit = 10.0 ** math.floor(math.log10(np.median(sizes))) if len(sizes) else 1.0
    low, high = min(float(np.min(changes)), 0.0), max(float(np.max(changes)), 0.0)
    margin = 0.05 * (math.asinh(high / unit) - math.asinh(low / unit)) or 0.1
    ends = (math.asinh(low / unit) - margin, math.asinh(high / unit) + margin)
    return _Axis(unit, *(unit * math.sinh(end) for end in ends))


def _ticks(axis: _Axis) -> list[float]:
    """Return 0 and powers of ten on both sides, from the unit on, thinned where they would crowd."""
    largest = max(-axis.low, axis.high, axis.unit)
    powers = range(round(math.log10(axis.unit)), math.floor(math.log10(largest)) + 1)
    sides = [sign * float(f"1e{power}") for power in powers for sign in (-1, 1)]
    ticks = [0.0]
    for tick in sorted((tick for tick in sides if axis.low <= tick <= axis.high), key=lambda tick: (-abs(tick), tick)):
        if all(abs(axis.share(tick) - axis.share(other)) * _HIGH >= 15 for other in ticks):
            ticks.append(tick)
    return sorted(ticks)


def _about(scope: str, ranked: Sequence[Ranked]) -> str:
    units = ranked[0][1]["spearman"].units if ranked else 0
    return f"{scope}, {units} units"


def heading(measure: str) -> str:
    """Return the heading of a measure's column."""
    return measure.replace("_in_layers", " in layers").capitalize()


def _signed(value: float) -> str:
    text = f"{value:.2f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", MINUS)
