"""From calibration text to scores: observe each scenario in one pass, score, fuse."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from saap_jax.config.method import FusionConfig
from saap_jax.config.search import ScenarioReduction, StabilityOver
from saap_jax.estimation import GATE_GRADIENT, Statistic, Statistics, make_estimators, score, union_of_needs
from saap_jax.estimation.base import Estimator
from saap_jax.estimation.observe import curvature_of
from saap_jax.estimation.registry import names_file
from saap_jax.runtime.frames import repr_html, to_dataframe
from saap_jax.runtime.gather import fetched
from saap_jax.runtime.progress import Track, quiet
from saap_jax.selection.fusion import Fused, PerExample, fuse
from saap_jax.selection.oracles import Passes, constant, is_oracle, make_oracle
from saap_jax.selection.stability import fluctuation_of, reduce_scenarios, stability_indicator
from saap_jax.structures.weights import Weights, units_of
from saap_jax.subjects.base import Examples, Subject
from saap_jax.types import STRUCTURES, Keep, Remat, Scores

Plan = Mapping[str, tuple[str, FusionConfig]]
"""What is scored: {label: (estimator, how its scores are fused if it is a fusion)}."""


class Scored(NamedTuple):
    """What the statistics of one scenario tell of every unit."""

    scores: dict[str, Scores]
    """`{estimator: {"attention": [layers, kv_heads], "mlp": [layers, mlp]}}`, larger = more important."""
    fusions: dict[str, Fused]
    """Of the estimators that are fusions of others: how the fused scores came about."""
    examples: PerExample
    """|∂ℒ_n/∂g| of each example n, `[examples, layers, units]` a structure; empty where it was not observed."""


class Calibrated(NamedTuple):
    """What one pass over the calibration text tells of every unit."""

    scenarios: dict[str, dict[str, Scores]]
    """`{scenario: {estimator: {"attention": [layers, kv_heads], "mlp": [layers, mlp]}}}`, larger = more important."""
    stability: Scores | None
    """Stability indicator ASI over the examples of all scenarios, of |∂ℒ_n/∂g|; None where that was not observed."""
    fusions: dict[str, dict[str, Fused]]
    """`{scenario: {estimator: …}}` of the estimators that are fusions of others: how the fused scores came about."""
    stability_of: Mapping[str, Scores] = MappingProxyType({})
    """`{scenario: …}`, the stability indicator over the examples of each scenario, where observed."""

    @property
    def estimators(self) -> list[str]:
        """Return the names of the estimators."""
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

    to_dataframe = to_dataframe
    _repr_html_ = repr_html

    def __repr__(self) -> str:
        shapes = {name: list(np.shape(values)) for name, values in self.scores(self.estimators[0]).items()}
        stable = "no stability" if self.stability is None else "with stability"
        return f"Calibrated({', '.join(self.scenarios)}: {', '.join(self.estimators)}; {shapes}; {stable})"

    def scores(self, estimator: str, reduction: ScenarioReduction = "mean") -> Scores:
        """Return an estimator's scores, those of several scenarios reduced to one (see `reduce_scenarios`)."""
        return reduce_scenarios({name: each[estimator] for name, each in self.scenarios.items()}, reduction)

    def indicator(self, estimator: str, over: StabilityOver = "examples") -> Scores | None:
        """Return the stability indicator over examples, or over what an estimator says in each scenario."""
        if over == "examples":
            return self.stability
        each = [scores[estimator] for scores in self.scenarios.values()]
        if len(each) < 2:
            raise ValueError("search.stability_over: 'scenarios' expects two or more calibration scenarios, got 1")
        stacked: PerExample = {
            name: np.stack([np.asarray(scores[name], np.float64) for scores in each]) for name in each[0]
        }
        return stability_indicator(fluctuation_of(stacked))

    def only(self, scenario: str) -> "Calibrated":
        """Return what one scenario alone tells.

        Raises:
            KeyError: there is no such scenario.
        """
        return Calibrated({scenario: self.scenarios[scenario]}, self.stability_of.get(scenario), {})

    def renamed(self, name: str, new: str) -> "Calibrated":
        """Return the scores of one estimator alone, under another name."""
        scenarios = {scenario: {new: scores[name]} for scenario, scores in self.scenarios.items()}
        return self._replace(scenarios=scenarios, fusions={})


