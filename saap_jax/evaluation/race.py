"""Racing: variants are evaluated window by window, and one that is surely worse than another is evaluated no further.

The verdict is a set: variants that cannot be told apart from the best. It may be looked at after any window, and the
race be stopped at any of these looks, without a correction for looking: a variant that is as good as the best is in the
set, at all looks, with probability 1 - level.

For each pair the differences d of their losses on the same windows are tested by an e-process: the Bayes factor of
"d has mean μ, with μ / σ normal of variance g" against "mean 0", with the right Haar prior on σ,

    e = (1 + n g)^-½ · ((1 + t² / ν) / (1 + t² / (ν (1 + n g))))^(n / 2),     t = √n · mean / deviation,  ν = n - 1,

averaged over the g of `SCALES`. Of means above 0 alone, μ / σ the positive half of that normal, it is

    e⁺ = 2 e · F_n(t · √(n g / (1 + n g)) · √(n / (ν + t² / (1 + n g)))),     F_n Student's distribution, n degrees,

which grows with t, so that means below 0 make it cross a bound less often than 0 does. A variant leaves when e⁺ of what
it is worse than another by reaches 2 others / level (Ville's inequality, and Bonferroni's over the others: a best
variant is lost only if one of *them* is taken for better). That spends half of the level. The other half is for the
last look, which is fixed beforehand: there those that are left are compared by plain one-sided t-tests, corrected for
their number alone (the same windows decide it: so this half is held by simulation). So the verdict is about as sharp as
if all variants had been evaluated on all windows, which by e-values alone it is not: they have to hold at all looks. By
inverting the two-sided e-test each pair has an interval that is valid at all looks and of all pairs together; where the
intervals of all that are left lie within a margin, they are as good as each other for sure, and the race ends too.

What that is of: *these* keep-sets, on text like the windows, which come in a random order. A claim about estimators
needs calibration texts as blocks of their own, see `differences.paired_difference`; with several seeds, a race here is
of the means over the seeds that there are.

Sources: Hendriksen, de Heide & Grünwald, Optional stopping with Bayes factors, Bayesian Analysis 16, 2021 (right Haar
priors); Wang & Ramdas, Anytime-valid t-tests, 2024 (arXiv:2310.03722); the set is that of Hansen, Lunde & Nason, The
model confidence set, Econometrica 79, 2011, made sequential. Exact for normal differences; for others the slow test
suite simulates it.
"""

import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from saap_jax.evaluation.differences import ROUNDING
from saap_jax.evaluation.resample import FEWEST, LEVEL

