"""Stage 4: how far can a model be pruned? The largest ratio that holds a limit.

Where the curve first breaks the limit is looked for from below: on the grid the first ratio that breaks it and the one
before it are a *bracket*, which bisection narrows. A curve that holds the limit again further up changes nothing; where
that happens is on record (`again`). The unpruned model holds every limit, so ratio 0 is the lower end of the first
bracket; where the whole grid holds, the largest ratio that the search can meet is the next one to be tried.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float

from saap_jax.evaluation.differences import losses_of, student, student_p
from saap_jax.evaluation.evidence import by_article
from saap_jax.evaluation.resample import LEVEL, counts, holm, resamples_for, sureness
from saap_jax.evaluation.scales import scale_of
from saap_jax.records import Row, RunRecord

Key = TypeVar("Key", bound=Hashable)


class Bracket(NamedTuple):
    """What is known of the largest ratio that holds: at least `low`, below `high`."""

    low: float
    """Holds."""
    high: float
    """Does not; infinite where no such ratio is known."""
    top: float
    """Largest ratio that can be tried."""
    rounds: int = 0
    """Ratios tried beyond the grid."""

    def next(self, tolerance: float) -> float | None:
        """Choose the ratio to try next, or None where the answer is known to the tolerance.

        >>> Bracket(0.2, 0.3, 0.9).next(0.005), Bracket(0.5, math.inf, 0.9).next(0.005)
        (0.25, 0.9)
        >>> Bracket(0.2, 0.204, 0.9).next(0.005), Bracket(0.9, math.inf, 0.9).next(0.005)
        (None, None)
        """
        if math.isinf(self.high):
            return self.top if self.low < self.top else None
        if self.high - self.low > tolerance:
            return round((self.low + self.high) / 2, 6)
        return None


def first_bracket(ratios: Sequence[float], holds: Sequence[bool], top: float) -> Bracket:
    """Find the first crossing from below on a grid of ratios.

    >>> first_bracket((0.1, 0.2, 0.3), (True, False, True), 0.9)
    Bracket(low=0.1, high=0.2, top=0.9, rounds=0)
    """
    low = 0.0
    for ratio, held in sorted(zip(ratios, holds, strict=True)):
        if not held:
            return Bracket(low, ratio, top)
        low = ratio
    return Bracket(low, math.inf, max(top, low))


def bisect(
    brackets: Mapping[Key, Bracket], judge: Callable[[dict[Key, float]], Mapping[Key, bool]], tolerance: float
) -> dict[Key, Bracket]:
    """Narrow all brackets to the tolerance, in rounds: log₂(width / tolerance) of them for the widest.

    Args:
        judge: tells of one ratio each, in one call a round, whether it holds. Only open brackets are asked about.
    """
    found = dict(brackets)
    while True:
        asked = {key: bracket.next(tolerance) for key, bracket in found.items()}
        asked = {key: ratio for key, ratio in asked.items() if ratio is not None}
        if not asked:
            return found
        for key, held in judge(asked).items():
            ends = {"low" if held else "high": asked[key]}
            found[key] = found[key]._replace(**ends, rounds=found[key].rounds + 1)


def crossing(
    ratios: Float[np.ndarray, "points"], losses: Float[np.ndarray, "draws points"], limits: Float[np.ndarray, "draws"]
) -> Float[np.ndarray, "draws"]:
    """Find where each curve first exceeds its limit, by lines between points; the last ratio where none does.

    Args:
        ratios: ascending, from 0 on, which holds: a limit is the unpruned model's loss or above.
        losses: a loss that is not finite counts as above every limit.

    >>> crossing(np.array([0.0, 0.2, 0.4]), np.array([[1.0, 1.2, 2.2]]), np.array([1.7])).round(6).item()
    0.3
    """
    losses = np.where(np.isfinite(losses), losses, 1e300)
    above = losses > limits[:, None]
    after = np.where(above.any(axis=1), above.argmax(axis=1), len(ratios) - 1)
    before = np.maximum(after - 1, 0)
    rows = np.arange(len(losses))
    rise = losses[rows, after] - losses[rows, before]
    share = np.divide(limits - losses[rows, before], rise, out=np.ones(len(rows)), where=rise > 0)
    share = np.where(above.any(axis=1), np.clip(share, 0, 1), 1.0)
    return ratios[before] + share * (ratios[after] - ratios[before])


# --- from the records of a run -------------------------------------------------------------------


class OverSeeds(NamedTuple):
    """A number over seeds."""

    mean: float
    spread: float
    """Standard deviation over the seeds; NaN where there is one."""
    low: float
    high: float
    """Bootstrap interval of the mean, over seeds and windows, no narrower than Student's over several seeds; NaN of
    fewer than `FEWEST` windows."""


class Found(NamedTuple):
    """What a run found of one variant, over its seeds."""

    variant: str
    seeds: int
    ratio: OverSeeds
    """Largest ratio (as asked) that holds the limit."""
    actual: float
    """Share of the prunable parameters that goes at that ratio, mean over the seeds."""
    ppl: float
    """Perplexity at that ratio, exp of the mean loss over the seeds."""
    everywhere: int
    """Seeds whose limit holds up to the largest possible ratio."""
    again: tuple[float, ...]
    """Ratios of the grid above the first crossing at which the limit holds again, in any seed."""
    p_value: float = math.nan
    """Of "goes as far as the one of the largest ratio", adjusted for the number of others; NaN of that one itself."""
    windows: int = 0
    """Windows, or articles, that the intervals are over."""

    @property
    def tied(self) -> bool:
        """True where it cannot be told apart from the one that goes furthest."""
        return self.p_value >= LEVEL


def _curve(
    dense: Float[np.ndarray, "windows"], rows: Sequence[Row], metric: str
) -> tuple[Float[np.ndarray, "points"], Float[np.ndarray, "points windows"]]:
    """Collect ratios, and the loss of each window there, the unpruned model first. On windows that a race left out, a
    loss is as far above the unpruned model's as it is on average on the others."""
    losses = [dense]
    for values, seen in (losses_of(row, metric) for row in rows):
        losses.append(np.where(seen, values, dense + (values - dense)[seen].mean()))
    return np.array([0.0, *(row["ratio_asked"] for row in rows)]), np.stack(losses)


