"""From calibration text to scores: observe each scenario in one pass, score, fuse."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from saap_jax.estimation.base import Estimator, Statistics
from saap_jax.estimation.gates import GATE_GRADIENT
from saap_jax.estimation.hessian import curvature_of
from saap_jax.estimation.observe import score, union_of_needs
from saap_jax.runtime.gather import fetched
from saap_jax.runtime.progress import Passes
from saap_jax.steps.score.fusion import Fusion, PerExample, fuse
from saap_jax.steps.score.oracles import constant, is_oracle, make_oracle
from saap_jax.steps.score.score import Plan, Score, make_members
from saap_jax.steps.score.stability import ScenarioReduction, reduce_scenarios, stability_indicator
from saap_jax.structures.weights import Weights
from saap_jax.subjects.base import Examples, Subject, explained, rows_of
from saap_jax.syntax import fusion_members
from saap_jax.types import Keep, Scores


class Scored(NamedTuple):
    """What the statistics of one scenario tell of every unit."""

    scores: dict[str, Scores]
    """`{label: {"attention": [layers, kv_heads], "mlp": [layers, mlp]}}`, larger = more important."""
    fusions: dict[str, Fusion]
    """Of the parts that are fusions of others: how the fused scores came about."""


class Calibrated(NamedTuple):
    """What one pass over the calibration text tells of every unit."""

    scenarios: dict[str, dict[str, Scores]]
    """`{scenario: {label: {"attention": [layers, kv_heads], "mlp": [layers, mlp]}}}`, larger = more important."""
    stability: dict[str, Scores]
    """Stability indicator ASI of a label's importance over the examples of all scenarios, where it was asked for."""
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
                        if np.isnan(value):
                            continue
                        yield {
                            "scenario": scenario,
                            "estimator": estimator,
                            "structure": structure,
                            "layer": layer,
                            "unit": unit,
                            "score": float(value),
                        }

    def __repr__(self) -> str:
        shapes = {name: list(np.shape(values)) for name, values in self.scores(self.estimators[0]).items()}
        stable = "no stability"
        if self.stability:
            stable = "with stability"
        return f"Calibrated({', '.join(self.scenarios)}: {', '.join(self.estimators)}; {shapes}; {stable})"

    def scores(self, estimator: str, reduction: ScenarioReduction = "mean") -> Scores:
        """Return an estimator's scores, those of several scenarios reduced to one (see `reduce_scenarios`)."""
        return reduce_scenarios({name: each[estimator] for name, each in self.scenarios.items()}, reduction)

    def indicator(self, estimator: str, over: str = "examples") -> Scores | None:
        """Return the stability indicator of an estimator's scores over examples, or over scenarios."""
        if over == "examples":
            return self.stability.get(estimator)
        each = [scores[estimator] for scores in self.scenarios.values()]
        if len(each) < 2:
            raise ValueError("stable.over: scenarios expects two or more calibration scenarios, got 1")
        return stability_indicator(_stacked(each))

    def part(self, label: str, score: Score) -> "Calibrated":
        """Return one of the scores, its fusions and its stability indicator."""
        structures = tuple(self.scores(label))
        own = {_fusion_name(label, score, part) for part in score.parts(structures).values()}
        scores = {name: {label: each[label]} for name, each in self.scenarios.items()}
        fusions = {}
        for name, each in self.fusions.items():
            fusions[name] = {fusion: each[fusion] for fusion in each if fusion in own}
        stability = {}
        if label in self.stability:
            stability[label] = self.stability[label]
        return Calibrated(scores, stability, fusions)


