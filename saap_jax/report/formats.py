"""How numbers and names are written, wherever they are shown."""

import math
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from saap_jax.evaluation.differences import decimals_of
from saap_jax.evaluation.resample import LEVEL, format_interval
from saap_jax.evaluation.scales import PERPLEXITY, Scale, format_figure, format_ppl
from saap_jax.runtime.words import MINUS, plural, signed

Number = float | int
"""A number; checked at run time, `float` alone refuses whole ones."""

BEST = "*"
TIED = "≈"
ESTIMATED = "~"
"""Marks of the best of a group, of what cannot be told apart from it, and of a figure that is not of all windows."""

TIED_LEGEND = f"{TIED} cannot be told apart from it (paired bootstrap, Holm, {100 * LEVEL:g} %)"

VERDICT = f"Intervals, {100 * (1 - LEVEL):g} %, hold however often one looks, corrected for how many were compared"
"""What intervals of differences are, wherever they are shown."""


def short_name(name: str, letters: int = 26) -> str:
    """Shorten a name to at most so many letters; both ends are shown, since hyper-parameters come last.

    >>> short_name("taylor_element(reduction='max')", 16)
    "taylor_…n='max')"
    """
    if len(name) <= letters:
        return name
    half = letters // 2
    return f"{name[: half - 1]}…{name[-half:]}"


def slug(name: str) -> str:
    """Write a name as part of a file's name or of an address.

    >>> slug("gate_fisher, λ=0.25")
    'gate_fisher-0.25'
    """
    return re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-.") or "x"


def marked(name: str, best: bool, tied: bool, *_: object) -> str:
    """Write a name with the mark of the best, or of what is tied with it."""
    if best:
        return f"{name} {BEST}"
    if tied:
        return f"{name} {TIED}"
    return name


def _scaled(factor: Number, form: str) -> Callable[[Number], str]:
    """Make what writes a number times a factor."""

    def written(value: Any) -> str:
        if math.isnan(value):
            return "n/a"
        return format(factor * value, form)

    return written


format_percent = _scaled(100, ".1f")
"""Writes a fraction as percent, without the sign."""
format_mebibytes = _scaled(2**-20, ",.1f")
format_milliseconds = _scaled(1e3, ",.1f")
format_count = _scaled(1, ",.0f")


def format_millions(value: Number) -> str:
    """Write a count in millions."""
    if math.isnan(value):
        return "n/a"
    if value >= 1e7:
        return f"{value / 1e6:.1f}"
    return f"{value / 1e6:.3f}"


def with_interval(value: Number, low: Number, high: Number, form: Callable[[Number], str]) -> str:
    """Write a number with its interval, as far as there is one.

    >>> with_interval(0.2472, 0.21, 0.28, format_percent)
    '24.7 (21.0 to 28.0)'
    """
    interval = format_interval(low, high, form)
    if not interval:
        return form(value)
    return f"{form(value)} ({interval})"


def format_difference(percent: Number, low: Number, high: Number) -> str:
    """Write a difference in percent with its interval; from a thousand percent on, as a factor.

    >>> format_difference(3.1, 1.2, 5.0), format_difference(2100.0, math.nan, math.nan)
    ('+3.1 (+1.2 to +5.0)', '× 22')
    """
    if percent >= 1000:
        return f"× {with_interval(1 + percent / 100, 1 + low / 100, 1 + high / 100, _factor)}"
    # the largest of the three sets the digits of all, so that an interval is as fine as its middle
    size = max((abs(end) for end in (percent, low, high) if not math.isnan(end)), default=0.0)
    digits = 2
    if size >= 100:
        digits = 0
    elif size >= 1:
        digits = 1
    return with_interval(percent, low, high, lambda end: format_change(end, digits))


