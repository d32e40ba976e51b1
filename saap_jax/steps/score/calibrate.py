"""From calibration text to scores: observe each scenario in one pass, score, fuse."""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from saap_jax.estimation import GATE_GRADIENT, Statistics, score, union_of_needs
from saap_jax.estimation.base import Estimator
from saap_jax.estimation.hessian import curvature_of
from saap_jax.runtime.gather import fetched
from saap_jax.runtime.progress import Passes
from saap_jax.steps.score.fusion import Fusion, PerExample, fuse
from saap_jax.steps.score.oracles import constant, is_oracle, make_oracle
from saap_jax.steps.score.score import Plan, Score, fusion_members, make_members
from saap_jax.steps.score.stability import ScenarioReduction, reduce_scenarios, stability_indicator
from saap_jax.structures.weights import Weights, units_of
from saap_jax.subjects.base import Examples, Subject
from saap_jax.types import Keep, Scores

STABILITY = ""
"""Stands among labels for the stability indicators."""


class Scored(NamedTuple):
    """What the statistics of one scenario tell of every unit."""

    scores: dict[str, Scores]
    """`{label: {"attention": [layers, kv_heads], "mlp": [layers, mlp]}}`, larger = more important."""
    fusions: dict[str, Fusion]
    """Of the parts that are fusions of others: how the fused scores came about."""
    examples: PerExample
    """|∂ℒ_n/∂g| of each example n, `[examples, layers, units]` a structure; empty where it was not observed."""


class Calibrated(NamedTuple):
    """What one pass over the calibration text tells of every unit."""

    scenarios: dict[str, dict[str, Scores]]
    """`{scenario: {label: {"attention": [layers, kv_heads], "mlp": [layers, mlp]}}}`, larger = more important."""
    stability: Scores | None
    """Stability indicator ASI over the examples of all scenarios, of |∂ℒ_n/∂g|; None where that was not observed."""
    fusions: dict[str, dict[str, Fusion]]
    """`{scenario: {…}}` of what is a fusion of others: how the fused scores came about."""

    @property
    def estimators(self) -> list[str]:
        """The labels of the scores."""
        return list(next(iter(self.scenarios.values())))

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the score of each unit that there is, by scenario, estimator, structure, layer and unit."""
        for scenario, each in self.scenarios.items():
            for estimator, scores in each.items():
                for structure, values in scores.items():
                    for (layer, unit), value in np.ndenumerate(np.asarray(values, np.float64)):
                        if not np.isnan(value):
                            yield {"scenario": scenario, "estimator": estimator, "structure": structure,
                                   "layer": layer, "unit": unit, "score": float(value)}  # fmt: skip

    def __repr__(self) -> str:
        shapes = {name: list(np.shape(values)) for name, values in self.scores(self.estimators[0]).items()}
        stable = "no stability" if self.stability is None else "with stability"
        return f"Calibrated({', '.join(self.scenarios)}: {', '.join(self.estimators)}; {shapes}; {stable})"

    def scores(self, estimator: str, reduction: ScenarioReduction = "mean") -> Scores:
        """Return an estimator's scores, those of several scenarios reduced to one (see `reduce_scenarios`)."""
        return reduce_scenarios({name: each[estimator] for name, each in self.scenarios.items()}, reduction)

    def indicator(self, estimator: str, over: str = "examples") -> Scores | None:
        """Return the stability indicator over examples, or over what an estimator says in each scenario."""
        if over == "examples":
            return self.stability
        each = [scores[estimator] for scores in self.scenarios.values()]
        if len(each) < 2:
            raise ValueError("stable.over: scenarios expects two or more calibration scenarios, got 1")
        return stability_indicator({name: np.stack([scores[name] for scores in each]) for name in each[0]})

    def part(self, label: str, score: Score | None) -> "Calibrated":
        """Return one of the scores and its fusions; of the label `STABILITY` the stability indicators alone."""
        if score is None:
            return self._replace(scenarios={name: {} for name in self.scenarios}, fusions={})
        structures = tuple(self.scores(label))
        own = {part if label == score.named else label for part in score.parts(structures).values()}
        fusions = {name: {n: fused for n, fused in each.items() if n in own} for name, each in self.fusions.items()}
        return Calibrated({name: {label: each[label]} for name, each in self.scenarios.items()}, None, fusions)


def calibrate(
    subject: Subject, scenarios: Mapping[str, Examples], plan: Plan, passes: Passes = Passes(), **options: Any
) -> Calibrated:
    """Score every unit of a model by each entry of a plan, from one pass over the examples of each scenario.

    Args:
        scenarios: calibration examples by name.
        options: those of `score_examples`.
    """
    several, made = len(scenarios) > 1, {}
    for name, examples in scenarios.items():
        own = passes._replace(scenario=name if several else "")
        _, made[name] = score_examples(subject, examples, plan, own, **options)
    return joined(made)