def calibrate(
    subject: Subject,
    scenarios: Mapping[str, Examples],
    plan: Plan,
    passes: Passes = Passes(),
    *,
    stability: Collection[str] = (),
    keep: Keep | None = None,
) -> Calibrated:
    """Score every unit of a model by each entry of a plan, from one pass over the examples of each scenario.

    Args:
        scenarios: calibration examples by name.
        stability: labels of which the stability indicator is wanted, which takes a second pass, an example at a time.
        keep: score the model with all other units masked.
    """
    made = {}
    for name, examples in scenarios.items():
        own = _passes_of(passes, name, scenarios)
        with explained("calibration", subject, {name: examples}, passes.batch_size):
            _, made[name] = score_examples(subject, examples, plan, own, keep=keep)
    found = joined(made)
    wanted = {label: plan[label] for label in stability}
    if not wanted:
        return found
    # The second pass comes last: it fuses by the σ that the first one has found.
    return found._replace(stability=indicators(subject, scenarios, wanted, found, passes, keep))


def _passes_of(passes: Passes, scenario: str, scenarios: Mapping[str, Examples]) -> Passes:
    """Let progress name the scenario, where there are several."""
    if len(scenarios) > 1:
        return passes._replace(scenario=scenario)
    return passes._replace(scenario="")


def indicators(
    subject: Subject,
    scenarios: Mapping[str, Examples],
    plan: Plan,
    found: Calibrated,
    passes: Passes = Passes(),
    keep: Keep | None = None,
) -> dict[str, Scores]:
    """Compute the stability indicator of each entry of a plan over the examples of all scenarios together.

    The importance I_n of an example n is what the same formulas say of the statistics of that example alone: an exact
    pass over each of them, the gradients of all weights included. A fusion's is fused by the σ that all examples of the
    scenario have led to. Nothing where there are fewer than two examples.
    """
    scored: list[dict[str, Scores]] = []
    alone = Passes(1, passes.remat)
    for scenario, examples in scenarios.items():
        progress = _passes_of(passes, scenario, scenarios).progress(EACH)
        for at in progress(range(subject.size(examples).rows)):
            one = rows_of(examples, slice(at, at + 1))
            # A row of padding is no example.
            if not subject.size(one).tokens:
                continue
            _, made = score_examples(subject, one, plan, alone, keep=keep, fixed=found.fusions[scenario])
            scored.append(made.scores)
    if len(scored) < 2:
        return {}
    return {label: stability_indicator(_stacked([each[label] for each in scored])) for label in plan}


def _stacked(scores: Sequence[Scores]) -> PerExample:
    """Stack scores of the same units, of examples or of scenarios: `[scores, layers, units]` a structure."""
    return {name: np.stack([each[name] for each in scores]) for name in scores[0]}


EACH = "observe each example by itself"
"""What progress says of the pass that tells how stable importance is."""


def score_examples(
    subject: Subject,
    examples: Examples,
    plan: Plan,
    passes: Passes = Passes(),
    *,
    statistics: Statistics | None = None,
    keep: Keep | None = None,
    fixed: Mapping[str, Fusion] = MappingProxyType({}),
) -> tuple[Statistics | None, Scored]:
    """Run the one pass over a scenario's examples, and score every unit by each entry of a plan.

    Args:
        statistics: of an earlier pass, which takes the place of a new one.
        keep: score the model with all other units masked; these then have no score (NaN).
        fixed: see `score_plan`.

    Returns:
        The statistics, and the scores.
    """
    members = make_members(plan, tuple(subject.existing))
    subject.check_estimators(members)
    # Oracles run on the examples themselves, unless the caller gave an estimator of that name.
    given = {score.named for score in plan.values() if score.given is not None}
    asked = [member for member in members if is_oracle(member) and member not in given]
    exact = {each: constant(make_oracle(each)(subject, examples, keep, passes), subject.existing) for each in asked}
    # All others are formulas on what one pass observes.
    if statistics is None and len(asked) < len(members):
        needs = union_of_needs(members.values())
        curvature = curvature_of(members.values())
        statistics = subject.observe(examples, needs, passes, curvature=curvature, keep=keep)
    nothing = Statistics(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), jnp.zeros(0), {})
    return statistics, score_plan(subject.weights, statistics or nothing, plan, keep, exact, fixed=fixed)


