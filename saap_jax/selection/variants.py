"""What a comparison compares: each combination of its grid once, under a name that says where it differs."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from saap_jax.config.compensation import CompensationConfig
from saap_jax.config.jobs import SweepConfig
from saap_jax.config.method import ALL, FusionConfig
from saap_jax.config.registries import ALLOCATIONS
from saap_jax.config.search import SearchConfig
from saap_jax.data import parse_scenario
from saap_jax.recipes import Recipe, find_recipes
from saap_jax.selection.calibrate import fusion_members, structure_parts


class Variant(NamedTuple):
    """One way to choose units; at a ratio and with a seed it is a candidate."""

    name: str
    estimator: str
    fusion: FusionConfig
    search: SearchConfig
    scenario: str
    """Scenario to score by, or `all`."""
    scores: str
    """Name of its scores: the estimator, and how it is fused where that differs between variants."""
    compensation: CompensationConfig = CompensationConfig()
    recipe: str = ""
    """Name of the recipe that it is, if it is one."""

    @property
    def chosen(self) -> "Variant":
        """What decides which units are kept: the variant without its compensation, unless that is part of it."""
        if self.search.in_sequence != "none":
            return self._replace(name="", recipe="")
        return self._replace(name="", compensation=CompensationConfig(), recipe="")

    @property
    def fused(self) -> bool:
        """True where scores of several estimators are fused."""
        return is_fused(self.estimator, self.fusion)


class Candidate(NamedTuple):
    """One pruned model: a variant at a ratio, with the scores of one seed."""

    name: str
    variant: Variant
    seed: int
    ratio: float

    @property
    def about(self) -> dict[str, Any]:
        """What a run records of it before it is evaluated."""
        variant, search = self.variant, self.variant.search
        fusion = {"method": variant.fusion.method, "scope": variant.fusion.scope}
        return {
            "variant": variant.name,
            "seed": self.seed,
            "estimator": variant.estimator,
            "fusion": fusion if variant.fused else None,
            "allocation": search.allocation,
            "rank_by": search.rank_by,
            "stability_weight": search.stability_weight if ALLOCATIONS[search.allocation].stability else None,
            "scenario": variant.scenario,
            "compensation": variant.compensation.method,
            "learn_steps": search.learn.steps,
            "ratio_asked": self.ratio,
            **({"recipe": variant.recipe} if variant.recipe else {}),
        }


def variants_of(config: SweepConfig) -> list[Variant]:
    """Return the variants of a comparison, in the order of the grid, and the recipes behind them.

    Raises:
        ValueError: a combination that the search refuses, a scenario that the calibration does not name, a recipe that
            is none, or nothing to compare.
    """
    if not (config.estimation.estimators or config.recipes):
        raise ValueError("estimation.estimators: expected at least one, or recipes beside it, got neither")
    grid = config.grid
    if not config.model.traced:  # whose scenarios are known once the factory has run
        check_scenarios_known(grid.scenarios, [parse_scenario(text).name for text in config.calibration.scenarios])
    axes = {
        "method": grid.fusion_methods or (config.fusion.method,),
        "scope": grid.fusion_scopes or (config.fusion.scope,),
        "allocation": grid.allocations or (config.search.allocation,),
        "rank_by": grid.rank_by or (config.search.rank_by,),
        "stability_weight": grid.stability_weights or (config.search.stability_weight,),
        "learn_steps": grid.learn_steps or (config.search.learn.steps,),
        "scenario": grid.scenarios or (ALL,),
        "compensation": grid.compensations or (config.compensation.method,),
    }
    found: dict[tuple, Variant] = {}
    for estimator, values in itertools.product(config.estimation.estimators, itertools.product(*axes.values())):
        chosen: dict[str, Any] = dict(zip(axes, values, strict=True))
        allocation = chosen["allocation"]
        free = set(axes)
        if not is_fused(estimator, config.fusion):
            free -= {"method", "scope"}
        if not ALLOCATIONS[allocation].stability:
            free -= {"stability_weight"}
        if not ALLOCATIONS[allocation].ranks:
            free -= {"rank_by"}
        key = (estimator, *(chosen[name] if name in free else None for name in axes))
        if key in found:
            continue
        said = {name: _said(name, chosen[name]) for name in axes if name in free and len(axes[name]) > 1}
        fusion = {name: chosen[name] for name in ("method", "scope") if name in free}
        search = {name: chosen[name] for name in ("allocation", "rank_by", "stability_weight") if name in free}
        search["learn"] = dataclasses.replace(config.search.learn, steps=chosen["learn_steps"])
        found[key] = Variant(
            ",".join([estimator, *said.values()]),
            estimator,
            dataclasses.replace(config.fusion, **fusion),
            dataclasses.replace(config.search, **search),
            chosen["scenario"],
            ",".join([estimator, *(s for n, s in said.items() if n in ("method", "scope"))]),
            dataclasses.replace(config.compensation, method=chosen["compensation"]),
        )
    return [*found.values(), *(_of_recipe(*each, config.search) for each in find_recipes(config.recipes).items())]


def _of_recipe(name: str, recipe: Recipe, search: SearchConfig) -> Variant:
    """Return a recipe as a variant, with widths that suit the device that the configuration names."""
    fused = is_fused(recipe.estimator, recipe.fusion)
    return Variant(
        name=name,
        estimator=recipe.estimator,
        fusion=recipe.fusion,
        search=recipe.searched(search),
        scenario=ALL,
        scores=f"{recipe.estimator},recipe={name}" if fused else recipe.estimator,
        compensation=recipe.compensation,
        recipe=name,
    )


def compensations_of(config: SweepConfig) -> list[CompensationConfig]:
    """Return how the candidates of a comparison are compensated, each way once; not those that are not."""
    found = dict.fromkeys(variant.compensation for variant in variants_of(config))
    return [options for options in found if options.method != "none"]


def check_scenarios_known(asked: Sequence[str], known: Sequence[str]) -> None:
    """Raise ValueError for scenarios of a grid that the calibration does not have."""
    for scenario in asked:
        if scenario not in (ALL, *known):
            raise ValueError(f"grid.scenarios: expected {ALL} or one of {', '.join(known)}, got {scenario!r}")


def candidates_of(variants: Sequence[Variant], seeds: Sequence[int], ratios: Sequence[float]) -> list[Candidate]:
    """Return every variant with every seed at every ratio; the name tells the seed where there are several."""
    return [
        Candidate(candidate_name(variant.name, ratio, seed if len(seeds) > 1 else None), variant, seed, ratio)
        for ratio in ratios
        for variant in variants
        for seed in seeds
    ]


def candidate_name(variant: str, ratio: float, seed: int | None = None) -> str:
    """Return the name of a candidate within a run.

    >>> candidate_name("gate_fisher", 0.2), candidate_name("wanda,global", 0.5, 1)
    ('gate_fisher@0.2', 'wanda,global,seed=1@0.5')
    """
    return f"{variant}{'' if seed is None else f',seed={seed}'}@{ratio:g}"


def seeds_of(config: SweepConfig) -> tuple[int, ...]:
    """Return the seeds of the calibration text, of the grid or else the one of the calibration."""
    return config.grid.seeds or (config.calibration.seed,)


def is_fused(estimator: str, fusion: FusionConfig) -> bool:
    """Return whether a name stands for scores of several estimators that are fused, in either structure."""
    return any(len(fusion_members(part)) > 1 for part in structure_parts(estimator, fusion).values())


def _said(axis: str, value: Any) -> str:
    """Return how a name tells a value.

    >>> _said("allocation", "global"), _said("stability_weight", -0.25), _said("compensation", "none")
    ('global', 'lambda=-0.25', 'uncompensated')
    >>> _said("learn_steps", 72)
    'learn=72'
    """
    if axis == "learn_steps":
        return f"learn={value:g}"
    if axis == "compensation" and value == "none":
        return "uncompensated"
    return f"lambda={value:g}" if axis == "stability_weight" else str(value)
