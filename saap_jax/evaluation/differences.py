"""Differences of models on the same text or items, and how sure they are: paired bootstrap."""

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from saap_jax.config.checks import Bound
from saap_jax.evaluation.resample import FEWEST, counts, few, format_interval, resamples_for, sureness, two_way_means
from saap_jax.evaluation.scales import ACCURACY, PERPLEXITY, Scale
from saap_jax.runtime.words import MINUS, signed

BLOCK = 1000
"""Resamples of all variants that are drawn and held at once."""

ROUNDING = 1e-5
"""Nats a token by which two evaluations of one model differ at most: as masks and cut, or by another program."""


class Losses(NamedTuple):
    """What is on record of a candidate's losses."""

    values: Float[np.ndarray, "windows"]
    seen: Bool[np.ndarray, "windows"]
    """Windows that it was evaluated on: all of them, but for a race."""


def losses_of(row: Mapping[str, Any], metric: str) -> Losses:
    """Read the losses of a candidate on a text from its record."""
    values = (row["losses"] if "losses" in row else row["seen"])[metric]
    return Losses(np.array(values, np.float64), np.array([each is not None for each in values], bool))


class Difference(NamedTuple):
    """The mean of A - B in nats a token, or in points (percent of the items), and its bootstrap interval.

    Below 0, A has the lower loss, or the lower accuracy.
    """

    value: float
    low: float
    high: float
    win_rate: float = math.nan
    """Share of the windows (of all seeds) on which A has the lower loss, or of the items that A answers right and B
    wrong; a tie counts half."""
    p_value: float = math.nan
    """Two-sided, of "there is no difference"; NaN where a loss is not finite."""
    largest: float = math.nan
    """Largest difference of a window, without its sign."""
    windows: int = 0
    """Windows (of each seed) or items that it is of, over several tasks those of the smallest; 0 where that is not
    known."""
    base: float = math.inf
    """B's mean loss, where that itself is the figure."""
    scale: Scale = PERPLEXITY
    """What the figure is."""

    @property
    def same(self) -> bool:
        """True where no window differs by more than rounding; what is sure then is how the rounding went."""
        return self.largest <= ROUNDING

    @property
    def percent(self) -> tuple[float, float, float]:
        """The same as percent of B's figure, value and interval: of a perplexity 100 · (e^value - 1); or in points.

        >>> Difference(np.log(0.9), np.log(0.8), 0.0).percent
        (-10.0, -20.0, 0.0)
        """
        value, low, high = (round(self.scale.percent(float(end), self.base), 12) for end in self[:3])
        return value, low, high

    @property
    def sure(self) -> bool:
        """True where the interval does not hold 0."""
        return self.low > 0 or self.high < 0

    @property
    def numbers(self) -> str:
        """The difference with its interval, or why there is none.

        >>> Difference(2.0, 1.0, 3.0, scale=ACCURACY).numbers, Difference(math.log(1.02), math.nan, math.nan).numbers
        ('+2.0 points (+1.0 to +3.0)', '+2.0 %, without an interval, which takes 8 windows; here are 0')
        """
        (value, low, high), (unit, unit_of_ends) = self.percent, self.scale.units
        digits = decimals_of(value)
        interval = format_interval(low, high, lambda end: signed(end, digits))
        why_not = few(self.windows, self.scale.drawn)
        return signed(value, digits) + unit + (f" ({interval}{unit_of_ends})" if interval else f", {why_not}")

    @property
    def sentence(self) -> str:
        """What the numbers say in words.

        >>> Difference(math.log(0.969), math.log(0.95), math.log(0.988)).sentence
        'A has a lower perplexity than B by 3.1 % (1.2 to 5.0 %)'
        >>> Difference(-3.0, -5.5, -0.5, scale=ACCURACY).sentence
        'A has a lower accuracy than B by 3.0 points (0.5 to 5.5)'
        """
        (value, low, high), (unit, unit_of_ends) = self.percent, self.scale.units
        if self.largest == 0 or self.value == self.low == self.high == 0:
            return "A and B are the same: the difference is exactly 0"
        if self.same:
            return (
                f"A and B are the same up to rounding: no window differs by more than {self.largest:.0e} nats a token"
            )
        if not math.isfinite(self.value) or any(map(math.isnan, self.percent[: 1 if math.isnan(self.low) else 3])):
            return f"A and B cannot be compared: a {self.scale.noun} is not finite"
        if not (low > 0 or high < 0):
            told = "who is better is not known" if math.isnan(low) else "A and B cannot be told apart"
            return f"{told}: the difference is {self.numbers}"
        (least, most), show = sorted((abs(low), abs(high))), f"{{:.{decimals_of(value)}f}}".format
        than, interval = "lower" if value < 0 else "higher", format_interval(least, most, show)
        return f"A has a {than} {self.scale.noun} than B by {show(abs(value))}{unit} ({interval}{unit_of_ends})"


