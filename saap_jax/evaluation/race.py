"""Racing: variants are evaluated window by window, and one that is surely worse than another is evaluated no further.

Each pair is compared by the interval of `evidence`, which holds however often one looks: a variant leaves when its
interval beside another lies above 0, corrected for the number of others that began. What is left is a set: a variant
that is as good as the best is in it, at all looks, with probability 1 - level / 2. It is that of Hansen, Lunde & Nason,
The model confidence set, Econometrica 79, 2011, made sequential. Where the intervals of all pairs that are left,
corrected for the number of pairs that there were, lie within a margin, they are as good as each other for sure, and the
race ends too.

What that is of: *these* keep-sets, on text like the windows, which come in a random order. A claim about estimators
needs calibration texts as blocks of their own, see `differences_against`; with several seeds, a race here is of the
means over the seeds that there are.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from saap_jax.evaluation.differences import ROUNDING
from saap_jax.evaluation.evidence import boundary, log_evidence, threshold
from saap_jax.evaluation.resample import LEVEL

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


def race_state(
    losses: Sequence[Float[np.ndarray, "_ _"]],
    looks: Sequence[int],
    *,
    level: float = LEVEL,
    margin: float = 0.0,
) -> RaceState:
    """Tell how a race stands, from what has been evaluated so far; the same losses give the same answer.

    Args:
        losses: of each variant, in nats a token, `[seeds, windows]`: windows in the order of the race, as many as there
            are.
        looks: after how many windows the race is looked at, ascending from `FEWEST` on; the last is the budget.
        level: of the intervals.
        margin: nats a token that count as no difference; 0: a tie is never sure.
    """
    left = [*range(len(losses))]
    seen = np.zeros(len(losses), int)
    others = len(losses) - 1
    pairs = len(losses) * (len(losses) - 1) // 2
    ending: Ending = "alone"
    if others:
        ending = "spent"
    following = 0
    for count in looks:
        if not others:
            break
        # Not all that are left have come as far as this look: the race goes on there.
        if any(losses[each].shape[1] < count for each in left):
            ending = ""
            following = count
            break
        seen[left] = count
        found = pairwise(np.stack([losses[each][:, :count].mean(axis=0) for each in left]))

        # A variant leaves that is surely worse than another of those that are left.
        worse = (found.gap > ROUNDING) & (log_evidence(found.t, count) >= threshold(others, level))
        stay = np.asarray(~worse.any(axis=1))
        left = [each for each, stays in zip(left, stay, strict=True) if stays]

        # How far apart each pair may be at most; the race ends where that is within the margin for all.
        with np.errstate(invalid="ignore"):
            reach = np.abs(found.gap) + found.error * boundary(count, threshold(pairs, level))
        if len(left) == 1:
            ending = "alone"
            break
        if margin and reach[np.ix_(stay, stay)].max() < margin:
            ending = "tied"
            break
    return RaceState(tuple(left), tuple(seen.tolist()), ending, following)


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
    return Pairs(
        gap=np.select(cases, (endless, 0.0), gap),
        error=np.select(cases, (0.0, np.inf), error),
        t=np.select(cases, (endless, 0.0), t),
    )
