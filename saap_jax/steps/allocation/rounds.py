"""Iterative pruning: the chain before it again and again, a little more each time."""

import dataclasses
import math
from typing import Annotated

from saap_jax.checks import number
from saap_jax.steps.allocation.allocation import meets
from saap_jax.steps.base import Context, Cost, Prefix, State, Step, TextSize, step


@step("rounds")
@dataclasses.dataclass(frozen=True)
class Rounds(Step):
    """Run the chain before it at every multiple of a share, each time on what the last time left.

    A score tells what a unit matters to the model as it is. Once others are gone, what is left matters more, and not
    all of it equally: so the model is observed again. Allocations leave removed units removed; a refinement may take
    another unit in the place of one. Each round costs what the steps before it cost.
    """

    kind = "allocation"
    after = ("score",)
    runs_prefix = True

    every: Annotated[float, number("a share in [0.0001, 1)", lambda share: 0.0001 <= share < 1)] = 0.1
    """Share of the prunable parameters that goes in a round."""

    def plan(self, text: TextSize, ratio: float, prefix: Prefix) -> Cost:
        """The steps before it in each round; scoring anew takes about four passes."""
        rounds = len(stations(ratio, self.every))
        return Cost(4 * (rounds - 1), prefix_runs=rounds)

    def __call__(self, state: State, on: Context) -> State:
        """Run the rounds; a round that a larger block has made needless is left out."""
        # Each round begins with the limits and the text of the start: those that its steps leave are for its end.
        limits = state.limits
        text = state.text
        for ratio in stations(on.ratio, self.every):
            if not (ratio and meets(state.subject, state.keep, ratio)):
                state = on.chain(self).run_prefix(state._replace(limits=limits, text=text), ratio)
        return state


def stations(ratio: float, every: float) -> list[float]:
    """Return the shares on the way to a ratio, and the ratio.

    >>> stations(0.5, 0.15)
    [0.15, 0.3, 0.45, 0.5]
    """
    multiples = [round(n * every, 9) for n in range(1, math.ceil(ratio / every))]
    # a last round that removes next to nothing costs as much as the others
    return [*(each for each in multiples if ratio - each > 1e-5 * ratio), ratio]