# --- pure: statistics to scores ------------------------------------------------------------------


def calibrate(
    subject: Subject,
    scenarios: Mapping[str, Examples],
    estimators: Iterable[str],
    *,
    given: Mapping[str, Estimator] = MappingProxyType({}),
    fusion: FusionConfig | None = None,
    stability: bool = False,
    keep: Keep | None = None,
    batch_size: int = 8,
    remat: Remat = "dots",
    track: Track = quiet,
) -> Calibrated:
    """Score every unit of a model by every estimator named, from one pass over the examples of each scenario.

    Args:
        scenarios: calibration examples by name.
        estimators: names, with hyper-parameters in brackets if any; `a+b` fuses the scores of two or more estimators,
            `a/b` scores attention by a and MLP by b, `saap` is the combination that `fusion` names,
            `FILE.py:FACTORY` is one of a file, and `oracles.ORACLES` take passes of their own.
        given: estimators that are no names, by what they are called among `estimators`.
        fusion: how scores are fused.
        stability: observe what the stability indicator needs, even if no estimator does.
        keep: score the model with all other units masked; these then have no score (NaN).
    """
    fusion = fusion or FusionConfig()
    plan = {name: (name, fusion) for name in estimators}
    return joined(
        {
            name: score_examples(
                subject,
                examples,
                plan,
                given=given,
                stability=stability,
                keep=keep,
                batch_size=batch_size,
                remat=remat,
                track=track,
                scenario=name if len(scenarios) > 1 else "",
            )[1]
            for name, examples in scenarios.items()
        }
    )


def score_examples(
    subject: Subject,
    examples: Examples,
    plan: Plan,
    *,
    statistics: Statistics | None = None,
    given: Mapping[str, Estimator] = MappingProxyType({}),
    stability: bool = False,
    keep: Keep | None = None,
    batch_size: int = 8,
    remat: Remat = "dots",
    track: Track = quiet,
    scenario: str = "",
) -> tuple[Statistics | None, Scored]:
    """Run the one pass over a scenario's examples, and score every unit by each entry of a plan.

    Args:
        statistics: of an earlier pass, which takes the place of a new one.
        scenario: what progress calls the scenario.

    Returns:
        The statistics, and the scores.
    """
    options: dict[str, Any] = {"batch_size": batch_size, "remat": remat}
    members = members_of(subject, plan, given)
    subject.check_estimators(members)
    passes = Passes(tuple(subject.existing), batch_size, track=track)
    asked = [member for member in members if is_oracle(member) and member not in given]
    exact = {
        member: constant(make_oracle(member)(subject, examples, keep, passes), subject.existing) for member in asked
    }
    if statistics is None and (stability or len(asked) < len(members)):
        needs = union_of_needs(members.values()) | (frozenset({GATE_GRADIENT}) if stability else frozenset())
        statistics = subject.observe(
            examples,
            needs,
            curvature=curvature_of(members.values()),
            keep=keep,
            **options,
            progress=lambda steps: track(f"observe the calibration examples {scenario}".rstrip(), steps, len(steps)),
        )
    scored = score_plan(subject.weights, statistics or _nothing(), plan, keep, {**given, **exact})
    return statistics, scored


def _nothing() -> Statistics:
    """Return what is observed where no estimator needs a pass."""
    return Statistics(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), jnp.zeros(0), {})


def members_of(
    subject: Subject, plan: Plan, given: Mapping[str, Estimator] = MappingProxyType({})
) -> dict[str, Estimator]:
    """Make the estimators that the entries of a plan are made of, each once."""
    structures = tuple(subject.existing)
    return {
        member: estimator
        for name, fusion in plan.values()
        for member, estimator in make_members([name], fusion, structures, given).items()
    }