def score_examples(
    subject: Subject,
    examples: Examples,
    plan: Plan,
    passes: Passes = Passes(),
    *,
    statistics: Statistics | None = None,
    stability: bool = False,
    keep: Keep | None = None,
) -> tuple[Statistics | None, Scored]:
    """Run the one pass over a scenario's examples, and score every unit by each entry of a plan.

    Args:
        statistics: of an earlier pass, which takes the place of a new one.
        stability: observe what the stability indicator needs, even if no estimator does.
        keep: score the model with all other units masked; these then have no score (NaN).

    Returns:
        The statistics, and the scores.
    """
    members = make_members(plan, tuple(subject.existing))
    subject.check_estimators(members)
    given = {score.named for score in plan.values() if score.given is not None}
    asked = [member for member in members if is_oracle(member) and member not in given]
    exact = {each: constant(make_oracle(each)(subject, examples, keep, passes), subject.existing) for each in asked}
    if statistics is None and (stability or len(asked) < len(members)):
        needs = union_of_needs(members.values()) | (frozenset({GATE_GRADIENT}) if stability else frozenset())
        curvature = curvature_of(members.values())
        statistics = subject.observe(examples, needs, passes, curvature=curvature, keep=keep)
    nothing = Statistics(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), jnp.zeros(0), {})
    return statistics, score_plan(subject.weights, statistics or nothing, plan, keep, exact)


# --- pure: statistics to scores ------------------------------------------------------------------


def score_plan(
    model: Weights,
    statistics: Statistics,
    plan: Plan,
    keep: Keep | None = None,
    given: Mapping[str, Estimator] = MappingProxyType({}),
    known: Mapping[str, Scores] = MappingProxyType({}),
) -> Scored:
    """Score every unit (or those that are kept) by each entry of a plan, from the same statistics.

    Args:
        given: what stands for members, such as oracles whose scores are known.
        known: scores of members that are not made anew, since the statistics that they need are not there any more.
    """
    present = {name: units if keep is None else keep[name] for name, units in units_of(model).items()}
    structures = tuple(present)
    members = make_members(plan, structures, given)
    anew = {name: made for name, made in members.items() if name not in known}
    each: dict[str, Scores] = score(anew, statistics, model) | {name: known[name] for name in members.keys() - anew}
    each = {name: {n: np.where(present[n], values, np.nan) for n, values in own.items()} for name, own in each.items()}
    gradients: PerExample = statistics.values.get(GATE_GRADIENT, {})
    examples: PerExample = {n: np.where(present[n], np.abs(fetched(g)), np.nan) for n, g in gradients.items()}
    per_example = {"gate_taylor": examples, "gate_fisher": {n: np.square(g) for n, g in examples.items()}}
    scores: dict[str, Scores] = {}
    fusions: dict[str, Fusion] = {}
    known_fusions: dict[tuple, Fusion] = {}
    for label, entry in plan.items():
        parts = entry.parts(structures)
        for part in dict.fromkeys(parts.values()):
            own, named = fusion_members(part), (part, *entry.fusion)
            if len(own) < 2:
                continue
            if named not in known_fusions:
                scores_of = {member: each[member] for member in own}
                known_fusions[named] = fuse(scores_of, *entry.fusion, per_example if examples else None)
            fusions[part if label == entry.named else label] = known_fusions[named]
            each[part] = known_fusions[named].scores
        scores[label] = {structure: each[part][structure] for structure, part in parts.items()}
    return Scored(scores, fusions, examples)


def joined(made: Mapping[str, Scored]) -> Calibrated:
    """Put the scenarios side by side; the stability indicator is that of all their examples together."""
    parts, indicator = [scored.examples for scored in made.values()], None
    if all(parts) and sum(len(next(iter(each.values()))) for each in parts) > 1:
        indicator = stability_indicator({name: np.concatenate([each[name] for each in parts]) for name in parts[0]})
    scores = {name: scored.scores for name, scored in made.items()}
    return Calibrated(scores, indicator, {name: scored.fusions for name, scored in made.items()})


def put_together(parts: Sequence[Calibrated], scenarios: Sequence[str]) -> Calibrated:
    """Undo `Calibrated.part`."""
    stability = next((part.stability for part in parts if part.stability is not None), None)
    scores: dict[str, dict[str, Scores]] = {name: {} for name in scenarios}
    fusions: dict[str, dict[str, Fusion]] = {name: {} for name in scenarios}
    for part in parts:
        for name in scenarios:
            scores[name] |= part.scenarios[name]
            fusions[name] |= part.fusions.get(name, {})
    return Calibrated(scores, stability, fusions)
