"""Stage 2c, evolved: how many units each layer loses is searched by evolution; which, their scores say.

A state says how many units of each (layer, structure) are gone. A generation makes offspring of the best state so far:
each moves some quanta of units from one layer to another of the same structure, where they cost the same, so that the
budget stays met. They are judged by the divergence from the unpruned model in stages: many on little text, the best of
them on more, and in the last stage together with their parent, which stays unless a child is better there.

Source: EvoPress (Sieberling et al., arXiv:2410.14649), algorithm 1: a (1 + λ) evolution by level switches, of which a
child has min(a, b) with a and b drawn from 1 to 3, and selection in several steps. Deviations: levels are units gone
of what the scores order, and held-out text says at the end whether the last state or the first one counts.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from saap_jax.checks import Natural, Positive, Share
from saap_jax.runtime.decisions import least_first
from saap_jax.steps.base import Context, Cost, Prefix, State, Step, TextSize, need, step
from saap_jax.steps.limits import first_prunable, levels_of, limits_at_end
from saap_jax.subjects.base import LanguageModel, language_model
from saap_jax.types import Keep

SWITCHES = 3
"""Of a child at most."""

TRIES = 100
"""Draws of a switch before a child goes without it, since no layer can give what another takes."""

DIVERGENCES = "divergences of keep-sets"
"""What is chosen by."""

Place = tuple[str, int]
"""Structure and layer."""

Levels = dict[Place, int]
"""Place -> index of its level: how much of what it can lose it has lost."""


@step("evolve")
@dataclasses.dataclass(frozen=True)
class Evolve(Step):
    """Search how much each layer loses by evolution, under the exact budget; which units, the scores say.

    A quarter of the text is held out, and says at the end whether the outcome is better than the start.
    """

    kind = "refinement"
    of = LanguageModel
    excludes = MappingProxyType({"rounds": "it reads the scores of all units"})
    needs_objective = True
    cacheable = True

    generations: Natural = 15
    offspring: Positive = 16
    """Children of a generation."""
    survivors: tuple[int, ...] = (4, 1)
    """How many of them each stage of selection leaves; the last one leaves one, of them and their parent."""
    microbatches: tuple[int, ...] = (1, 4)
    """On how many microbatches of the calibration text each stage judges, by the divergence from the unpruned model."""
    quantum: Share = 1 / 16
    """Share of a layer's units that a switch moves to another layer, of the same structure; with `depth` all units."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ends = (self.offspring, *self.survivors)
        if not self.survivors or ends[-1] != 1 or list(ends) != sorted(ends, reverse=True):
            raise ValueError(
                f"evolve.survivors: expected ever fewer of {self.offspring} offspring, 1 at last, got "
                f"{' '.join(map(str, self.survivors)) or 'none'}"
            )
        if len(self.microbatches) != len(self.survivors) or min(self.microbatches) < 1:
            raise ValueError(
                "evolve.microbatches: expected a number of at least 1 for each of survivors, which are "
                f"{len(self.survivors)}, got {' '.join(map(str, self.microbatches)) or 'none'}"
            )

    def plan(self, text: TextSize, ratio: float, prefix: Prefix) -> Cost:
        """The microbatches that the stages of each generation judge on."""
        asked = [self.offspring, *(each + 1 for each in self.survivors[:-1])]
        judged = sum(count * few for count, few in zip(asked, self.microbatches, strict=True))
        return Cost(self.generations * judged / text.microbatches)

    def __call__(self, state: State, on: Context) -> State:
        """Search from the keep-set on; return the best of it and the outcome."""
        within = limits_at_end(state, on)
        if within.whole_layers:
            raise ValueError("evolve: expected no whole_layers, since sub-blocks move apart")
        existing = state.subject.existing
        order = {}
        for name, each in need(state, self).items():
            order[name] = np.argsort(np.where(existing[name], each, np.inf), axis=1, kind="stable")
        unchanged = first_prunable(state.keep, existing, within)
        objective = language_model(self.name, state.subject).objective(
            on.text, on.batch_size, on.dense, first=unchanged
        )
        gone = {name: (existing[name] & ~kept).sum(axis=1) for name, kept in state.keep.items()}
        levels: dict[Place, np.ndarray] = {}
        for name, of_layers in levels_of(existing, within).items():
            for layer, each in enumerate(of_layers):
                # a layer that has lost another number of units than its levels allow stays as it is
                levels[name, layer] = each if gone[name][layer] in each else gone[name][[layer]]
        moves = _Moves(levels, state.subject.costs, existing, self.quantum)

        def keep_of(at: Levels) -> Keep:
            keep = {name: units.copy() for name, units in existing.items()}
            for (name, layer), level in at.items():
                keep[name][layer, order[name][layer, : levels[name, layer][level]]] = False
            return keep

        def value(at: Levels, part: int) -> float:
            return objective.value(keep_of(at), part)

        best: Levels = {}
        for (name, layer), each in levels.items():
            best[name, layer] = int(np.searchsorted(each, gone[name][layer]))
        random = np.random.default_rng(0)
        for _ in on.progress("evolve how much each layer loses")(range(self.generations)):
            children = [moves.child(best, random) for _ in range(self.offspring)]
            best = _selected(best, children, self, value, objective.parts, random)
        outcome = keep_of(best)
        judged = [objective.judge(keep) for keep in (state.keep, outcome)]
        better = int(least_first(DIVERGENCES, judged)[0])
        return state._replace(keep=(state.keep, outcome)[better]).report(divergences=judged)


