"""Stage 2c, learned: which units stay is trained, with all weights as they are, under the exact budget.

    minimise over what is kept, within the budget,   mean over tokens of KL(p_unpruned ‖ p_masked)

Every unit has a value. In each step the solver of the search keeps what is worth most under the budget (the hard
projection), and the derivative of the divergence by each gate there goes straight through to the values, a parameter:

    d = (∂KL/∂g) / cost,    m ← β m + (1 − β) d,    value ← value − rate · m / RMS(d)

A unit that is gone has a derivative too, what opening its gate would do; so it may come back. The root mean square is
over all units, and a running mean over the steps: heads and channels are measured alike. Values begin at 0.75 for what
was chosen and 0.25 for the rest, whatever the score was that chose it.

With the rule `sigmoid` the value is a probability p = σ(θ), and Adam lowers the divergence by its logit:

    d = (∂KL/∂g) · p (1 - p),    θ ← θ - Adam(d),    value = σ(θ)

Sources: gates trained with frozen weights towards the model's own predictions, projected onto the budget with a
straight-through derivative, as GRASPrune (arXiv:2604.19398) and DDP (arXiv:2603.08065) do; `sigmoid` is GRASPrune's
projected straight-through estimator, which ranks by p alone, whatever a unit costs. Deviations: the solver and the
limits are those of `search`, and held-out text says which round counts; those of `momentum` are that values are not
bounded, and that derivatives are taken a parameter.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
from scipy.special import expit, logit

from saap_jax.config.method import LearnConfig, LearnRule, SearchConfig
from saap_jax.selection.search import Selection
from saap_jax.subjects.base import Objective
from saap_jax.types import Keep, Scores

MOMENTUM = 0.9
"""β of the derivatives, and of the mean of their squares."""

ADAM = 0.999
"""β of the squares of derivatives in Adam, whose other one is `MOMENTUM`."""

KEPT, GONE = 0.75, 0.25
"""Values at the start."""

Project = Callable[[Scores, SearchConfig], Selection]
"""Returns what is kept of units of some value, within the budget."""


def learned(
    project: Project,
    objective: Objective,
    start: Selection,
    costs: dict[str, np.ndarray],
    config: SearchConfig,
    *,
    progress: Callable[[Sequence[int]], Iterator[int]] = iter,
) -> Selection:
    """Train which units stay, from a selection on; return the best of it and of what the rounds ended with.

    Args:
        project: the solver at the ratio of the selection.
        objective: what is lowered; a round learns from each of its parts once.
        costs: parameters a unit, `[groups]` a structure.
        config: limits of the search, and how to learn.
        progress: wraps the steps, to show progress.
    """
    free = dataclasses.replace(config, allocation="global", rank_by="score", normalize="none", learn=LearnConfig())
    rule, step, current = RULES[config.learn.rule](start.keep, costs), 0, start
    found = [(objective.judge(start.keep), start)]
    random, steps = np.random.default_rng(0), iter(progress(range(config.learn.steps)))
    while some := list(zip(random.permutation(objective.parts), steps, strict=False)):
        for part, _ in some:
            _, gradient = objective.gradient(current.keep, int(part))
            rate = config.learn.rate * (1 + math.cos(math.pi * step / config.learn.steps)) / 2
            step += 1
            current = project(rule.moved(gradient, rate, step), free)
        found.append((objective.judge(current.keep), current))
    best = min(found, key=lambda each: each[0])[1]
    return best._replace(divergences=tuple(judged for judged, _ in found))


class Rule(Protocol):
    """What units are worth, and how derivatives of their gates change it."""

    def moved(self, gradient: Scores, rate: float, step: int) -> Scores:
        """Return what units are worth after a step, counted from 1."""
        ...


class Momentum:
    """Values that are not bounded, moved by derivatives a parameter; one scale for all units."""

    def __init__(self, keep: Keep, costs: dict[str, np.ndarray]) -> None:
        self._values: Scores = {name: np.where(kept, KEPT, GONE) for name, kept in keep.items()}
        self._costs, self._square = costs, 0.0
        self._moments = {name: np.zeros(kept.shape) for name, kept in keep.items()}

    def moved(self, gradient: Scores, rate: float, step: int) -> Scores:
        by_cost = {name: gradient[name] / self._costs[name][:, None] for name in self._values}
        mean = float(np.mean(np.concatenate([each.ravel() for each in by_cost.values()]) ** 2))
        self._square = MOMENTUM * self._square + (1 - MOMENTUM) * mean
        scale = math.sqrt(self._square / (1 - MOMENTUM**step)) or 1.0
        for name, each in by_cost.items():
            self._moments[name] = MOMENTUM * self._moments[name] + (1 - MOMENTUM) * each
            self._values[name] = self._values[name] - rate * self._moments[name] / scale
        return dict(self._values)


class Sigmoid:
    """Probabilities, whose logits Adam moves; the derivative of the projection by a probability is taken as 1."""

    def __init__(self, keep: Keep, costs: dict[str, np.ndarray]) -> None:
        self._logits = {name: logit(np.where(kept, KEPT, GONE)) for name, kept in keep.items()}
        self._first, self._second = ({name: np.zeros(kept.shape) for name, kept in keep.items()} for _ in range(2))

    def moved(self, gradient: Scores, rate: float, step: int) -> Scores:
        values = {}
        for name, logits in self._logits.items():
            p = expit(logits)
            slope = gradient[name] * p * (1 - p)
            self._first[name] = MOMENTUM * self._first[name] + (1 - MOMENTUM) * slope
            self._second[name] = ADAM * self._second[name] + (1 - ADAM) * slope**2
            size = np.sqrt(self._second[name] / (1 - ADAM**step)) + 1e-12
            self._logits[name] = logits - rate * self._first[name] / (1 - MOMENTUM**step) / size
            values[name] = expit(self._logits[name])
        return values


RULES: dict[LearnRule, Callable[[Keep, dict[str, np.ndarray]], Rule]] = {"momentum": Momentum, "sigmoid": Sigmoid}
"""(what is kept at the start, parameters a unit, `[groups]` a structure) -> a rule."""
