"""Stage 2c, evolved: how many units each layer loses is searched by evolution; which, their scores say.

A state says how many units of each (layer, structure) are gone. A generation makes offspring of the best state so far:
each moves some quanta of units from one layer to another of the same structure, where they cost the same, so that the
budget stays met. They are judged by the divergence from the unpruned model in stages: many on little text, the best of
them on more, and in the last stage together with their parent, which stays unless a child is better there.

Source: EvoPress (Sieberling et al., arXiv:2410.14649), algorithm 1: a (1 + λ) evolution by level switches, of which a
child has min(a, b) with a and b drawn from 1 to 3, and selection in several steps. Deviations: levels are units gone
of what the scores order, and held-out text says at the end whether the last state or the first one counts.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from saap_jax.config.search import EvolveConfig, SearchConfig
from saap_jax.selection.search import Selection, levels_of
from saap_jax.subjects.base import Objective
from saap_jax.types import Keep, Scores

SWITCHES = 3
"""Of a child at most."""

TRIES = 100
"""Draws of a switch before a child goes without it, since no layer can give what another takes."""

Place = tuple[str, int]
"""Structure and layer."""

State = dict[Place, int]
"""Place -> index of its level: how much of what it can lose it has lost."""


def evolved(
    start: Selection,
    priority: Scores,
    objective: Objective,
    costs: dict[str, np.ndarray],
    existing: Keep,
    config: SearchConfig,
    made: Callable[[Keep], Selection],
    *,
    progress: Callable[[Sequence[int]], Iterator[int]] = iter,
) -> Selection:
    """Search how many units each layer loses, from a selection on; return it, or what it began with.

    Args:
        priority: what orders the units of a layer, `[layers, units]` a structure, larger = kept longer.
        objective: what is lowered.
        costs: parameters a unit, `[layers]` a structure.
        existing: which units there are.
        config: limits of the search, and how to evolve.
        made: returns a keep-set with what it removes.
        progress: wraps the generations, to show progress.
    """
    options = config.evolve
    order = {name: np.argsort(np.where(existing[name], values, np.inf), axis=1, kind="stable")
             for name, values in priority.items()}  # fmt: skip
    levels = {(name, layer): each for name, all_of in levels_of(existing, config).items()
              for layer, each in enumerate(all_of)}  # fmt: skip
    moves = _Moves(levels, costs, existing, config)

    def keep_of(state: State) -> Keep:
        keep = {name: units.copy() for name, units in existing.items()}
        for (name, layer), level in state.items():
            keep[name][layer, order[name][layer, : levels[name, layer][level]]] = False
        return keep

    gone = {name: (existing[name] & ~kept).sum(axis=1) for name, kept in start.keep.items()}
    first = {(name, layer): int(np.searchsorted(each, gone[name][layer])) for (name, layer), each in levels.items()}
    best, random = first, np.random.default_rng(0)
    for _ in progress(range(options.generations)):
        children = [moves.child(best, random) for _ in range(options.offspring)]
        best = _selected(best, children, options, lambda state, part: objective.value(keep_of(state), part),
                         objective.parts, random)  # fmt: skip
    judged = [objective.judge(keep_of(state)) for state in (first, best)]
    outcome = made(keep_of(best)) if judged[1] < judged[0] else start
    return outcome._replace(divergences=(judged[0], judged[1]))


def _selected(
    parent: State,
    children: Sequence[State],
    options: EvolveConfig,
    value: Callable[[State, int], float],
    parts: int,
    random: np.random.Generator,
) -> State:
    """Return the best of a generation, judged in stages on microbatches that are drawn for each stage."""
    for stage, (stay, count) in enumerate(zip(options.survivors, options.microbatches, strict=True)):
        last = stage == len(options.survivors) - 1
        among = [parent, *children] if last else list(children)
        drawn = random.choice(parts, size=min(count, parts), replace=False)
        means = [float(np.mean([value(state, int(part)) for part in drawn])) for state in among]
        children = [among[number] for number in np.argsort(means, kind="stable")[:stay]]
    return children[0]


class _Moves:
    """Level switches between layers, of as many parameters each way."""

    def __init__(
        self, levels: dict[Place, np.ndarray], costs: dict[str, np.ndarray], existing: Keep, config: SearchConfig
    ) -> None:
        """Take quanta of `evolve.quantum` of a layer's units; whole sub-blocks with `depth`."""
        self._parameters = {place: each * int(costs[place[0]][place[1]]) for place, each in levels.items()}
        self._steps = {}
        for (name, layer), each in levels.items():
            units = int(existing[name][layer].sum()) * config.evolve.quantum
            apart = int(np.diff(each).max(initial=1))
            self._steps[name, layer] = max(1, round(units / apart))
        names = dict.fromkeys(name for name, _ in levels)
        self._places = [places for name in names if len(places := self._free(name)) > 1]

    def _free(self, name: str) -> list[Place]:
        return [place for place, each in self._parameters.items() if place[0] == name and len(each) > 1]

    def child(self, parent: State, random: np.random.Generator) -> State:
        """Return a state that is some switches away, and removes as many parameters."""
        state = dict(parent)
        for _ in range(min(random.integers(1, SWITCHES + 1, size=2))):
            self._switch(state, random)
        return state

    def _switch(self, state: State, random: np.random.Generator) -> None:
        for _ in range(TRIES if self._places else 0):
            places = self._places[random.integers(len(self._places))]
            less, more = (places[at] for at in random.choice(len(places), size=2, replace=False))
            down, up = state[less] - self._steps[less], state[more] + self._steps[more]
            if down < 0 or up >= len(self._parameters[more]):
                continue
            kept = self._parameters[less][state[less]] - self._parameters[less][down]
            if kept == self._parameters[more][up] - self._parameters[more][state[more]]:
                state[less], state[more] = down, up
                return