def paired_difference(
    a: Float[np.ndarray, "seeds windows"],
    b: Float[np.ndarray, "seeds windows"],
    *,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
    scale: Scale = PERPLEXITY,
) -> Difference:
    """Estimate the mean difference of two models' losses, its percentile interval, win rate and p-value.

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
    return differences_against(b, a[None], resamples=resamples, level=level, seed=seed, scale=scale, block=None)[0]


def decimals_of(value: float) -> int:
    """Count the decimals that show a number with two digits at least, one decimal at least, six at most.

    >>> [decimals_of(value) for value in (12.3, 3.14, -0.271, 0.0)]
    [1, 1, 2, 1]
    """
    if not math.isfinite(value) or value == 0:
        return 1
    return min(6, max(1, 1 - math.floor(math.log10(abs(value)))))


def differences_against(
    base: Float[np.ndarray, "seeds windows"],
    others: Float[np.ndarray, "variants seeds windows"],
    *,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
    scale: Scale = PERPLEXITY,
    block: int | None = BLOCK,
) -> list[Difference]:
    """Tell how each variant differs from the base, other - base: above 0 the base is better.

    As `paired_difference` does, but all variants see the same draws, so that two hundred of them take a second.
    P-values are not adjusted (see `holm`).

    Args:
        base: mean loss of each window in nats a token; a row for each calibration seed.
        others: the same of each variant.
        scale: what the figures are that differences are percent of.
        block: resamples that are drawn and held at once, all if None; another number gives other draws.

    Raises:
        ValueError: shapes that differ, no window, or bad options.
    """
    base, others = np.asarray(base, np.float64), np.asarray(others, np.float64)
    if others.ndim != 3 or others.shape[1:] != base.shape or not base.size:
        raise ValueError(
            f"differences: expected [seeds, windows] of one window or more, the same of all, got {base.shape} and "
            f"{others.shape[1:]}"
        )
    _check_options(resamples, level)
    windows = base.shape[1]
    with np.errstate(invalid="ignore"):
        difference = others - base
        values = difference.mean(axis=(1, 2))
    wins = ((others < base) + 0.5 * (others == base)).mean(axis=(1, 2))
    known = np.isfinite(difference).all(axis=(1, 2))
    sure = np.full((4, len(others)), np.nan)
    sure[3, known] = np.abs(difference[known]).max(axis=(1, 2))
    if windows >= FEWEST:
        sure[:3, known] = sureness(two_way_means(difference[known], resamples, seed, block), windows, level)
    rows = np.stack((values, *sure[:2], wins, *sure[2:]), axis=1).tolist()
    of = math.inf if scale.logarithmic else float(base.mean())
    return [Difference(*numbers, windows=windows, base=of, scale=scale) for numbers in rows]


def _check_options(resamples: int, level: float) -> None:
    if not (resamples >= 1 and 0 < level < 1):
        raise ValueError(f"bootstrap: expected resamples >= 1 and 0 < level < 1, got {resamples} and {level}")


def p_values_against(
    base: Float[np.ndarray, "seeds windows"],
    others: Float[np.ndarray, "variants seeds windows"],
    *,
    resamples: int | None = None,
    seed: int = 0,
) -> Float[np.ndarray, "variants"]:
    """Test "as good as the base" of each variant: two-sided p-values, NaN where a loss is not finite.

    As `differences_against`; by default there are as many resamples as adjusting the p-values for their number takes.
    """
    found = differences_against(base, others, resamples=resamples or resamples_for(len(others)), seed=seed)
    return np.array([difference.p_value for difference in found], np.float64)


ALL = "all tasks"
"""Name of the mean over tasks, each of which counts the same."""


Outcomes = Mapping[str, Bool[np.ndarray, "_seeds _items"]]
"""{task: which items were answered right}, a row for each calibration seed, the same seeds in every task."""


def paired_tasks(
    a: Outcomes, b: Outcomes, *, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> dict[str, Difference]:
    """Compare the accuracies of two models on each task and, of two tasks or more, over all of them.

    Items are drawn with replacement within each task, and seeds for all tasks together (a seed is one pruned model); A
    and B are looked at on the same draw. The tasks are not drawn: `ALL` speaks of these tasks and of no others.

    Items with the same outcomes on all seeds are exchangeable, so how often each such pattern is drawn is one
    multinomial draw, and many items cost no more than few.

    Raises:
        ValueError: not the same tasks, items and seeds of both models, or a task without items.
    """
    _check_options(resamples, level)
    shapes = {task: (a[task].shape, b[task].shape if task in b else None) for task in a}
    seeds = {len(outcomes) for outcomes in a.values()}
    if a.keys() != b.keys() or len(seeds) != 1 or any(of_a != of_b or 0 in of_a for of_a, of_b in shapes.values()):
        raise ValueError(
            "paired_tasks: expected the same tasks of both models, [seeds, items] of one item or more, twice the same, "
            f"got {shapes} of A and tasks {[*b]} of B"
        )
    random, found, every = np.random.default_rng(seed), {}, []
    by_seed = counts(max(seeds), resamples, random) / max(seeds)
    for task in a:
        difference = np.asarray(a[task], np.float64) - np.asarray(b[task], np.float64)
        items, mean = difference.shape[1], float(difference.mean())
        sign = 1 if difference.sum() >= 0 else -1  # one order of draws, so that a swap mirrors exactly
        patterns, often = np.unique(sign * difference, axis=1, return_counts=True)
        random = np.random.default_rng([seed, zlib.crc32(task.encode())])
        drawn = random.multinomial(items, often / items, size=resamples) / items
        every.append(100 * (sign * np.einsum("rs,sp,rp->r", by_seed, patterns, drawn, optimize=True)))
        low, high, p = sureness(every[-1], items, level).tolist()
        found[task] = Difference(100 * mean, low, high, 0.5 + mean / 2, p, windows=items, scale=ACCURACY)
    if len(a) > 1:
        fewest = min(each.windows for each in found.values())
        points, wins = (float(np.mean([each[place] for each in found.values()])) for place in (0, 3))
        low, high, p = sureness(np.mean(every, axis=0), fewest, level).tolist()
        found[ALL] = Difference(points, low, high, wins, p, windows=fewest, scale=ACCURACY)
    return found


# --- limits of A beside B --------------------------------------------------------------------------

_SLACK = 1e-9  # relative; a measured 105 % must not break a limit of 105 % by the last bit of a float


class Check(NamedTuple):
    """One limit beside what was measured."""

    name: str
    """Name of the limit: `max_size`."""
    what: str
    """What was measured: a metric, "weights", "forward pass"."""
    limit: str
    """The most that is allowed, with its unit."""
    measured: str
    """What was found, with its unit, and the interval where there is one."""
    passed: bool


def check_difference(what: str, difference: Difference, limit: float) -> Check:
    """Hold an increase of perplexity in percent, or a drop of accuracy in points, A's against B's, against a limit.

    The estimate decides; its interval is reported, or why there is none. A perplexity that is not finite breaks every
    limit.
    """
    unit, falls = difference.scale.units[0], difference.scale is ACCURACY
    value, measured = difference.percent[0], difference.numbers
    held = math.isfinite(difference.value)
    if not held:
        measured = "a perplexity is not finite"
    elif difference.same or not any(difference[:3]):
        exact = difference.largest == 0 or not any(difference[:3])
        value, measured = 0.0, f"0{unit}" if exact else f"0{unit} up to rounding"
    name, sign = ("max_accuracy_drop", MINUS) if falls else ("max_ppl_increase", "+")
    passed = held and (-value if falls else value) <= limit + _SLACK
    return Check(name, what, f"{sign}{limit:g}{unit}", measured, passed)


def check_bytes(name: str, what: str, bound: Bound, measured: int, baseline: int) -> Check:
    """Hold bytes against a limit in bytes, or in percent of B's."""
    share = 100 * measured / baseline
    shown = f"{mebibytes(measured)}, {share:.1f} % of {mebibytes(baseline)}"
    if bound.unit == "amount":
        return Check(name, what, mebibytes(bound.value), shown, measured <= bound.value)
    return Check(name, what, f"{bound.value:g} % of B", shown, share <= bound.value * (1 + _SLACK))


