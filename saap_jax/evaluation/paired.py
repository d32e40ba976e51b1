"""A against B on the same text or tasks: how much they differ, and how sure that is (paired bootstrap).

A p-value here is two-sided and counts resamples: 2 · (1 + the smaller of the number of resampled differences <= 0 and
of those >= 0) / (resamples + 1), at most 1. So R resamples can give no p-value below 2 / (R + 1), 0.0002 for the
default 10,000: read it as "at most that". But for the added 1 it agrees with the percentile interval, which holds 0
where p >= 1 - level.

Of fewer than `FEWEST` windows (items, units, layers) there is neither: both are NaN, and whoever shows them says why.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

FEWEST = 8
"""Windows, items, units or layers that an interval or a p-value is made of at least; rounds that a time is.

The percentile interval of n values is about mean ± 1.96 s √((n - 1) / n) / √n, narrower than Student's, so that of
normal values 95 % intervals cover P(|t with n - 1 degrees of freedom| < 1.96 √((n - 1) / n)): 93 % of 24, 91 % of 12,
89 % of 8, but 81 % of 4 and 50 % of 2, whose resamples are three numbers. Of 8, errors are about twice as frequent as
the level says, which is as far as we go; and by the sign test, even 5 of 5 on one side are no rejection (p = 2 / 2⁵).
"""

LEVEL = 0.05
"""Adjusted p-values from here on count as no difference: the two are tied."""

ROUNDING = 1e-5
"""Nats a token by which two evaluations of one model differ at most: as masks and cut, or by another program."""

_DRAWS = 2**22  # of windows held at once: 32 MiB


class Difference(NamedTuple):
    """The mean of A - B in nats a token, and its bootstrap interval. Below 0: A is better."""

    value: float
    low: float
    high: float
    win_rate: float = math.nan
    """Share of the windows (of all seeds) on which A has the lower loss; a tie counts half."""
    p_value: float = math.nan
    """Two-sided, of "there is no difference"; NaN where a loss is not finite."""
    largest: float = math.nan
    """Largest difference of a window, without its sign."""
    windows: int = 0
    """Windows (of each seed) that it is of; 0 where that is not known."""

    @property
    def same(self) -> bool:
        """True where no window differs by more than rounding; what is sure then is how the rounding went."""
        return self.largest <= ROUNDING

    @property
    def percent(self) -> tuple[float, float, float]:
        """The same as percent of B's perplexity: 100 · (e^value - 1), value and interval.

        >>> Difference(np.log(0.9), np.log(0.8), 0.0).percent
        (-10.0, -20.0, 0.0)
        """
        with np.errstate(over="ignore"):
            value, low, high = (round(100 * float(np.expm1(x)), 12) for x in (self.value, self.low, self.high))
        return value, low, high

    @property
    def sure(self) -> bool:
        """True where the interval does not hold 0."""
        return self.low > 0 or self.high < 0

    @property
    def sentence(self) -> str:
        """What the numbers say in words.

        >>> Difference(math.log(0.969), math.log(0.95), math.log(0.988)).sentence
        'A has a lower perplexity than B by 3.1 % (1.2 to 5.0 %)'
        """
        value, low, high = self.percent
        if self.largest == 0 or self.value == self.low == self.high == 0:
            return "A and B are the same: the difference is exactly 0"
        if self.same:
            return (
                f"A and B are the same up to rounding: no window differs by more than {self.largest:.0e} nats a token"
            )
        digits = decimals_of(value)
        if math.isfinite(self.value) and math.isnan(self.low):
            return f"who is better is not known: the difference is {value:+.{digits}f} %, {few(self.windows)}"
        if math.isnan(value) or math.isnan(low) or math.isnan(high):
            return "A and B cannot be compared: a perplexity is not finite"
        if not self.sure:
            shown = f"{value:+.{digits}f} % ({low:+.{digits}f} to {high:+.{digits}f} %)"
            return f"A and B cannot be told apart: the difference is {shown}"
        than = "lower" if value < 0 else "higher"
        size, (least, most) = f"{abs(value):.{digits}f}", (f"{x:.{digits}f}" for x in sorted((abs(low), abs(high))))
        return f"A has a {than} perplexity than B by {size} % ({least} to {most} %)"


class AccuracyDifference(NamedTuple):
    """The accuracy of A less that of B in points (percent of the items), and its interval. Above 0: A is better."""

    points: float
    low: float
    high: float
    win_rate: float
    """Share of the items that A answers right and B wrong; those with the same outcome count half."""
    p_value: float
    """Two-sided, of "there is no difference"."""
    items: int = 0
    """Items that it is of, over several tasks those of the smallest; 0 where that is not known."""

    @property
    def sure(self) -> bool:
        """True where the interval does not hold 0."""
        return self.low > 0 or self.high < 0

    @property
    def sentence(self) -> str:
        """What the numbers say in words.

        >>> AccuracyDifference(-3.0, -5.5, -0.5, 0.47, 0.02).sentence
        'A has a lower accuracy than B by 3.0 points (0.5 to 5.5)'
        """
        if self.points == self.low == self.high == 0:
            return "A and B are right on the same items"
        digits = decimals_of(self.points)
        if math.isnan(self.low):
            shown = f"{self.points:+.{digits}f} points, {few(self.items, 'item')}"
            return f"who is better is not known: the difference is {shown}"
        if not self.sure:
            shown = f"{self.points:+.{digits}f} points ({self.low:+.{digits}f} to {self.high:+.{digits}f})"
            return f"A and B cannot be told apart: the difference is {shown}"
        than = "higher" if self.points > 0 else "lower"
        least, most = sorted((abs(self.low), abs(self.high)))
        size = f"{abs(self.points):.{digits}f} points ({least:.{digits}f} to {most:.{digits}f})"
        return f"A has a {than} accuracy than B by {size}"


def paired_difference(
    a: Float[np.ndarray, "seeds windows"],
    b: Float[np.ndarray, "seeds windows"],
    *,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Return the mean difference of two models' losses, its percentile interval, win rate and p-value.

    A window is hard or easy for both models, so the differences vary much less than the losses do. Windows and seeds
    are drawn with replacement, each by itself, and A and B are looked at on the same draw: all windows of a seed share
    a pruned model, all seeds share the windows. Of few seeds (three, say) the bootstrap knows little about how much
    seeds vary: with n seeds it makes their variance too small by a factor of (n - 1) / n.

    Where a loss is not finite, or there are fewer than `FEWEST` windows, the interval and the p-value are NaN.

    Args:
        a: mean loss of each window in nats a token, windows of equal length; a row for each calibration seed.
        b: the same of the model to compare with.
        level: probability that the interval is meant to cover the true difference.

    Raises:
        ValueError: other shapes than [seeds, windows] of both, or no window.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13; the p-value counts the observed
    difference as one more resample (Davison & Hinkley, Bootstrap Methods and their Application, 1997, section 4.2.3)
    and doubles the smaller tail.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 2 or not a.size:
        raise ValueError(
            f"paired_difference: expected [seeds, windows] of one window or more, twice the same, got {a.shape} and "
            f"{b.shape}"
        )
    check_options("paired_difference", resamples, level)
    with np.errstate(invalid="ignore"):
        difference = a - b
        value, win_rate = float(difference.mean()), float(((a < b) + 0.5 * (a == b)).mean())
    seeds, windows = difference.shape
    if not np.isfinite(difference).all():
        return Difference(value, math.nan, math.nan, win_rate, windows=windows)
    largest = float(np.abs(difference).max())
    if windows < FEWEST:
        return Difference(value, math.nan, math.nan, win_rate, math.nan, largest, windows)
    random = np.random.default_rng(seed)
    by_seed = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    means = []
    for rows in _chunks(resamples, windows):
        count = rows.stop - rows.start
        by_window = random.multinomial(windows, np.full(windows, 1 / windows), size=count) / windows
        means.append(np.einsum("rs,sw,rw->r", by_seed[rows], difference, by_window, optimize=True))
    means = np.concatenate(means)
    low, high, p = sureness(means, windows, level).tolist()
    return Difference(value, low, high, win_rate, p, largest, windows)


def paired_items(
    a_correct: Bool[np.ndarray, "items"],
    b_correct: Bool[np.ndarray, "items"],
    *,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> AccuracyDifference:
    """Return how much the accuracies of two models differ on the same items of a task; see `paired_difference`.

    An item counts +1 where A alone is right, -1 where B alone is, and 0 otherwise. Items drawn with replacement are
    therefore three numbers from one multinomial distribution, so that many items cost no more than few.

    Raises:
        ValueError: not twice the same number of items, or none.
    """
    a_correct, b_correct = np.asarray(a_correct, bool), np.asarray(b_correct, bool)
    if a_correct.shape != b_correct.shape or a_correct.ndim != 1 or not a_correct.size:
        raise ValueError(
            f"paired_items: expected one item or more, twice the same, got {a_correct.shape} and {b_correct.shape}"
        )
    check_options("paired_items", resamples, level)
    items, a_alone, b_alone = a_correct.size, int((a_correct & ~b_correct).sum()), int((b_correct & ~a_correct).sum())
    more, fewer = max(a_alone, b_alone), min(a_alone, b_alone)  # one order of draws, so that a swap mirrors exactly
    shares = np.array([more, fewer, items - more - fewer]) / items
    drawn = np.random.default_rng(seed).multinomial(items, shares, size=resamples)
    means = (1 if a_alone >= b_alone else -1) * 100 * (drawn[:, 0] - drawn[:, 1]) / items
    points, win_rate = 100 * (a_alone - b_alone) / items, 0.5 + (a_alone - b_alone) / items / 2
    low, high, p = sureness(means, items, level).tolist()
    return AccuracyDifference(points, low, high, win_rate, p, items)


def holm(p_values: Float[np.ndarray, "tests"] | Sequence[float]) -> Float[np.ndarray, "tests"]:
    """Return p-values adjusted for having been looked at together: those below α keep the familywise error below α.

    The i-th smallest of m is multiplied by m - i + 1, made no smaller than the one before it, and capped at 1. NaN
    (nothing was tested) stays NaN and does not count among the m.

    Raises:
        ValueError: not one list, or a number outside [0, 1].

    Source: Holm, A Simple Sequentially Rejective Multiple Test Procedure, Scandinavian Journal of Statistics 6, 1979.

    >>> holm([0.01, 0.04, 0.03, 0.005]).round(3).tolist()
    [0.03, 0.06, 0.06, 0.02]
    """
    p = np.asarray(p_values, np.float64)
    known = np.flatnonzero(~np.isnan(p))
    if p.ndim != 1 or (p[known] < 0).any() or (p[known] > 1).any():
        raise ValueError(f"holm: expected one list of numbers in [0, 1] or NaN, got {p.tolist()}")
    order = known[np.argsort(p[known], kind="stable")]
    adjusted = np.full(p.shape, np.nan)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(np.arange(len(order), 0, -1) * p[order]))
    return adjusted


def smallest_p_value(resamples: int) -> float:
    """Return the smallest p-value that this many resamples can give.

    >>> smallest_p_value(9_999)
    0.0002
    """
    return min(1.0, 2 / (resamples + 1))


def resamples_for(tests: int, least: int = 10_000) -> int:
    """Return how many resamples so many tests take, lest the smallest p-value that there is be none once adjusted.

    With so many, the smallest one times the number of tests is at most a fifth of `LEVEL`.

    >>> resamples_for(8), resamples_for(100)
    (10000, 20000)
    """
    return max(least, math.ceil(10 * tests / LEVEL))


def decimals_of(value: float) -> int:
    """Return the decimals that show a number with two digits at least, one decimal at least, six at most.

    >>> [decimals_of(value) for value in (12.3, 3.14, -0.271, 0.0)]
    [1, 1, 2, 1]
    """
    if not math.isfinite(value) or value == 0:
        return 1
    return min(6, max(1, 1 - math.floor(math.log10(abs(value)))))


def check_options(name: str, resamples: int, level: float) -> None:
    """Raise ValueError for fewer than one resample, or a level outside (0, 1)."""
    if not (resamples >= 1 and 0 < level < 1):
        raise ValueError(f"{name}: expected resamples >= 1 and 0 < level < 1, got {resamples} and {level}")


def _chunks(resamples: int, windows: int) -> Iterator[slice]:
    size = max(1, _DRAWS // windows)
    return (slice(start, min(start + size, resamples)) for start in range(0, resamples, size))


def sureness(
    means: Float[np.ndarray, "*variants resamples"], count: int, level: float = 0.95
) -> Float[np.ndarray, "3 *variants"]:
    """Return the ends of the percentile interval of resampled means, and their two-sided p-value, see `FEWEST`.

    Args:
        means: a number a resample, of one thing or of several.
        count: how many values each resample is drawn from; of fewer than `FEWEST` all is NaN, as it is without means.
    """
    if count < FEWEST or not means.shape[-1]:
        return np.full((3, *means.shape[:-1]), np.nan)
    tails = np.minimum((means <= 0).sum(axis=-1), (means >= 0).sum(axis=-1))
    ends = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=-1)
    return np.stack([*ends, np.minimum(1.0, 2 * (1 + tails) / (means.shape[-1] + 1))])


def few(count: int, what: str = "window") -> str:
    """Say why there is no interval.

    >>> few(2), few(1, "item")
    ('without an interval, which takes 8 windows; here are 2', 'without an interval, which takes 8 items; here is 1')
    """
    return f"without an interval, which takes {FEWEST} {what}s; here {'is' if count == 1 else 'are'} {count:,}"