# --- pure: statistics to scores ------------------------------------------------------------------


def score_plan(
    weights: Weights,
    statistics: Statistics,
    plan: Plan,
    keep: Keep | None = None,
    given: Mapping[str, Estimator] = MappingProxyType({}),
    known: Mapping[str, Scores] = MappingProxyType({}),
    fixed: Mapping[str, Fusion] = MappingProxyType({}),
) -> Scored:
    """Score every unit (or those that are kept) by each entry of a plan, from the same statistics.

    Args:
        given: what stands for members, such as oracles whose scores are known.
        known: scores of members that are not made anew, since the statistics that they need are not there any more.
        fixed: fusions, as were made of other statistics, whose σ are taken.
    """
    present: Keep = {**weights.units}
    if keep is not None:
        present = {name: keep[name] for name in present}
        weights = weights.without(keep)
    structures = tuple(present)

    # Score by each member: an estimator of a plan, or of a fusion in it.
    members = make_members(plan, structures, given)
    anew = {name: made for name, made in members.items() if name not in known}
    of_member = score(anew, statistics, weights)
    for name in members.keys() - anew:
        of_member[name] = known[name]
    each: dict[str, Scores] = {}
    for name, own in of_member.items():
        each[name] = _where_present(present, own)

    # `sampling` reads scores of single examples, which only estimators of gate gradients have.
    per_example: dict[str, PerExample] | None = None
    gradients: PerExample = statistics.values.get(GATE_GRADIENT, {})
    if gradients:
        absolute = {name: np.abs(fetched(gradient)) for name, gradient in gradients.items()}
        taylor = _where_present(present, absolute)
        fisher = {name: np.square(values) for name, values in taylor.items()}
        per_example = {"gate_taylor": taylor, "gate_fisher": fisher}

    # Fuse members where an entry asks for it; the same fusion of several entries is made once.
    scores: dict[str, Scores] = {}
    fusions: dict[str, Fusion] = {}
    known_fusions: dict[tuple, Fusion] = {}
    for label, entry in plan.items():
        parts = entry.parts(structures)
        for part in dict.fromkeys(parts.values()):
            fused = fusion_members(part)
            if len(fused) < 2:
                continue
            name = _fusion_name(label, entry, part)
            how = (part, *entry.fusion)
            if how not in known_fusions:
                scores_of = {member: each[member] for member in fused}
                if name in fixed:
                    known_fusions[how] = fixed[name].again(scores_of)
                else:
                    known_fusions[how] = fuse(scores_of, *entry.fusion, per_example)
            fusions[name] = known_fusions[how]
            each[part] = known_fusions[how].scores
        scores[label] = {structure: each[part][structure] for structure, part in parts.items()}
    return Scored(scores, fusions)


def _where_present(present: Keep, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values `[..., layers, units]` a structure, with NaN where there is no unit."""
    return {name: np.where(present[name], each, np.nan) for name, each in values.items()}


def _fusion_name(label: str, entry: Score, part: str) -> str:
    """Name a fusion: by its members, or by the label of an entry that fuses otherwise."""
    if label == entry.named:
        return part
    return label


def joined(made: Mapping[str, Scored]) -> Calibrated:
    """Put the scenarios side by side."""
    scores = {name: scored.scores for name, scored in made.items()}
    return Calibrated(scores, {}, {name: scored.fusions for name, scored in made.items()})


def put_together(parts: Sequence[Calibrated], scenarios: Sequence[str]) -> Calibrated:
    """Undo `Calibrated.part`."""
    stability: dict[str, Scores] = {}
    scores: dict[str, dict[str, Scores]] = {name: {} for name in scenarios}
    fusions: dict[str, dict[str, Fusion]] = {name: {} for name in scenarios}
    for part in parts:
        stability |= part.stability
        for name in scenarios:
            scores[name] |= part.scenarios[name]
            fusions[name] |= part.fusions.get(name, {})
    return Calibrated(scores, stability, fusions)
