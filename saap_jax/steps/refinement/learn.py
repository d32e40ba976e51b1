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
whose own gates and penalty are others. Deviations: the solver is that of `search`, with the limits of the chain, and
held-out text says which round counts; `momentum` has values that are not bounded, and derivatives a parameter.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.optimize import brentq
from scipy.special import expit, logit

from saap_jax.config.checks import check_at_least, check_choice
from saap_jax.steps.allocation.allocation import choose, prunable_of
from saap_jax.steps.allocation.ranking import Global
from saap_jax.steps.allocation.search import levels_of
from saap_jax.steps.base import Before, Context, State, Step, step
from saap_jax.steps.limits import Within
from saap_jax.surgery.corrections import check_microbatches
from saap_jax.types import Keep, Scores

LearnRule = Literal["momentum", "sigmoid", "smooth"]

MOMENTUM = 0.9
"""β of the derivatives, and of the mean of their squares."""

KEPT, GONE = 0.75, 0.25
"""Values at the start."""

SOFTEST, SHARPEST = 0.1, 0.01
"""T of `smooth` at the start and at the end: gates of 0.92 and 0.08 at first."""

Found = list[tuple[float, Keep]]
"""What each round ended with, and its divergence on held-out text; first the start."""


@step("learn")
@dataclasses.dataclass(frozen=True)
class Learn(Step):
    """Train which units stay, with all weights as they are, under the exact budget.

    A quarter of the text is held out, and says which round was the best, the start among them. A step is as long as
    three forward passes over a microbatch.
    """

    kind = "refinement"
    costly = True

    steps: int = 72
    """Steps of training, each on a microbatch of the calibration text; 0: what was chosen stays."""
    rate: float = 0.03
    """How far a unit of typical gradient moves in the first step; what is kept and what is gone begin 0.5 apart. Falls
    to 0 as a cosine."""
    rule: LearnRule = "momentum"
    """How derivatives of gates move what a unit is worth: `momentum`, a parameter and by one scale for all units;
    `sigmoid`, by Adam on the logit of a probability, which is the worth; or `smooth`, by Adam through soft gates that
    meet the budget and get sharper."""
    language_loss: float = 0.0
    """Weight of the next-token loss beside the divergence from the unpruned model."""

    def __post_init__(self) -> None:
        check_choice("learn.rule", self.rule, LearnRule)
        check_at_least("learn.steps", self.steps, 0)
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise ValueError(f"learn.rate: expected a number above 0, got {self.rate}")
        if not (math.isfinite(self.language_loss) and self.language_loss >= 0):
            raise ValueError(f"learn.language_loss: expected at least 0, got {self.language_loss}")

    def check(self, subject: Any, microbatches: int) -> None:
        """Raise ValueError for too little text, or a model whose units have no gates of their own."""
        if self.steps:
            check_microbatches("learn", microbatches)
            subject.check_objective("learn")

    def __call__(self, state: State, on: Context, before: Before) -> State:
        """Return the best keep-set of the start and of what the rounds ended with."""
        if not self.steps:
            return state
        subject = state.subject
        within, prunable = prunable_of(subject, state.limits.at(on.final))
        objective = subject.objective(on.text, on.batch_size, on.dense, self.language_loss)
        rule = RULES[self.rule](Problem(state.keep, prunable.costs, prunable.existing, within))
        random, held = np.random.default_rng(0), on.store.load()
        step, found = _restored(held, rule, state.keep) if held else (0, [(objective.judge(state.keep), state.keep)])
        for _ in found[1:]:
            random.permutation(objective.parts)  # those of rounds that are done
        current, steps = found[-1][1], iter(on.progress("learn which units stay")(range(step, self.steps)))
        while some := list(zip(random.permutation(objective.parts), steps, strict=False)):
            for part, _ in some:
                done = step / self.steps
                _, gradient = objective.gradient(rule.gates(current, done), int(part))
                rate = self.rate * (1 + math.cos(math.pi * done)) / 2
                step += 1
                values = rule.moved(gradient, rate, step)
                current = choose(subject, values, on.ratio, Global(by="score"), within).keep
            found.append((objective.judge(current), current))
            on.store.save(_arrays(step, rule, found))
        best = min(found, key=lambda each: each[0])[1]
        return state._replace(keep=best).tell(divergences=[judged for judged, _ in found])


def _arrays(step: int, rule: "Rule", found: Found) -> dict[str, np.ndarray]:
    """Return all that training goes on from."""
    arrays = {"step": np.asarray(step), "judged": np.array([judged for judged, _ in found])}
    for number, (_, keep) in enumerate(found[1:], start=1):
        arrays |= {f"keep/{number}/{name}": kept for name, kept in keep.items()}
    return arrays | {f"rule/{number}": np.asarray(leaf) for number, leaf in enumerate(jax.tree.leaves(rule.state))}


def _restored(arrays: dict[str, np.ndarray], rule: "Rule", start: Keep) -> tuple[int, Found]:
    """Return the steps done and what their rounds ended with; the rule is as it was then."""
    leaves, structure = jax.tree.flatten(rule.state)
    rule.state = structure.unflatten([arrays[f"rule/{number}"] for number in range(len(leaves))])
    found = [(float(arrays["judged"][0]), start)]
    for number, judged in enumerate(arrays["judged"][1:], start=1):
        found.append((float(judged), {name: arrays[f"keep/{number}/{name}"] for name in start}))
    return int(arrays["step"]), found


class Problem(NamedTuple):
    """What a rule starts from."""

    keep: Keep
    costs: Mapping[str, np.ndarray]
    """Parameters a unit, `[groups]` a structure."""
    existing: Keep
    within: Within

    @property
    def free(self) -> Keep:
        """Return the units that may go at all."""
        levels = levels_of(self.existing, self.within)
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
        apart = problem.within.attention is not None
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
