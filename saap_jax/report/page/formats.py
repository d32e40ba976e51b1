"""How numbers and names are written, wherever they are shown."""

import math
import re

from saap_jax.evaluation.scales import PERPLEXITY, Scale, format_figure
from saap_jax.report.page.blocks import Number
from saap_jax.runtime.words import MINUS, signed

BEST, TIED = "*", "≈"
"""Marks of the best of a group, and of what cannot be told apart from it."""


def short_name(name: str, letters: int = 26) -> str:
    """Return a name of at most so many letters; both ends are shown, since hyper-parameters come last.

    >>> short_name("taylor_element(reduction='max')", 16)
    "taylor_…n='max')"
    """
    half = letters // 2
    return name if len(name) <= letters else f"{name[: half - 1]}…{name[-half:]}"


def format_spread(value: float, spread: float, scale: Scale = PERPLEXITY) -> str:
    """Return a figure, with its standard deviation where there is one.

    >>> format_spread(58.171, 0.83), format_spread(58.171, math.nan)
    ('58.17 ± 0.83', '58.17')
    """
    return format_figure(value, scale) + (f" ± {format_figure(spread, scale)}" if math.isfinite(spread) else "")


def format_percent(value: float) -> str:
    """Return a fraction as percent, without the sign."""
    return "n/a" if math.isnan(value) else f"{100 * value:.1f}"


def format_millions(value: float) -> str:
    """Return a count in millions."""
    return "n/a" if math.isnan(value) else f"{value / 1e6:.1f}" if value >= 1e7 else f"{value / 1e6:.3f}"


def format_mebibytes(value: float) -> str:
    """Return bytes in MiB."""
    return "n/a" if math.isnan(value) else f"{value / 2**20:,.1f}"


def format_milliseconds(value: float) -> str:
    """Return seconds in milliseconds."""
    return "n/a" if math.isnan(value) else f"{1e3 * value:,.1f}"


def format_count(value: float) -> str:
    """Return a count with separators."""
    return "n/a" if math.isnan(value) else f"{value:,.0f}"


def format_change(before: float, after: float) -> str:
    """Return the relative change.

    >>> format_change(100.0, 80.0), format_change(2.0, 5000.0), format_change(-2.0, -1.9)
    ('−20.0 %', '× 2500', '+5.0 %')
    """
    if not (math.isfinite(before) and math.isfinite(after)) or before == 0:
        return "n/a"
    if after >= 10 * before > 0:
        return f"× {after / before:.4g}"
    return f"{signed(100 * (after - before) / abs(before), 1)} %"


def format_correlation(value: float) -> str:
    """Return a correlation with two decimals.

    >>> [format_correlation(value) for value in (0.456, -0.456, -0.001, float("nan"))]
    ['0.46', '−0.46', '0.00', 'n/a']
    """
    if math.isnan(value):
        return "n/a"
    text = f"{value:.2f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", MINUS)


def format_p(value: float, *, floor: bool = False) -> str:
    """Return a p-value; at the `floor` of what resamples can give it is an upper bound.

    >>> format_p(0.00042), format_p(0.31), format_p(0.0002, floor=True), format_p(math.nan)
    ('0.0004', '0.31', '≤ 0.0002', 'n/a')
    """
    text = "n/a" if math.isnan(value) else f"{value:.1g}" if value < 0.001 else f"{value:.2g}"
    return f"≤ {text}" if floor and value < 1 else text


def format_usd(value: Number) -> str:
    """Return US dollars, small amounts with two digits.

    >>> format_usd(0.00423), format_usd(12.3), format_usd(0.0)
    ('$0.0042', '$12.30', '$0.00')
    """
    return f"${value:,.2f}" if value == 0 or value >= 0.1 else f"${value:.2g}"


def slug(name: str) -> str:
    """Return a name as part of a file's name.

    >>> slug("gate_fisher, λ=0.25")
    'gate_fisher-0.25'
    """
    return re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-.") or "x"
