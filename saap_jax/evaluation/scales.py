"""What a metric is: a perplexity, exp of the mean loss; of a model that is no language model the mean loss itself; or
the accuracy on a task.

The name of a metric of text tells which: `ppl@128 SOURCE`, or `loss NAME`.
"""

import math
from typing import NamedTuple

import numpy as np


class Scale(NamedTuple):
    """How a mean loss is reported and compared."""

    noun: str
    """What tables and sentences call it."""
    short: str
    """Heading of a column."""
    logarithmic: bool
    """True where the figure is exp of the mean loss, so that a difference of losses is a ratio of figures."""
    units: tuple[str, str] = (" %", " %")
    """What stands behind a difference, and behind the ends of its interval."""
    drawn: str = "window"
    """What the mean is over."""
    unit: str = "nats a token"
    """Of a difference of losses."""

    def value(self, loss: float) -> float:
        """The figure of a mean loss.

        >>> PERPLEXITY.value(0.0), LOSS.value(0.25)
        (1.0, 0.25)
        """
        with np.errstate(over="ignore"):
            if self.logarithmic:
                return float(np.exp(loss))
            return float(loss)

    def loss(self, value: float) -> float:
        """The mean loss of a figure."""
        with np.errstate(divide="ignore", invalid="ignore"):
            if self.logarithmic:
                return float(np.log(value))
            return float(value)

    def limit(self, value: float, percent: float) -> float:
        """The figure that is some percent worse.

        >>> PERPLEXITY.limit(10.0, 10.0), LOSS.limit(-2.0, 10.0)
        (11.0, -1.8)
        """
        return value + abs(value) * percent / 100

    def percent(self, difference: float, base: float) -> float:
        """A difference of mean losses as percent of the base's figure; `base` is a mean loss. Points stay points.

        >>> round(PERPLEXITY.percent(np.log(1.1), 3.0), 6), LOSS.percent(0.1, 2.0)
        (10.0, 5.0)
        """
        if self.drawn == "item":
            return difference
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            if self.logarithmic:
                share = np.expm1(difference)
            else:
                share = np.float64(difference) / abs(base)
        return 100 * float(share)


PERPLEXITY = Scale("perplexity", "ppl", True)
LOSS = Scale("loss", "loss", False, drawn="example", unit="loss")
ACCURACY = Scale("accuracy", "acc", False, (" points", ""), "item")


def scale_of(metric: str) -> Scale:
    """Find the scale of a metric by its name.

    >>> scale_of("ppl@128 builtin:reference").noun, scale_of("loss held_out").noun
    ('perplexity', 'loss')
    """
    if metric.partition(" ")[0] == "loss":
        return LOSS
    return PERPLEXITY


def format_ppl(value: float) -> str:
    """Write a perplexity in at most seven characters.

    >>> [format_ppl(value) for value in (12.345, 99_999.0, 123_456.0, 9.96e307, math.inf, math.nan)]
    ['12.35', '99,999', '1.2e5', '1.0e308', 'inf', 'n/a']
    """
    if not math.isfinite(value):
        return "n/a" if math.isnan(value) else "inf"
    if value < 99_999.5:
        if value < 1000:
            return f"{value:.2f}"
        return f"{value:,.0f}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def format_figure(value: float, scale: Scale = PERPLEXITY) -> str:
    """Write a perplexity, or a mean loss with four digits.

    >>> format_figure(12.345), format_figure(0.012345, LOSS)
    ('12.35', '0.01235')
    """
    if scale.logarithmic or not math.isfinite(value):
        return format_ppl(value)
    return f"{value:.4g}"
