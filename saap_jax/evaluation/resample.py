"""Resampling, for what is no mean: draws, percentile intervals, p-values, and what they are when looked at together.

Differences of losses have the interval of `evidence` instead. A p-value here is two-sided and counts resamples:
2 · (1 + the smaller of the number of resampled differences <= 0 and of those >= 0) / (resamples + 1), at most 1. So R
resamples can give no p-value below 2 / (R + 1). But for the added 1 it agrees with the percentile interval, which holds
0 where p >= 1 - level.

Of fewer than `FEWEST` windows (items, units, layers) there is neither: both are NaN, and whoever shows them says why.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from saap_jax.runtime.words import plural

FEWEST = 8
"""Windows, items, units or layers that an interval or a p-value is made of at least; rounds that a time is.

The percentile interval of n values is about mean ± 1.96 s √((n - 1) / n) / √n, narrower than Student's, so that of
normal values 95 % intervals cover P(|t with n - 1 degrees of freedom| < 1.96 √((n - 1) / n)): 93 % of 24, 91 % of 12,
89 % of 8, but 81 % of 4 and 50 % of 2, whose resamples are three numbers. Of 8, errors are about twice as frequent as
the level says, which is as far as we go; and by the sign test, even 5 of 5 on one side are no rejection (p = 2 / 2⁵).
"""

LEVEL = 0.05
"""How rare a verdict too much is; adjusted p-values from here on count as no difference."""


def holm(p_values: Float[np.ndarray, "tests"] | Sequence[float]) -> Float[np.ndarray, "tests"]:
    """Adjust p-values for having been looked at together: those below α keep the familywise error below α.

    The i-th smallest of m is multiplied by m - i + 1, made no smaller than the one before it, and capped at 1. NaN
    (nothing was tested) stays NaN and does not count among the m.

    Source: Holm, A Simple Sequentially Rejective Multiple Test Procedure, Scandinavian Journal of Statistics 6, 1979.

    >>> holm([0.01, 0.04, 0.03, 0.005]).round(3).tolist()
    [0.03, 0.06, 0.06, 0.02]
    """
    p = np.asarray(p_values, np.float64)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    adjusted = np.full(p.shape, np.nan)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(np.arange(len(order), 0, -1) * p[order]))
    return adjusted


def resamples_for(tests: int, least: int = 10_000) -> int:
    """Count the resamples that so many tests take, lest the smallest p-value that there is be none once adjusted.

    With so many, the smallest one times the number of tests is at most a fifth of `LEVEL`.

    >>> resamples_for(8), resamples_for(100)
    (10000, 20000)
    """
    return max(least, math.ceil(10 * tests / LEVEL))


def sureness(means: Float[np.ndarray, "*variants resamples"], count: int) -> Float[np.ndarray, "3 *variants"]:
    """Find the ends of the percentile interval of resampled means, and their two-sided p-value, see `FEWEST`.

    Args:
        count: values that each resample is drawn from; of fewer than `FEWEST` all is NaN, as it is without means.
    """
    if count < FEWEST or not means.shape[-1]:
        return np.full((3, *means.shape[:-1]), np.nan)
    tails = np.minimum((means <= 0).sum(axis=-1), (means >= 0).sum(axis=-1))
    ends = np.quantile(means, [LEVEL / 2, 1 - LEVEL / 2], axis=-1)
    return np.stack([*ends, np.minimum(1.0, 2 * (1 + tails) / (means.shape[-1] + 1))])


def few(count: int, what: str = "window") -> str:
    """Say why there is no interval.

    >>> few(2), few(1, "item")
    ('without an interval, which takes 8 windows; here are 2', 'without an interval, which takes 8 items; here is 1')
    """
    return f"without an interval, which takes {FEWEST} {what}s; here {'is' if count == 1 else 'are'} {count:,}"


def too_few(count: int, what: str = "window") -> str:
    """Say why nothing is tested, in a clause; empty where there are enough.

    >>> too_few(2), too_few(1, "unit"), too_few(8)
    ('2 windows, where it takes 8', '1 unit, where it takes 8', '')
    """
    if count >= FEWEST:
        return ""
    return f"{plural(count, what)}, where it takes {FEWEST}"


def format_interval(low: float, high: float, show: Callable[[float], str]) -> str:
    """Write the ends of an interval, each as `show` does; empty where there is none.

    >>> format_interval(-0.25, 0.5, "{:+.1f}".format), format_interval(math.nan, math.nan, str)
    ('-0.2 to +0.5', '')
    """
    if math.isnan(low) or math.isnan(high):
        return ""
    return f"{show(low)} to {show(high)}"


def counts(count: int, resamples: int, random: np.random.Generator) -> Int[np.ndarray, "resamples count"]:
    """Draw resamples of `count` things with replacement: how often each was drawn in each."""
    return random.multinomial(count, np.full(count, 1 / count), size=resamples)
