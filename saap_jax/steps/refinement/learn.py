"""Units that are learned: which stay is trained, with all weights as they are, under the exact budget.

    minimise over what is kept, within the budget,   mean over tokens of KL(p_unpruned ‖ p_masked)

Every unit has a value. In each step the solver of allocations keeps what is worth most under the budget (the hard
projection), and the derivative of the divergence by each gate there goes straight through to the values, a parameter:

    d = (∂KL/∂g) / cost,    m ← β m + (1 − β) d,    value ← value − rate · m / RMS(d)

A unit that is gone has a derivative too, what opening its gate would do; so it may come back (but for an expert, to
which no token is routed then). The root mean square is over all units, and a running mean over the steps: heads and
channels are measured alike. Layers in front of the first one that may lose units are not differentiated: their
derivatives count as 0. Values begin at 0.75 for what was chosen and 0.25 for the rest, whatever the score was that
chose it.

With the rule `sigmoid` the value is a probability p = σ(θ), and Adam lowers the divergence by its logit:

    d = (∂KL/∂g) · p (1 - p),    θ ← θ - Adam(d),    value = σ(θ)

With the rule `soft` nothing is projected on the way. The gates m = max(z, 0) begin at 1, and a second reading of z
says how much of a unit stays, ever more sharply as μ falls from 0.5 to 0.05 with the root of the steps done:

    s = clip(1.2 σ((z - μ) ln 11 / μ) - 0.1, 0, 1),  0 at z = 0 and 1 at z = 2μ;    v = Σ share · s - (1 - ratio)
    z ← z - Adam of the slope of  KL(m) + λ₁ v + λ₂ v² + λ₃ Σ share · s (1 - s);    λ₁ ← λ₁ + v,   λ₂ ← λ₂ + v²

where the share of a unit is that of the parameters, and slopes go straight through max and clip. The highest z that
the budget leaves are the outcome.

Sources: gates trained with frozen weights towards the model's own predictions, projected onto the budget with a
straight-through derivative, as GRASPrune (arXiv:2604.19398) does; `sigmoid` is its projected straight-through
estimator, which ranks by p alone, whatever a unit costs; `soft` follows a review of DDP (arXiv:2603.08065).
Deviations: the solver is that of allocations, with the limits of the chain, and held-out text says which round counts;
`momentum` has values that are not bounded, and derivatives a parameter; `soft` weighs units by parameters, and its
gates are not folded into the weights, which `scales` does behind it.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import jax
import numpy as np

from saap_jax.checks import Natural, check_not_negative, check_positive
from saap_jax.runtime.decisions import least_first
from saap_jax.steps.allocation.allocation import choose
from saap_jax.steps.allocation.allocations import Global
from saap_jax.steps.base import Context, Cost, Prefix, State, Step, TextSize, step
from saap_jax.steps.limits import first_prunable
from saap_jax.steps.training import adam, adam_start, cosine, rounds, trained
from saap_jax.subjects.base import Subject, language_model
from saap_jax.surgery.corrections import check_microbatches
from saap_jax.types import Keep, Scores

LearnRule = Literal["momentum", "sigmoid", "soft"]

MOMENTUM = 0.9
"""β of the derivatives, and of the mean of their squares."""

KEPT = 0.75
GONE = 0.25
"""Values at the start."""

SHARP = (0.5, 0.05)
BINARY = 1.0
"""μ of soft gates at the start and at the end, and λ₃."""


@step("learn")
@dataclasses.dataclass(frozen=True)
class Learn(Step):
    """Train which units stay, with all weights as they are, under the exact budget.

    A quarter of the text is held out, and says which round was the best, the start among them. A step takes
    less than three forward passes over a microbatch.
    """

    kind = "refinement"
    cacheable = True

    steps: Natural = 72
    """Steps of training, each on a microbatch of the calibration text; 0: what was chosen stays."""
    rate: Annotated[float, check_positive] = 0.03
    """How far a unit of typical gradient moves in a step, with `momentum` a tenth of it in the first one; what is kept
    and what is gone begin 0.5 apart. Falls to 0 as a cosine."""
    rule: LearnRule = "momentum"
    """How derivatives of gates move what a unit is worth: `momentum`, a parameter and by one scale for all units;
    `sigmoid`, by Adam on the logit of a probability, which is the worth; or `soft`, by Adam on gates that are no 0 or 1
    on the way, with a penalty for what exceeds the budget."""
    language_loss: Annotated[float, check_not_negative] = 0.0
    """Weight of the next-token loss beside the divergence from the unpruned model."""

    def check(self, subject: Subject, text: TextSize) -> None:
        """Raise ValueError for too little text, or a model whose units have no gates of their own."""
        if self.steps:
            language_model(self.name, subject)
            check_microbatches(self.name, text.microbatches)

    def plan(self, text: TextSize, ratio: float, prefix: Prefix) -> Cost:
        """The passes of the steps of training."""
        return Cost(trained(self.steps, text.microbatches))

    def __call__(self, state: State, on: Context) -> State:
        """Return the best keep-set of the start and of what the rounds ended with."""
        if not self.steps:
            return state
        subject = state.subject
        rule = RULES[self.rule]
        within = state.limits.at(on.final)
        first = first_prunable(state.keep, subject.existing, subject.limits(within))
        objective = language_model(self.name, subject).objective(
            on.text, on.batch_size, on.dense, self.language_loss, first
        )
        judged, keeps, learnt = _restored(on.store.load(), rule.start(state.keep), state.keep)
        judged = judged or [objective.judge(state.keep)]
        share: Scores = {}
        for name, units in subject.existing.items():
            share[name] = units * subject.costs[name][:, None] / max(subject.prunable, 1)
        done = min((len(judged) - 1) * objective.parts, self.steps)
        steps = on.progress("learn which units stay")(range(done, self.steps))
        for some in rounds(objective.parts, steps, len(keeps)):
            current = [state.keep, *keeps][-1]
            for part, at in some:
                _, gradient = objective.gradient(rule.gates(learnt, current), part)
                now = Moment(at + 1, self.steps, cosine(self.rate, at, self.steps), share, 1 - on.ratio)
                values, learnt = rule.moved(learnt, gradient, subject.costs, now)
                current = choose(subject, values, on.ratio, Global(by="score"), within).keep
            judged.append(objective.judge(current))
            keeps.append(current)
            leaves = enumerate(jax.tree.leaves((keeps, learnt)))
            on.store.save({"judged": np.array(judged), **{str(at): np.asarray(leaf) for at, leaf in leaves}})
        best = [state.keep, *keeps][int(least_first("divergences of rounds", judged)[0])]
        return state._replace(keep=best).report(divergences=judged)


def _restored(arrays: Mapping[str, np.ndarray], start: Any, keep: Keep) -> tuple[list[float], list[Keep], Any]:
    """Read the divergences, the keep-sets and the learnt values of the rounds that are done."""
    if not arrays:
        return [], [], start
    judged = arrays["judged"].tolist()
    leaves, structure = jax.tree.flatten(([keep] * (len(judged) - 1), start))
    keeps, learnt = structure.unflatten([arrays[str(at)] for at in range(len(leaves))])
    return judged, keeps, learnt


class Moment(NamedTuple):
    """A step of training, and the budget."""

    step: int
    """From 1."""
    steps: int
    rate: float
    share: Scores
    """Of the prunable parameters, of each unit."""
    kept: float
    """Share of the prunable parameters that is to stay."""


def hard(keep: Keep) -> Scores:
    """Round gates to 1 or 0."""
    return {name: kept.astype(np.float64) for name, kept in keep.items()}


class Rule(NamedTuple):
    """What units are worth, and how derivatives of their gates change it."""

    start: Callable[[Keep], Any]
    """What was chosen -> all that steps change, a tree of arrays."""
    moved: Callable[[Any, Scores, Mapping[str, np.ndarray], Moment], tuple[Scores, Any]]
    """(that, derivatives by gates, parameters a unit, which step) -> values of units, and that after the step."""
    gates: Callable[[Any, Keep], Scores] = lambda learnt, keep: hard(keep)
    """(that, what is kept now) -> gates at which the next derivatives are taken."""


def _values(keep: Keep) -> Scores:
    return {name: np.where(kept, KEPT, GONE) for name, kept in keep.items()}


def _momentum(learnt: Any, gradient: Scores, costs: Mapping[str, np.ndarray], now: Moment) -> tuple[Scores, Any]:
    """Move values that are not bounded by derivatives a parameter; one scale for all units."""
    values, moments, square = learnt
    by_cost = {name: gradient[name] / costs[name][:, None] for name in values}
    mean = np.mean(np.concatenate([each.ravel() for each in by_cost.values()]) ** 2)
    square = MOMENTUM * square + (1 - MOMENTUM) * mean
    scale = math.sqrt(square / (1 - MOMENTUM**now.step)) or 1.0
    moments = {name: MOMENTUM * moments[name] + (1 - MOMENTUM) * each for name, each in by_cost.items()}
    values = {name: values[name] - now.rate * moments[name] / scale for name in values}
    return values, (values, moments, square)


def _sigmoid(learnt: Any, gradient: Scores, costs: Mapping[str, np.ndarray], now: Moment) -> tuple[Scores, Any]:
    """Move the logits of probabilities by Adam; the derivative of the projection by a probability is taken as 1."""
    from scipy.special import expit  # here and below: it takes half as long as jax

    logits, state = learnt
    p = {name: expit(each) for name, each in logits.items()}
    slopes = {name: np.asarray(gradient[name]) * each * (1 - each) for name, each in p.items()}
    logits, state = adam(logits, slopes, state, now.rate, eps=1e-12)
    return {name: expit(each) for name, each in logits.items()}, (logits, state)


def _sigmoid_start(keep: Keep) -> Any:
    from scipy.special import logit

    logits = {name: logit(values) for name, values in _values(keep).items()}
    return logits, adam_start(logits)


def retention(z: np.ndarray, sharp: float) -> tuple[np.ndarray, np.ndarray]:
    """Compute how much of units stays, in [0, 1], and its slope by z, straight through the clip; `sharp` is μ."""
    from scipy.special import expit

    v = expit((z - sharp) * math.log(11) / sharp)
    stretch = 1.2
    return np.clip(stretch * v - 0.1, 0, 1), stretch * v * (1 - v) * math.log(11) / sharp


def _soft(learnt: Any, gradient: Scores, costs: Mapping[str, np.ndarray], now: Moment) -> tuple[Scores, Any]:
    """Move soft gates by Adam down the objective and the penalties, then raise the multipliers by the excess."""
    gates, state, (linear, square) = learnt
    sharp = SHARP[0] - (SHARP[0] - SHARP[1]) * math.sqrt(now.step / now.steps)
    both = {name: retention(z, sharp) for name, z in gates.items()}
    over = sum(float((now.share[name] * s).sum()) for name, (s, _) in both.items()) - now.kept
    slopes: Scores = {
        name: gradient[name] + now.share[name] * slope * (linear + 2 * square * over + BINARY * (1 - 2 * s))
        for name, (s, slope) in both.items()
    }
    gates, state = adam(gates, slopes, state, now.rate, eps=1e-12)
    return gates, (gates, state, (linear + over, square + over**2))


def _soft_start(keep: Keep) -> Any:
    gates: Scores = {name: np.ones(kept.shape) for name, kept in keep.items()}
    return gates, adam_start(gates), (0.0, 0.0)


RULES: dict[LearnRule, Rule] = {
    "momentum": Rule(lambda keep: (_values(keep), {n: np.zeros(k.shape) for n, k in keep.items()}, 0.0), _momentum),
    "sigmoid": Rule(_sigmoid_start, _sigmoid),
    "soft": Rule(_soft_start, _soft, lambda learnt, keep: {name: np.maximum(z, 0) for name, z in learnt[0].items()}),
}