def score_statistics(
    model: Weights,
    statistics: Statistics,
    estimators: Iterable[str],
    fusion: FusionConfig,
    keep: Keep | None = None,
    known: Mapping[str, Scores] = MappingProxyType({}),
    given: Mapping[str, Estimator] = MappingProxyType({}),
) -> Scored:
    """Score every unit (or those that are kept) by every estimator named, from statistics alone; see `calibrate`.

    `known` are scores of members that are not made anew, since the statistics that they need are not there any more;
    `given` are members that are no names.
    """
    present = {name: units if keep is None else keep[name] for name, units in units_of(model).items()}
    parts = {name: structure_parts(name, fusion, tuple(present)) for name in estimators}
    members = make_members(parts, fusion, tuple(present), given)
    anew = {name: made for name, made in members.items() if name not in known}
    by_part: dict[str, Scores] = {
        name: {n: np.where(present[n], values, np.nan) for n, values in scores.items()}
        for name, scores in (
            score(anew, statistics, model) | {name: known[name] for name in members.keys() - anew}
        ).items()
    }
    gradients: PerExample = statistics.values.get(GATE_GRADIENT, {})
    examples: PerExample = {n: np.where(present[n], np.abs(fetched(g)), np.nan) for n, g in gradients.items()}
    per_example = {"gate_taylor": examples, "gate_fisher": {n: np.square(g) for n, g in examples.items()}}
    fusions = {
        part: fuse(
            {member: by_part[member] for member in members},
            fusion.method,
            fusion.scope,
            fusion.scope_constant,
            per_example if examples else None,
        )
        for part in dict.fromkeys(part for each in parts.values() for part in each.values())
        if len(members := fusion_members(part)) > 1
    }
    by_part |= {part: fused.scores for part, fused in fusions.items()}
    scores: dict[str, Scores] = {
        name: {structure: by_part[part][structure] for structure, part in each.items()} for name, each in parts.items()
    }
    return Scored(scores, fusions, examples)


def score_plan(
    model: Weights,
    statistics: Statistics,
    plan: Plan,
    keep: Keep | None = None,
    given: Mapping[str, Estimator] = MappingProxyType({}),
) -> Scored:
    """Score every unit by each entry of a plan, from the same statistics."""
    scores: dict[str, Scores] = {}
    fusions: dict[str, Fused] = {}
    examples: PerExample = {}
    fusion_configs = dict.fromkeys(fusion for _, fusion in plan.values()) or {FusionConfig(): None}
    structures = tuple(units_of(model))
    for fusion in fusion_configs:
        names = {label: name for label, (name, own) in plan.items() if own == fusion}
        scored = score_statistics(model, statistics, dict.fromkeys(names.values()), fusion, keep, given=given)
        scores |= {label: scored.scores[name] for label, name in names.items()}
        for label, name in names.items():
            parts = dict.fromkeys(structure_parts(name, fusion, structures).values())
            fusions |= {
                part + label.removeprefix(name): scored.fusions[part] for part in parts if part in scored.fusions
            }
        examples = scored.examples
    return Scored({label: scores[label] for label in plan}, fusions, examples)


def joined(made: Mapping[str, Scored]) -> Calibrated:
    """Put the scenarios side by side; the stability indicator is that of all their examples together."""
    indicator = _indicator([scored.examples for scored in made.values()])
    each = {name: _indicator([scored.examples]) for name, scored in made.items()}
    scores = {name: scored.scores for name, scored in made.items()}
    fusions = {name: scored.fusions for name, scored in made.items()}
    return Calibrated(scores, indicator, fusions, {name: own for name, own in each.items() if own is not None})