def check_seconds(percent: float, measured: float, baseline: float) -> Check:
    """Hold the time of a forward pass against a limit in percent of B's."""
    share = 100 * measured / baseline
    shown = f"{1e3 * measured:,.1f} ms, {share:.1f} % of {1e3 * baseline:,.1f} ms"
    return Check("max_latency", "forward pass", f"{percent:g} % of B", shown, share <= percent * (1 + _SLACK))


def verdict(checks: Sequence[Check]) -> str:
    """Say in one line how it went.

    >>> verdict([Check("max_size", "weights", "300.0 MiB", "432.2 MiB", False)])
    'FAIL: 1 of 1 limits is broken: max_size (weights)'
    """
    broken = [f"{check.name} ({check.what})" for check in checks if not check.passed]
    if not broken:
        return f"PASS: {'the limit holds' if len(checks) == 1 else f'all {len(checks)} limits hold'}"
    are = "is" if len(broken) == 1 else "are"
    return f"FAIL: {len(broken)} of {len(checks)} limits {are} broken: {', '.join(broken)}"


def mebibytes(value: int | float) -> str:
    """Write bytes in the unit that fits them.

    >>> mebibytes(300 * 2**20), mebibytes(1500)
    ('300.0 MiB', '1.5 KiB')
    """
    unit, size = ("MiB", 2**20) if value >= 2**20 else ("KiB", 2**10)
    return f"{value / size:,.1f} {unit}"
