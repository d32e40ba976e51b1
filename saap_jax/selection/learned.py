"""Stage 2c, learned: which units stay is trained, with all weights as they are, under the exact budget.

    minimise over what is kept, within the budget,   mean over tokens of KL(p_unpruned ‖ p_masked)

Every unit has a value. In each step the solver of the search keeps what is worth most under the budget (the hard
projection), and the derivative of the divergence by each gate there goes straight through to the values, a parameter:

    d = (∂KL/∂g) / cost,    m ← β m + (1 − β) d,    value ← value − rate · m / RMS(d)

A unit that is gone has a derivative too, what opening its gate would do; so it may come back (but for an expert, to
which no token is routed then). The root mean square is over all units, and a running mean over the steps: heads and
channels are measured alike. Values begin at 0.75 for what was chosen and 0.25 for the rest, whatever the score was that
chose it.

With the rule `sigmoid` the value is a probability p = σ(θ), and Adam lowers the divergence by its logit:

    d = (∂KL/∂g) · p (1 - p),    θ ← θ - Adam(d),    value = σ(θ)

With `smooth` no gate is closed until the end. Gates are a sigmoid of the values about a threshold τ at which what is
open costs what the budget allows, and get sharper from step to step; derivatives are exact, that of τ included:

    g = σ((value - τ) / T),    Σ cost · g = budget,    s = g (1 - g) / T
    d = s · (∂KL/∂g - cost · Σ s ∂KL/∂g / Σ s cost)

Sources: gates trained with frozen weights towards the model's own predictions, projected onto the budget with a
straight-through derivative, as GRASPrune (arXiv:2604.19398) and DDP (arXiv:2603.08065) do; `sigmoid` is GRASPrune's
projected straight-through estimator, which ranks by p alone, whatever a unit costs; `smooth` is in the spirit of DDP,
whose own gates and penalty are others. Deviations: the solver and the limits are those of `search`, and held-out text
says which round counts; `momentum` has values that are not bounded, and derivatives a parameter.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.optimize import brentq
from scipy.special import expit, logit

from saap_jax.config.search import LearnConfig, LearnRule, SearchConfig
from saap_jax.selection.search import Selection, levels_of
from saap_jax.subjects.base import Objective
from saap_jax.types import Keep, Scores

MOMENTUM = 0.9
"""β of the derivatives, and of the mean of their squares."""

KEPT, GONE = 0.75, 0.25
"""Values at the start."""

SOFTEST, SHARPEST = 0.1, 0.01
"""T of `smooth` at the start and at the end: gates of 0.92 and 0.08 at first."""

Project = Callable[[Scores, SearchConfig], Selection]
"""Returns what is kept of units of some value, within the budget."""


def learned(
    project: Project,
    objective: Objective,
    start: Selection,
    costs: dict[str, np.ndarray],
    existing: Keep,
    config: SearchConfig,
    *,
    store: "Store | None" = None,
    progress: Callable[[Sequence[int]], Iterator[int]] = iter,
) -> Selection:
    """Train which units stay, from a selection on; return the best of it and of what the rounds ended with.

    Args:
        project: the solver at the ratio of the selection.
        objective: what is lowered; a round learns from each of its parts once.
        costs: parameters a unit, `[groups]` a structure.
        existing: which units there are.
        config: limits of the search, and how to learn.
        store: keeps what training has come to after each round; one that holds something is gone on from.
        progress: wraps the steps, to show progress.
    """
    free = dataclasses.replace(config, allocation="global", rank_by="score", normalize="none", learn=LearnConfig())
    rule, random = RULES[config.learn.rule](Problem(start.keep, costs, existing, config)), np.random.default_rng(0)
    held = store.load() if store is not None else {}
    if held:
        step, found = _restored(held, rule, start)
        for _ in found[1:]:
            random.permutation(objective.parts)  # those of rounds that are done
    else:
        step, found = 0, [(objective.judge(start.keep), start)]
    current, steps = found[-1][1], iter(progress(range(step, config.learn.steps)))
    while some := list(zip(random.permutation(objective.parts), steps, strict=False)):
        for part, _ in some:
            done = step / config.learn.steps
            _, gradient = objective.gradient(rule.gates(current.keep, done), int(part))
            rate = config.learn.rate * (1 + math.cos(math.pi * done)) / 2
            step += 1
            current = project(rule.moved(gradient, rate, step), free)
        found.append((objective.judge(current.keep), current))
        if store is not None:
            store.save(_arrays(step, rule, found))
    best = min(found, key=lambda each: each[0])[1]
    return best._replace(divergences=tuple(judged for judged, _ in found))


Found = list[tuple[float, Selection]]
"""What each round ended with, and its divergence on held-out text; first the start."""


def _arrays(step: int, rule: "Rule", found: Found) -> dict[str, np.ndarray]:
    """Return all that training goes on from."""
    arrays = {"step": np.asarray(step), "judged": np.array([judged for judged, _ in found])}
    for number, (_, selection) in enumerate(found[1:], start=1):
        arrays |= {f"keep/{number}/{name}": kept for name, kept in selection.keep.items()}
        arrays[f"gone/{number}"] = np.array([selection.actual, selection.removed])
    return arrays | {f"rule/{number}": np.asarray(leaf) for number, leaf in enumerate(jax.tree.leaves(rule.state))}


def _restored(arrays: dict[str, np.ndarray], rule: "Rule", start: Selection) -> tuple[int, Found]:
    """Return the steps done and what their rounds ended with; the rule is as it was then."""
    leaves, structure = jax.tree.flatten(rule.state)
    rule.state = structure.unflatten([arrays[f"rule/{number}"] for number in range(len(leaves))])
    found = [(float(arrays["judged"][0]), start)]
    for number, judged in enumerate(arrays["judged"][1:], start=1):
        keep = {name: arrays[f"keep/{number}/{name}"] for name in start.keep}
        actual, removed = arrays[f"gone/{number}"]
        found.append((float(judged), Selection(keep, start.asked, float(actual), int(removed))))
    return int(arrays["step"]), found


@runtime_checkable
class Store(Protocol):
    """Keeps arrays outside of the process."""

    def load(self) -> dict[str, np.ndarray]:
        """Return what was saved last; nothing if nothing was."""
        ...

    def save(self, arrays: dict[str, np.ndarray]) -> None:
        """Keep arrays in place of what was saved before."""
        ...


class Problem(NamedTuple):
    """What a rule starts from."""

    keep: Keep
    costs: dict[str, np.ndarray]
    """Parameters a unit, `[groups]` a structure."""
    existing: Keep
    config: SearchConfig

    @property
    def free(self) -> Keep:
        """Return the units that may go at all."""
        levels = levels_of(self.existing, self.config)
        some = {name: np.array([len(each) > 1 for each in of]) for name, of in levels.items()}
        return {name: exists & some[name][:, None] for name, exists in self.existing.items()}


class Rule(Protocol):
    """What units are worth, and how derivatives of their gates change it."""

    state: Any
    """A tree of arrays: all that steps change."""

    def gates(self, keep: Keep, done: float) -> Scores:
        """Return at which gates derivatives are taken, when a share of the steps is done."""
        ...

    def moved(self, gradient: Scores, rate: float, step: int) -> Scores:
        """Return what units are worth after a step, counted from 1."""
        ...


class Momentum:
    """Values that are not bounded, moved by derivatives a parameter; one scale for all units."""

    def __init__(self, problem: Problem) -> None:
        self._values: Scores = {name: np.where(kept, KEPT, GONE) for name, kept in problem.keep.items()}
        self._costs, self._square = problem.costs, 0.0
        self._moments: Scores = {name: np.zeros(kept.shape) for name, kept in problem.keep.items()}

    @property
    def state(self) -> Any:
        return self._values, self._moments, np.asarray(self._square)

    @state.setter
    def state(self, given: Any) -> None:
        self._values, self._moments, square = given
        self._square = float(square)

    def gates(self, keep: Keep, done: float) -> Scores:
        return hard(keep)

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

    def __init__(self, problem: Problem) -> None:
        self._logits: Scores = {name: logit(np.where(kept, KEPT, GONE)) for name, kept in problem.keep.items()}
        self._adam = Adam(self._logits)

    @property
    def state(self) -> Any:
        return self._logits, self._adam.state

    @state.setter
    def state(self, given: Any) -> None:
        self._logits, self._adam.state = given

    def gates(self, keep: Keep, done: float) -> Scores:
        return hard(keep)

    def moved(self, gradient: Scores, rate: float, step: int) -> Scores:
        p = {name: expit(logits) for name, logits in self._logits.items()}
        slopes = {name: np.asarray(gradient[name]) * each * (1 - each) for name, each in p.items()}
        self._logits = self._adam.moved(self._logits, slopes, rate)
        return {name: expit(logits) for name, logits in self._logits.items()}


class Smooth:
    """Soft gates that meet the budget, sharper from step to step; Adam on the values."""

    def __init__(self, problem: Problem) -> None:
        self._values: Scores = {name: np.where(kept, KEPT, GONE) for name, kept in problem.keep.items()}
        self._problem, self._free, self._adam = problem, problem.free, Adam(self._values)
        names = [*problem.keep]
        apart = problem.config.attention_share is not None
        self._groups = [[name] for name in names] if apart else [names]
        self._gates: Scores = {}
        self._temperature = SOFTEST

    @property
    def state(self) -> Any:
        return self._values, self._adam.state

    @state.setter
    def state(self, given: Any) -> None:
        self._values, self._adam.state = given

    def _flat(self, arrays: Scores, names: Sequence[str]) -> np.ndarray:
        return np.concatenate([np.asarray(arrays[name])[self._free[name]] for name in names])

    def gates(self, keep: Keep, done: float) -> Scores:
        self._temperature = SOFTEST * (SHARPEST / SOFTEST) ** done
        costs: Scores = {name: np.broadcast_to(self._problem.costs[name][:, None].astype(float), free.shape)
                 for name, free in self._free.items()}  # fmt: skip
        self._gates = hard(self._problem.existing)
        for names in self._groups:
            cost, values = self._flat(costs, names), self._flat(self._values, names)
            budget = float(cost @ self._flat(hard(self._problem.keep), names))
            threshold = _threshold(values, cost, budget, self._temperature)
            for name in names:
                soft = expit((self._values[name] - threshold) / self._temperature)
                self._gates[name] = np.where(self._free[name], soft, self._gates[name])
        return self._gates

    def moved(self, gradient: Scores, rate: float, step: int) -> Scores:
        slopes: Scores = {}
        for names in self._groups:
            steep = {name: np.where(self._free[name], (g := np.asarray(self._gates[name])) * (1 - g), 0.0)
                     / self._temperature for name in names}  # fmt: skip
            costs = {name: self._problem.costs[name][:, None] for name in names}
            above = sum(float((steep[name] * gradient[name]).sum()) for name in names)
            below = sum(float((steep[name] * costs[name]).sum()) for name in names)
            for name in names:
                slopes[name] = steep[name] * (gradient[name] - costs[name] * above / max(below, 1e-300))
        self._values = self._adam.moved(self._values, slopes, rate)
        return dict(self._values)


def _threshold(values: np.ndarray, cost: np.ndarray, budget: float, temperature: float) -> float:
    """Return τ with Σ cost · σ((values - τ) / T) = budget; beyond all values where all of them, or none, stay."""
    if not len(values) or not 0 < budget < cost.sum():
        return -math.inf if budget else math.inf
    over = lambda at: float(cost @ expit((values - at) / temperature)) - budget  # noqa: E731
    wide = 40 * temperature
    found: Any = brentq(over, values.min() - wide, values.max() + wide, xtol=1e-12)
    return float(found)


class Adam:
    """Steps of optax's Adam on values that stay in numpy, at a rate of the caller's."""

    def __init__(self, values: Scores) -> None:
        self._rule = optax.scale_by_adam(b1=MOMENTUM, eps=1e-12)
        self.state = self._rule.init({name: jnp.zeros(np.shape(each), jnp.float32) for name, each in values.items()})

    def moved(self, values: Scores, slopes: Scores, rate: float) -> Scores:
        """Return values after a step."""
        updates: Any
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the power of its integer count
            given = {name: jnp.asarray(slope, jnp.float32) for name, slope in slopes.items()}
            updates, self.state = self._rule.update(given, self.state)
        return {name: values[name] - rate * np.asarray(updates[name], np.float64) for name in values}


def hard(keep: Keep) -> Scores:
    """Return gates that are 1 or 0."""
    return {name: kept.astype(np.float64) for name, kept in keep.items()}


RULES: dict[LearnRule, Callable[[Problem], Rule]] = {"momentum": Momentum, "sigmoid": Sigmoid, "smooth": Smooth}
