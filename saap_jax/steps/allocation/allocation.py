"""What all allocations are: a way to share a budget between layers and structures, and the choice that follows."""

import dataclasses
from collections.abc import Callable

import numpy as np

from saap_jax.steps.allocation.budget import SLACK, By, Sharing, Solver
from saap_jax.steps.allocation.search import Prunable, Selection, largest_ratio, search
from saap_jax.steps.base import Before, Context, State, Step, need
from saap_jax.steps.limits import Within
from saap_jax.subjects.base import Subject
from saap_jax.types import Keep, Scores


@dataclasses.dataclass(frozen=True)
class Allocation(Sharing, Step):
    """Keep what a way of sharing the budget leaves; a subclass says `shares`, or `ranks` all units in one list."""

    kind = "allocation"

    def __call__(self, state: State, on: Context, before: Before) -> State:
        """Keep the units of the highest scores that the budget leaves."""
        within = state.limits.at(on.final)
        selection = choose(state.subject, need(state, self), on.ratio, self, within, state.gone)
        return state._replace(keep=selection.keep, limits=within)


def choose(
    subject: Subject,
    scores: Scores,
    ratio: float,
    allocation: Allocation,
    within: Within,
    gone: Keep | None = None,
) -> Selection:
    """Choose the units to keep so that at least `ratio` of the prunable parameters goes; see `search`.

    Where two structures meet in one matrix, what both hold counts once: the search, which adds up what single units
    cost, is then asked for whatever removes the share that is wanted.

    Raises:
        ValueError: a ratio that cannot be met, a limit of a structure that does not exist, or scores that the search
            refuses.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio: expected a number in [0, 1), got {ratio}")
    within, prunable = prunable_of(subject, within)
    if prunable.limits is None:
        return search(scores, prunable, ratio, allocation, within, gone)

    def chosen(asked: float) -> Selection:
        return selection_of(subject, search(scores, prunable, asked, allocation, within, gone).keep, ratio)

    def holds(keep: Keep) -> bool:
        return subject.removed(keep) >= ratio * subject.prunable * (1 - 1e-12)

    top = largest_ratio(prunable, allocation, within)
    most = chosen(top)
    if not holds(most.keep):
        raise ValueError(
            f"ratio: {ratio:.4g} of the prunable parameters cannot be removed; the largest possible ratio is "
            f"{int(most.actual * 10_000) / 10_000:.4f} under min_keep, max_ratio and multiple_of of `within`: relax "
            "one of them"
        )
    if prunable.parameters == subject.prunable:  # no matrix is of two structures
        return chosen(min(ratio, top))
    return bisected(0.0, top, chosen, holds)


def prunable_of(subject: Subject, within: Within) -> tuple[Within, Prunable]:
    """Return the limits with what the model asks for beside them, and what there is to prune."""
    limits = subject.limits(within)
    if isinstance(limits, Within):
        return limits, Prunable(subject.costs, subject.existing)
    return within, Prunable(subject.costs, subject.existing, limits)


def selection_of(subject: Subject, keep: Keep, asked: float) -> Selection:
    """Return a keep-set with what it removes, by which it was asked for."""
    removed = subject.removed(keep)
    return Selection(keep, asked, removed / subject.prunable, removed)


def meets(subject: Subject, keep: Keep, ratio: float) -> bool:
    """Say whether a keep-set removes a share of the prunable parameters."""
    return subject.removed(keep) >= ratio * subject.prunable * (1 - SLACK)


def most_removable(subject: Subject, allocation: Allocation, within: Within) -> float:
    """Return the largest ratio that `choose` can meet whatever the scores, rounded down to four decimals."""
    within, prunable = prunable_of(subject, within)
    top = largest_ratio(prunable, allocation, within)
    if prunable.limits is None:
        return top
    equal: Scores = {name: np.ones(units.shape) for name, units in prunable.existing.items()}
    removed = subject.removed(search(equal, prunable, top, allocation, within).keep)
    return min(removed * 10_000 // max(subject.prunable, 1) / 10_000, 0.9999)


TOLERANCE = 0.001
"""How exactly the smallest ratio at which something holds is found."""


def bisected(low: float, high: float, select: Callable[[float], Selection], holds: Callable[[Keep], bool]) -> Selection:
    """Return the selection at the smallest ratio that holds, where that of `high` does."""
    if holds(select(low).keep):
        return select(low)
    while high - low > TOLERANCE:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(select(middle).keep) else (middle, high)
    return select(high)


__all__ = ["Allocation", "By", "Selection", "Solver", "bisected", "choose", "meets", "most_removable"]