def _indicator(parts: Sequence[PerExample]) -> Scores | None:
    """Return the stability indicator over the examples of all parts; None where there are fewer than two."""
    if not all(parts) or sum(len(next(iter(each.values()))) for each in parts) < 2:
        return None
    together: PerExample = {name: np.concatenate([each[name] for each in parts]) for name in parts[0]}
    return stability_indicator(fluctuation_of(together))


def structure_parts(name: str, fusion: FusionConfig, structures: tuple[str, ...] = STRUCTURES) -> dict[str, str]:
    """Return which estimator, or fusion, scores each structure: `a/b` attention by a and MLP by b.

    Structures of a traced model are all scored by one.

    >>> structure_parts("gate_fisher/wanda+magnitude", FusionConfig())
    {'attention': 'gate_fisher', 'mlp': 'wanda+magnitude'}
    >>> structure_parts("saap", FusionConfig(estimators=("fisher", "wanda"), attention="gate_taylor"))
    {'attention': 'gate_taylor', 'mlp': 'fisher+wanda'}
    """
    fused = "+".join(fusion.estimators)
    if structures != STRUCTURES:
        return dict.fromkeys(structures, fused if name == "saap" else name)
    if name == "saap":
        return dict(zip(STRUCTURES, (fusion.attention or fused, fused), strict=True))
    if names_file(name):
        return dict.fromkeys(STRUCTURES, name)
    attention, slash, mlp = (part.strip() for part in name.partition("/"))
    return dict(zip(STRUCTURES, (attention, mlp if slash else attention), strict=True))


def fusion_members(part: str) -> tuple[str, ...]:
    """Return the estimators of a fusion, or the one estimator that it is.

    >>> fusion_members("gate_taylor+taylor_element")
    ('gate_taylor', 'taylor_element')
    """
    return (part,) if names_file(part) else tuple(member.strip() for member in part.split("+"))


def make_members(
    names: Iterable[str],
    fusion: FusionConfig,
    structures: tuple[str, ...] = STRUCTURES,
    given: Mapping[str, Estimator] = MappingProxyType({}),
) -> dict[str, Estimator]:
    """Make the estimators that the names stand for, each once."""
    parts = (part for name in names for part in structure_parts(name, fusion, structures).values())
    return _made(dict.fromkeys(member for part in parts for member in fusion_members(part)), given)


def _made(members: Iterable[str], given: Mapping[str, Estimator] = MappingProxyType({})) -> dict[str, Estimator]:
    """Make estimators, none named twice; what stands for an oracle until its scores are known needs no statistic."""
    members = tuple(members)
    oracles = {member: constant({}, {}) for member in members if is_oracle(member) and make_oracle(member)}
    return make_estimators(members, {**oracles, **given})


def check_estimators(names: Iterable[str], fusion: FusionConfig, observed: frozenset[Statistic] | None = None) -> None:
    """Raise ValueError for an estimator that is unknown, alone or within a fusion, or named twice.

    Args:
        observed: what can be observed of a traced model, whose structures are all scored by one estimator.
    """
    names = list(names)
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"estimator {name!r} is named twice")
        if observed is None:
            for part in dict.fromkeys(structure_parts(name, fusion).values()):
                _made(fusion_members(part))
        else:
            _check_traced(name, fusion, observed)
    if not names:
        make_estimators(names)


def _check_traced(name: str, fusion: FusionConfig, observed: frozenset[Statistic]) -> None:
    """Raise ValueError for an estimator of a traced model that needs what is not observed of it."""
    if "/" in name and not names_file(name):
        raise ValueError(
            f"estimator {name!r}: expected one for all structures of a traced model, got two around a slash"
        )
    for member, estimator in make_members([name], fusion, ("any",)).items():
        if missing := sorted(need.name for need in estimator.needs - observed):
            raise ValueError(
                f"estimator {member!r}: needs {', '.join(missing)}, which is not observed of a traced model; expected "
                "one of weights, activations, or gradients: random, magnitude, wanda, fluctuation, taylor_*, gate_*"
            )