def format_change(percent: Number, digits: int | None = None) -> str:
    """Write percent with their sign, by default with two digits at least.

    >>> [format_change(value) for value in (0.123, -3.21, 12345.6, math.nan)]
    ['+0.12', '−3.2', '+12,346', 'n/a']
    """
    if math.isnan(percent):
        return "n/a"
    if digits is None and abs(percent) >= 1000:
        digits = 0
    elif digits is None:
        digits = decimals_of(percent)
    return f"{percent:+,.{digits}f}".replace("-", MINUS)


def _factor(value: Number) -> str:
    if math.isnan(value):
        return "n/a"
    if value >= 1e5:
        return format_ppl(value)
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def format_spread(value: Number, spread: Number, scale: Scale = PERPLEXITY) -> str:
    """Write a figure, with its standard deviation where there is one.

    >>> format_spread(58.171, 0.83), format_spread(58.171, math.nan), format_spread(221_000.0, 29_608.0)
    ('58.17 ± 0.83', '58.17', '2.2e5 ± 0.3e5')
    >>> format_spread(1234.5, 67.89)
    '1,234 ± 68'
    """
    figure = format_figure(value, scale)
    if not math.isfinite(spread):
        return figure
    # the deviation has the power of ten, or the decimals, of the figure that it stands beside
    _, e, power = figure.partition("e")
    if e:
        return f"{figure} ± {spread / 10.0 ** int(power):.1f}e{power}"
    digits = len(figure.partition(".")[2])
    return f"{figure} ± {spread:,.{digits}f}"


def format_estimate(mean: Number, spread: Number = math.nan) -> str:
    """Write a ratio over seeds in percent, without the sign."""
    if not math.isfinite(spread):
        return format_percent(mean)
    return f"{format_percent(mean)} ± {format_percent(spread)}"


def format_relative(before: Number, after: Number) -> str:
    """Write the relative change.

    >>> format_relative(100.0, 80.0), format_relative(2.0, 5000.0), format_relative(-2.0, -1.9)
    ('−20.0 %', '× 2,500', '+5.0 %')
    """
    if not (math.isfinite(before) and math.isfinite(after)) or before == 0:
        return "n/a"
    if after >= 10 * before > 0:
        return f"× {_factor(after / before)}"
    return f"{signed(100 * (after - before) / abs(before), 1)} %"


def format_times(before: Sequence[Number], after: Sequence[Number]) -> tuple[str, str, str]:
    """Write seconds of two models in the same rounds: medians in milliseconds, and their change with its range.

    >>> format_times([1.0, 1.1, 1.0], [0.9, 0.88, 0.8])
    ('1,000.0', '880.0', '−20.0 % (−20.0 to −10.0 %, 3 rounds)')
    """
    # a round times both models in turn, so that its change is free of what slows the machine for a while
    changes = [100 * (two / one - 1) for one, two in zip(before, after, strict=False)]
    middle, low, high = (signed(end, 1) for end in (statistics.median(changes), min(changes), max(changes)))
    change = f"{middle} % ({low} to {high} %, {plural(len(changes), 'round')})"
    return format_milliseconds(statistics.median(before)), format_milliseconds(statistics.median(after)), change


def format_hundredths(value: Number) -> str:
    """Write a number with two decimals.

    >>> [format_hundredths(value) for value in (0.456, -0.456, -0.001, float("nan"))]
    ['0.46', '−0.46', '0.00', 'n/a']
    """
    if math.isnan(value):
        return "n/a"
    text = f"{value:.2f}"
    if float(text) == 0:  # what is rounded to zero has no sign
        return text.removeprefix("-")
    return text.replace("-", MINUS)


def format_usd(value: Number) -> str:
    """Write US dollars, small amounts with two digits.

    >>> format_usd(0.00423), format_usd(12.3), format_usd(0.0), format_usd(0.0999)
    ('$0.0042', '$12.30', '$0.00', '$0.10')
    """
    if value == 0 or value >= 0.0995:
        return f"${value:,.2f}"
    return f"${value:.2g}"
