"""Differences of models on the same text or items, and how sure they are, see `evidence`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from saap_jax.checks import Bound
from saap_jax.evaluation.evidence import boundary, by_article, threshold
from saap_jax.evaluation.resample import FEWEST, LEVEL, few, format_interval
from saap_jax.evaluation.scales import ACCURACY, PERPLEXITY, Scale
from saap_jax.runtime.words import MINUS, signed

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
    """The mean of A - B in nats a token, or in points (percent of the items), and its interval.

    Below 0, A has the lower loss, or the lower accuracy.
    """

    value: float
    low: float
    high: float
    win_rate: float = math.nan
    """Share of the windows (of all seeds) on which A has the lower loss, or of the items that A answers right and B
    wrong; a tie counts half."""
    largest: float = math.nan
    """Largest difference of a window, without its sign."""
    windows: int = 0
    """Windows, articles or items that the interval is of, over several tasks those of the smallest; 0 where that is not
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
        """True where the interval does not hold 0, and more differs than rounding."""
        return (self.low > 0 or self.high < 0) and not self.same

    @property
    def tied(self) -> bool:
        """True where there is an interval, and the difference is not sure."""
        return not (math.isnan(self.low) or self.sure)

    @property
    def numbers(self) -> str:
        """The difference with its interval, or why there is none.

        >>> Difference(2.0, 1.0, 3.0, scale=ACCURACY).numbers, Difference(math.log(1.02), math.nan, math.nan).numbers
        ('+2.0 points (+1.0 to +3.0)', '+2.0 %, without an interval, which takes 8 windows; here are 0')
        """
        (value, low, high) = self.percent
        (unit, unit_of_ends) = self.scale.units
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
        (value, low, high) = self.percent
        (unit, unit_of_ends) = self.scale.units
        if self.largest == 0 or self.value == self.low == self.high == 0:
            return "A and B are the same: the difference is exactly 0"
        if self.same:
            return (
                f"A and B are the same up to rounding: no window differs by more than {self.largest:.0e} nats a token"
            )
        if not math.isfinite(self.value) or any(map(math.isnan, self.percent[: 1 if math.isnan(self.low) else 3])):
            return f"A and B cannot be compared: a {self.scale.noun} is not finite"
        if not self.sure:
            if math.isnan(low):
                told = "who is better is not known"
            else:
                told = "A and B cannot be told apart"
            return f"{told}: the difference is {self.numbers}"
        (least, most) = sorted((abs(low), abs(high)))
        show = f"{{:.{decimals_of(value)}f}}".format
        than = "lower" if value < 0 else "higher"
        interval = format_interval(least, most, show)
        return f"A has a {than} {self.scale.noun} than B by {show(abs(value))}{unit} ({interval}{unit_of_ends})"


def paired_difference(
    a: Float[np.ndarray, "seeds windows"],
    b: Float[np.ndarray, "seeds windows"],
    *,
    others: int = 1,
    scale: Scale = PERPLEXITY,
    articles: Sequence[int] = (),
) -> Difference:
    """Measure the mean difference of two models' losses, with its interval; see `differences_against`."""
    return differences_against(b, a[None], others=others, scale=scale, articles=articles)[0]


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
    variants: Float[np.ndarray, "variants seeds windows"],
    *,
    others: int | None = None,
    scale: Scale = PERPLEXITY,
    articles: Sequence[int] = (),
) -> list[Difference]:
    """Measure how each variant differs from the base, variant - base: above 0 the base is better.

    A window is hard or easy for both, so differences vary much less than losses do. The interval is the one of
    `evidence`, of the means over the seeds. Of several seeds it is at least as wide as Student's of their means, at the
    same level: few seeds tell little of how much seeds vary. Where a loss is not finite, or there are fewer than
    `FEWEST` windows, both ends are NaN.

    Args:
        base: mean loss of each window in nats a token, windows of equal length; a row for each calibration seed.
        variants: the same of each variant.
        others: how many a model is compared with, for which intervals are corrected; None: the variants given.
        scale: what the figures are that differences are percent of.
        articles: the number of the article of each window, see `by_article`; empty: not known.

    Raises:
        ValueError: shapes that differ, or no window.
    """
    base = np.asarray(base, np.float64)
    variants = np.asarray(variants, np.float64)
    if variants.ndim != 3 or variants.shape[1:] != base.shape or not base.size:
        raise ValueError(
            f"differences: expected [seeds, windows] of one window or more, the same of all, got {base.shape} and "
            f"{variants.shape[1:]}"
        )
    with np.errstate(invalid="ignore"):
        difference = variants - base
        values = difference.mean(axis=(1, 2))
        largest = np.abs(difference).max(axis=(1, 2))
        units = by_article(difference, articles)
    wins = ((variants < base) + 0.5 * (variants == base)).mean(axis=(1, 2))
    halves = half_widths(units, len(variants) if others is None else others)
    of = math.inf if scale.logarithmic else float(base.mean())
    found = []
    rows = np.stack((values, halves, wins, largest), axis=1).tolist()
    for value, half, win, most in rows:
        most = most if math.isfinite(value) else math.nan
        found.append(Difference(value, value - half, value + half, win, most, units.shape[2], of, scale))
    return found


