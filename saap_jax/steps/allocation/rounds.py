"""Iterative pruning: the chain before it again and again, a little more each time."""

import dataclasses
import math
from typing import Annotated

import numpy as np

from saap_jax.checks import number
from saap_jax.steps.allocation.allocation import meets
from saap_jax.steps.base import Before, Context, Extent, Room, State, Step, step


@step("rounds")
@dataclasses.dataclass(frozen=True)
class Rounds(Step):
    """Run the chain before it at every multiple of a share, each time on what the last time left.

    A score tells what a unit matters to the model as it is. Once others are gone, what is left matters more, and not
    all of it equally: so the model is observed again. Allocations leave removed units removed; a refinement may take
    another unit in the place of one. Each round costs what the steps before it cost.
    """

    kind = "allocation"
    drives = True

    every: Annotated[float, number("a share in [0.0001, 1)", lambda share: 0.0001 <= share < 1)] = 0.1
    """Share of the prunable parameters that goes in a round."""

    def passes(self, before: float, text: Extent, ratio: float, room: Room) -> float:
        """Those of the steps before it in each round; scoring anew takes about four."""
        rounds = len(stations(ratio, self.every))
        return rounds * before + 4 * (rounds - 1)

    def __call__(self, state: State, on: Context, before: Before) -> State:
        """Run the rounds; a round that a larger block has made needless is left out."""
        # what the end of the chain says of them is not for its beginning
        limits = state.limits
        text = state.text
        for ratio in stations(on.ratio, self.every):
            if not (ratio and meets(state.subject, state.keep, ratio)):
                state = before(state._replace(limits=limits, text=text), ratio)
        return state


def stations(ratio: float, every: float) -> list[float]:
    """Return the shares on the way to a ratio, and the ratio.

    >>> stations(0.5, 0.15)
    [0.15, 0.3, 0.45, 0.5]
    """
    steps = [round(n * every, 9) for n in range(1, math.ceil(ratio / every))]
    return [*(step for step in steps if step < ratio and not np.isclose(step, ratio)), ratio]