SCALES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Variances g of the standardised difference that the tests look out for."""

Ending = Literal["", "alone", "tied", "spent"]
"""Why a race ended: one is left, those that are left are as good as each other, or there are no more windows."""


class RaceState(NamedTuple):
    """How a race stands."""

    left: tuple[int, ...]
    """Numbers of the variants that cannot be told apart from the best."""
    windows: tuple[int, ...]
    """How many windows each variant has been judged on."""
    ending: Ending
    """Empty while the race goes on."""
    next: int
    """Windows that those that are left have to be evaluated on for the next look; 0 after the end."""
    p_values: tuple[float, ...]
    """Of "as good as the best", for each variant, adjusted for the other variants and for all looks so far: the
    smallest of 2 others / e⁺ over the looks and over the others, and at the last look of 2 rivals · p over the rivals,
    the others that are left; at most 1."""


def race(
    losses: Sequence[Float[np.ndarray, "_ _"]],
    looks: Sequence[int],
    *,
    level: float = LEVEL,
    margin: float = 0.0,
) -> RaceState:
    """Judge a race from what has been evaluated so far; the same losses give the same verdict.

    Args:
        losses: of each variant, in nats a token, `[seeds, windows]`: windows in the order of the race, as many as there
            are.
        looks: after how many windows the race is looked at, ascending; the last is the budget.
        level: probability of losing a variant that is as good as the best, at most.
        margin: nats a token that count as no difference; 0: a tie is never sure.

    Raises:
        ValueError: no variant, or looks that do not ascend from `FEWEST` windows on.
    """
    if not losses or not looks or min(looks) < FEWEST or list(looks) != sorted(set(looks)):
        raise ValueError(
            f"race: expected variants and ascending looks from {FEWEST} windows on, got {len(losses)} variants and "
            f"{list(looks)}"
        )
    left, seen, p_values = [*range(len(losses))], np.zeros(len(losses), int), np.ones(len(losses))
    others, pairs = len(losses) - 1, len(losses) * (len(losses) - 1) / 2
    ending: Ending = "spent" if others else "alone"
    following = 0
    for count in looks if others else ():
        if any(losses[each].shape[1] < count for each in left):
            ending, following = "", count
            break
        seen[left] = count
        found = pairwise(np.stack([losses[each][:, :count].mean(axis=0) for each in left]))
        doubt = np.where(found.gap > ROUNDING, -log_evidence(found.t, count, above=True), 0.0)
        p_values[left] = np.minimum(p_values[left], np.exp(np.minimum(math.log(2 * others) + doubt.min(axis=1), 0)))
        stay = p_values[left] > level
        if count == looks[-1]:  # the other half of the level
            from scipy.special import stdtr

            p = np.where((found.gap > ROUNDING) & stay, stdtr(count - 1, -found.t), 1.0).min(axis=1)
            p_values[left] = np.minimum(p_values[left], 2 * max(stay.sum() - 1, 1) * p)
            stay = p_values[left] > level
        left = [each for each, stays in zip(left, stay, strict=True) if stays]
        with np.errstate(invalid="ignore"):
            reach = np.abs(found.gap) + found.error * boundary(count, math.log(pairs / level))
        if len(left) == 1 or (margin and reach[np.ix_(stay, stay)].max() < margin):
            ending = "alone" if len(left) == 1 else "tied"
            break
    return RaceState(tuple(left), tuple(seen.tolist()), ending, following, tuple(p_values.tolist()))


class Pairs(NamedTuple):
    """Of each pair of variants: the mean of the first less the second, its standard error, and their quotient."""

    gap: Float[np.ndarray, "variants variants"]
    error: Float[np.ndarray, "variants variants"]
    t: Float[np.ndarray, "variants variants"]


def pairwise(losses: Float[np.ndarray, "variants windows"]) -> Pairs:
    """Tell how the losses of each pair differ on the same windows.

    Of losses that are not finite: a variant with one is infinitely worse than one without, surely; of two with one
    nothing is known.
    """
    finite = np.asarray(np.isfinite(losses).all(axis=1))
    kept = np.where(finite[:, None], losses, 0.0)
    differences = kept[:, None] - kept
    gap = differences.mean(axis=-1)
    error = np.sqrt(differences.var(axis=-1, ddof=1) / losses.shape[1])
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(gap == 0, 0.0, gap / error)
    cases = [finite[:, None] != finite, ~finite[:, None] & ~finite]  # surely worse or better; unknown
    endless = np.where(finite[:, None], -np.inf, np.inf)
    choices = (((endless, 0.0), gap), ((0.0, np.inf), error), ((endless, 0.0), t))
    return Pairs(*(np.select(cases, both, otherwise) for both, otherwise in choices))


@functools.cache
def boundary(count: int, threshold: float) -> float:
    """Find the |t| of `count` differences at which their e-value reaches e^threshold; infinite where none does."""
    low, high = 0.0, 1e6
    if float(log_evidence(high, count)) < threshold:
        return math.inf
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float(log_evidence(middle, count)) < threshold else (low, middle)
    return high


def log_evidence(
    t: float | Float[np.ndarray, "*pairs"], count: int, *, above: bool = False
) -> Float[np.ndarray, "*pairs"]:
    """Compute the logarithm of the e-value of a t statistic of `count` differences, against a mean of 0.

    Args:
        above: that of e⁺, against a mean of 0 or below.

    >>> log_evidence(0.0, 100).round(2).item(), log_evidence(5.0, 100).round(2).item()
    (-1.32, 8.44)
    >>> [log_evidence(t, 100, above=True).round(2).item() for t in (-5.0, 0.0, 5.0)]
    [-2.91, -1.32, 9.13]
    """
    t = np.clip(np.asarray(t, np.float64), -1e150, 1e150)[..., None]  # an axis for scales; its square is finite
    square, free, spread = np.square(t), count - 1, count * np.asarray(SCALES)
    each = -0.5 * np.log1p(spread) + 0.5 * count * (np.log1p(square / free) - np.log1p(square / (free * (1 + spread))))
    if above:
        from scipy.special import stdtr

        posterior = t * np.sqrt(spread / (1 + spread) * count / (free + square / (1 + spread)))
        with np.errstate(divide="ignore"):
            each = each + np.log(2 * stdtr(count, posterior))
    return np.asarray(np.logaddexp.reduce(each, axis=-1) - math.log(len(SCALES)))
