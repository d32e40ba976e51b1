"""From calibration text to scores: observe each scenario in one pass, score, fuse."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from saap_jax.config.method import CalibrationConfig, FusionConfig, ScenarioReduction, StabilityOver
from saap_jax.data import Windows, batches, load_scenarios, parse_scenario
from saap_jax.discovery.weights import Weights, units_of
from saap_jax.estimation import GATE_GRADIENT, Statistics, make_estimators, observe, score, union_of_needs
from saap_jax.estimation.base import Estimator
from saap_jax.estimation.observe import curvature_of
from saap_jax.estimation.registry import names_file
from saap_jax.llama import Llama
from saap_jax.llama.segments import masks
from saap_jax.runtime.frames import repr_html, to_dataframe
from saap_jax.runtime.gather import fetched
from saap_jax.runtime.progress import Track, quiet
from saap_jax.selection.fusion import Fused, PerExample, fuse
from saap_jax.selection.stability import fluctuation_of, reduce_scenarios, stability_indicator
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
    model: Llama,
    windows: Windows | Mapping[str, Windows],
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
    """Score every unit of a model by every estimator named, from one pass over the calibration windows.

    Args:
        windows: the calibration text, or that of each scenario by name.
        estimators: names, with hyper-parameters in brackets if any; `a+b` fuses the scores of two or more estimators,
            `a/b` scores attention by a and MLP by b, `saap` is the combination that `fusion` names, and
            `FILE.py:FACTORY` is one of a file.
        given: estimators that are no names, by what they are called among `estimators`.
        fusion: how scores are fused.
        stability: observe what the stability indicator needs, even if no estimator does.
        keep: score the model with all other units masked; these then have no score (NaN).
    """
    estimators, fusion = tuple(estimators), fusion or FusionConfig()
    scenarios = {"calibration": windows} if isinstance(windows, Windows) else windows
    made = {}
    for name, text in scenarios.items():
        statistics = observe_windows(
            model,
            text,
            make_members(estimators, fusion, given=given).values(),
            stability=stability,
            keep=keep,
            batch_size=batch_size,
            remat=remat,
            track=track,
            scenario=name if len(scenarios) > 1 else "",
        )
        made[name] = score_statistics(model, statistics, estimators, fusion, keep, given=given)
    return joined(made)


def observe_windows(
    model: Llama,
    windows: Windows,
    estimators: Iterable[Estimator],
    *,
    stability: bool,
    batch_size: int,
    remat: Remat,
    keep: Keep | None = None,
    track: Track = quiet,
    scenario: str = "",
) -> Statistics:
    """Run the one pass over a scenario's windows: for the estimators, and for the stability indicator if asked for.

    With `keep` the model is observed with all other units masked.
    """
    estimators = list(estimators)
    needs = union_of_needs(estimators) | (frozenset({GATE_GRADIENT}) if stability else frozenset())
    doing = f"observe the calibration text {scenario}".rstrip()
    parts = pairs(windows, batch_size)
    return observe(
        model,
        parts,
        needs,
        gates=None if keep is None else masks(keep),
        curvature=curvature_of(estimators),
        remat=remat,
        progress=lambda items: track(doing, items, len(parts)),
    )


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


def score_plan(model: Llama, statistics: Statistics, plan: Plan) -> Scored:
    """Score every unit by each entry of a plan, from the same statistics."""
    scores: dict[str, Scores] = {}
    fusions: dict[str, Fused] = {}
    examples: PerExample = {}
    for fusion in dict.fromkeys(fusion for _, fusion in plan.values()):
        names = {label: name for label, (name, own) in plan.items() if own == fusion}
        scored = score_statistics(model, statistics, dict.fromkeys(names.values()), fusion)
        scores |= {label: scored.scores[name] for label, name in names.items()}
        for label, name in names.items():
            parts = dict.fromkeys(structure_parts(name, fusion).values())
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
    return make_estimators(dict.fromkeys(member for part in parts for member in fusion_members(part)), given)


def check_estimators(names: Iterable[str], fusion: FusionConfig) -> None:
    """Raise ValueError for an unknown estimator, alone or within a fusion, or one that is named twice."""
    names = list(names)
    for name in names:
        for part in dict.fromkeys(structure_parts(name, fusion).values()):
            make_estimators(fusion_members(part))
        if names.count(name) > 1:
            raise ValueError(f"estimator {name!r} is named twice")
    if not names:
        make_estimators(names)


def pairs(windows: Windows, batch_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the windows as microbatches (tokens, mask) of one shape."""
    return [(batch.tokens, batch.mask) for batch, _ in batches(windows, min(batch_size, len(windows.tokens)))]


def scenario_pairs(parts: Iterable[Windows], config: CalibrationConfig) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the windows of several scenarios together as microbatches (tokens, mask) of one shape."""
    together = Windows(*(np.concatenate(each) for each in zip(*parts, strict=True)))
    return pairs(together, config.batch_size)


def lengths_of(config: Any) -> dict[str, int]:
    """Return the lengths of the windows that a job calibrates and evaluates on, as `load_model` takes them."""
    parts = {name: getattr(config, name, None) for name in ("calibration", "evaluation")}
    return {f"{name}.length": part.length for name, part in parts.items() if part is not None}


def scenarios_of(config: CalibrationConfig, tokenizer: Any) -> dict[str, Windows]:
    """Draw the calibration windows of each scenario."""
    scenarios = [parse_scenario(text) for text in config.scenarios]
    return load_scenarios(scenarios, tokenizer, config.examples, config.length, config.seed)