def _over_seeds(
    values: Sequence[float], drawn: Sequence[np.ndarray], by_seed: np.ndarray, units: int, top: float
) -> tuple[OverSeeds, np.ndarray]:
    """Give the mean of one value a seed with its interval, and the mean in each draw; NaN does not count.

    Args:
        drawn: the value of each seed in each draw.
        by_seed: weights of seeds, `[draws, seeds]`.
        units: windows or articles that draws are of.
        top: the largest value that was measured.
    """
    known = np.isfinite(drawn)
    weights = by_seed.T * known
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (weights * np.where(known, drawn, 0)).sum(axis=0) / weights.sum(axis=0)
    low, high, _ = sureness(means[np.isfinite(means)], units).tolist()
    of = np.array(values, np.float64)[np.isfinite(values)]
    mean = float(of.mean()) if len(of) else math.nan
    if half := float(student(of, 1)):
        low, high = np.clip([np.minimum(low, mean - half), np.maximum(high, mean + half)], 0, top).tolist()
    return OverSeeds(mean, float(of.std(ddof=1)) if len(of) > 1 else math.nan, low, high), means


def found_variants(run: RunRecord, candidates: Sequence[Row], *, seed: int = 0) -> list[Found]:
    """Find each variant's largest ratio over its seeds, the largest ratio first.

    Intervals: seeds and windows (or articles, see `by_article`) are drawn with replacement, each by itself, the same
    windows for all points of a curve and for the unpruned model, from which the limit follows. The ratio of a draw is
    read off lines between all measured points, so it may end a little beyond the bisected one; its interval does not go
    beyond what was measured. Whether a variant goes as far as the first is told from the differences of their ratios in
    the same draws. Few seeds that are drawn hardly tell how much seeds differ: of several, neither interval nor p-value
    is below Student's over the seeds.
    """
    frontier = run["frontier"]
    metric = run["frontier"]["metric"]
    dense = np.asarray(run["dense"]["losses"][metric], np.float64)
    articles = run.get("articles", {}).get(metric, ())
    scale = scale_of(metric)
    lines = {}
    for line in frontier["lines"]:
        lines.setdefault(line["variant"], []).append(line)
    resamples = resamples_for(len(lines) - 1, frontier["resamples"])
    random = np.random.default_rng(seed)
    windows = by_article(dense, articles).size
    by_window, by_seed = (
        counts(count, resamples, random) / count for count in (windows, max(len(each) for each in lines.values()))
    )
    found = []
    drawn_ratios = {}
    for variant, own in lines.items():
        at = []
        ratios = []
        for line in own:
            rows = [row for row in candidates if (row["variant"], row["seed"]) == (variant, line["seed"])]
            rows.sort(key=lambda row: row["ratio_asked"])
            points, losses = _curve(dense, rows, metric)
            with np.errstate(invalid="ignore"):  # a loss may be infinite
                drawn = np.einsum("du,pu->dp", by_window, by_article(losses, articles))
            worse = math.log1p(frontier["percent"] / 100)
            limits = drawn[:, 0] + (worse if scale.logarithmic else np.abs(drawn[:, 0]) * frontier["percent"] / 100)
            ratios.append(crossing(points, drawn, limits))
            at.append(next((row for row in rows if row["ratio_asked"] == line["ratio"]), run["dense"]))
        top = max((row["ratio_asked"] for row in candidates if row["variant"] == variant), default=0.0)
        asked = [line["ratio"] for line in own]
        ratio, drawn_ratios[variant] = _over_seeds(asked, ratios, by_seed, windows, top)
        actual = float(np.mean([row.get("ratio_actual", 0.0) for row in at]))
        figure = scale.value(float(np.mean([scale.loss(row["ppl"][metric]) for row in at])))
        again = tuple(sorted({ratio for line in own for ratio in line["again"]}))
        everywhere = sum(line["breaks_at"] is None for line in own)
        found.append(Found(variant, len(own), ratio, actual, figure, everywhere, again, windows=windows))
    first, *others = sorted(found, key=lambda each: -each.ratio.mean)
    p_values = holm([
        np.maximum(
            sureness(drawn_ratios[first.variant] - drawn_ratios[each.variant], windows)[2],
            student_p([a["ratio"] - b["ratio"] for a in lines[first.variant] for b in lines[each.variant]
                       if a["seed"] == b["seed"]]),
        )
        for each in others
    ]).tolist()  # fmt: skip
    return [first, *(each._replace(p_value=p) for each, p in zip(others, p_values, strict=True))]