def half_widths(units: Float[np.ndarray, "variants seeds units"], others: int) -> Float[np.ndarray, "variants"]:
    """Compute half the width of each mean's interval, NaN of fewer than `FEWEST` units, or of what is not finite."""
    count = units.shape[2]
    known = np.isfinite(units).all(axis=(1, 2))
    halves = np.full(len(units), np.nan)
    means = units[known]
    if count < FEWEST:
        return halves
    by_unit = boundary(count, threshold(others)) * means.mean(axis=1).std(axis=1, ddof=1) / math.sqrt(count)
    halves[known] = np.maximum(by_unit, student(means.mean(axis=2), others))
    return halves


def student(means: Float[np.ndarray, "*variants seeds"], others: int) -> Float[np.ndarray, "*variants"]:
    """Compute half the width of Student's interval of the means of seeds; 0 of one seed, which tells nothing."""
    from scipy.special import stdtrit

    if (seeds := means.shape[-1]) < 2:
        return np.zeros(means.shape[:-1])
    quantile = float(stdtrit(seeds - 1, 1 - LEVEL / (2 * max(others, 1))))
    return np.asarray(quantile * means.std(axis=-1, ddof=1) / math.sqrt(seeds))


def student_p(differences: Sequence[float]) -> float:
    """Compute Student's two-sided p-value of "their mean is 0"; 0 of one, which tells nothing of how much they vary."""
    from scipy.special import stdtr

    mean = float(np.mean(differences))
    count = len(differences)
    if count < 2 or not mean:
        return float(not mean)
    with np.errstate(divide="ignore"):
        ratio = abs(mean) * math.sqrt(count) / np.std(differences, ddof=1)
    return float(2 * stdtr(count - 1, -ratio))


ALL = "all tasks"
"""Name of the mean over tasks, each of which counts the same."""


Outcomes = Mapping[str, Bool[np.ndarray, "_seeds _items"]]
"""{task: which items were answered right}, a row for each calibration seed, the same seeds in every task."""


def paired_tasks(a: Outcomes, b: Outcomes, *, others: int = 1) -> dict[str, Difference]:
    """Compare the accuracies of two models on each task and, of two tasks or more, over all of them.

    Units are items, in the interval of `evidence`. Tasks are not drawn: `ALL` speaks of these tasks and of no others,
    each of which counts the same; its interval is as of so many items as the smallest of them has, and no narrower than
    Student's of the means of seeds, which may help or harm all tasks alike.

    Args:
        a, b: the same tasks, items and seeds.
        others: how many a model is compared with.
    """
    found = {}
    by_seed = []
    for task in a:
        points = 100 * (np.asarray(a[task], np.float64) - np.asarray(b[task], np.float64))
        value = float(points.mean())
        half = float(half_widths(points[None], others)[0])
        wins = 0.5 + value / 200
        found[task] = Difference(value, value - half, value + half, wins, windows=points.shape[1], scale=ACCURACY)
        by_seed.append(points.mean(axis=1))
    if len(a) > 1:
        each = [*found.values()]
        value, wins = (float(np.mean([one[place] for one in each])) for place in (0, 3))
        fewest = min(one.windows for one in each)
        reach = [boundary(fewest, threshold(others)) / boundary(one.windows, threshold(others)) * (one.high - one.value)
                 for one in each] if fewest >= FEWEST else [math.nan]  # fmt: skip
        half = float(np.maximum(math.hypot(*reach) / len(each), student(np.mean(by_seed, axis=0), others)))
        found[ALL] = Difference(value, value - half, value + half, wins, windows=fewest, scale=ACCURACY)
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
    unit = difference.scale.units[0]
    falls = difference.scale is ACCURACY
    value = difference.percent[0]
    measured = difference.numbers
    held = math.isfinite(difference.value)
    if not held:
        measured = "a perplexity is not finite"
    elif difference.same or not any(difference[:3]):
        exact = difference.largest == 0 or not any(difference[:3])
        value = 0.0
        if exact:
            measured = f"0{unit}"
        else:
            measured = f"0{unit} up to rounding"
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