def _selected(
    parent: Levels,
    children: Sequence[Levels],
    options: Evolve,
    value: Callable[[Levels, int], float],
    parts: int,
    random: np.random.Generator,
) -> Levels:
    """Select the best of a generation, judged in stages on microbatches that are drawn for each stage."""
    for stage, (stay, count) in enumerate(zip(options.survivors, options.microbatches, strict=True), 1):
        if stage == len(options.survivors):
            among = [parent, *children]
        else:
            among = list(children)
        drawn = random.choice(parts, size=min(count, parts), replace=False)
        means = []
        for state in among:
            values = [value(state, int(part)) for part in drawn]
            means.append(float(np.mean(values)))
        children = [among[number] for number in least_first(DIVERGENCES, means)[:stay]]
    return children[0]


class _Moves:
    """Level switches between layers, of as many parameters each way."""

    def __init__(
        self, levels: dict[Place, np.ndarray], costs: Mapping[str, np.ndarray], existing: Keep, quantum: float
    ) -> None:
        """Take quanta of a share of a layer's units; whole sub-blocks with `depth`."""
        self._parameters = {}
        self._steps = {}
        by_structure: dict[str, list[Place]] = {}
        for place, each in levels.items():
            name, layer = place
            self._parameters[place] = each * int(costs[name][layer])
            units = int(existing[name][layer].sum())
            widest = int(np.diff(each).max(initial=1))
            self._steps[place] = max(1, round(units * quantum / widest))
            if len(each) > 1:
                by_structure.setdefault(name, []).append(place)
        self._places = [places for places in by_structure.values() if len(places) > 1]

    def child(self, parent: Levels, random: np.random.Generator) -> Levels:
        """Make a state some switches away that removes as many parameters."""
        state = dict(parent)
        for _ in range(min(random.integers(1, SWITCHES + 1, size=2))):
            self._switch(state, random)
        return state

    def _switch(self, state: Levels, random: np.random.Generator) -> None:
        for _ in range(TRIES if self._places else 0):
            places = self._places[random.integers(len(self._places))]
            less, more = (places[at] for at in random.choice(len(places), size=2, replace=False))
            down = state[less] - self._steps[less]
            up = state[more] + self._steps[more]
            if down < 0 or up >= len(self._parameters[more]):
                continue
            kept = self._parameters[less][state[less]] - self._parameters[less][down]
            if kept == self._parameters[more][up] - self._parameters[more][state[more]]:
                state[less] = down
                state[more] = up
                return
