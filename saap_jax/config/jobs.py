"""The configurations of the commands that calibrate a model: one dataclass a command, of shared parts."""

import dataclasses
from typing import Annotated, Any, Literal, TypeVar

from saap_jax.checks import (
    Beside,
    Checked,
    Local,
    Names,
    Natural,
    Positive,
    Ratios,
    RunName,
    Seed,
    check_not_negative,
    check_ratios,
    check_seed,
    check_several,
    meant,
    number,
    read_percent,
)
from saap_jax.config.mesh import SPREAD, MeshConfig
from saap_jax.config.method import MEASURED, TARGETS, CalibrationConfig, EvaluationConfig, ModelConfig, TargetsConfig
from saap_jax.types import Remat

T = TypeVar("T")

USUAL = ("random", "magnitude", "taylor_vector", "taylor_element", "gate_taylor", "gate_fisher", "wanda", "fluctuation")
"""Estimators that are compared where nothing is said."""

OURS = "default"
QUICK = "fast"
TRACED = "gate_taylor"
"""Methods where nothing is said: of `saap prune`; of jobs that prune many times; of traced models."""

OF_OURS = ("no model of a factory, whose program is as it is,", lambda config: not config.model.traced)
"""What options about the program need beside them, and about text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobConfig(Checked):
    """What all commands ask for that calibrate a model."""

    model: ModelConfig = ModelConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    remat: Remat = "dots"
    """What the backward pass recomputes: `none`, all but matrix products (`dots`), or the whole layer (`full`)."""
    mesh: MeshConfig = MeshConfig()
    runs: Local = "runs"
    """Directory of all runs, and of the cache of what they have in common."""

    BESIDE = (
        Beside(
            "model.dtype model.attention calibration.length calibration.bos mesh.tensor mesh.expert mesh.rules",
            *OF_OURS,
        ),
        Beside(
            "calibration.scenarios calibration.examples",
            "at least one, or a model of a factory",
            lambda config: config.model.traced or (config.calibration.scenarios and config.calibration.examples),
        ),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgingConfig(JobConfig):
    """What commands ask for that evaluate many candidates."""

    evaluation: EvaluationConfig = EvaluationConfig()
    race: bool = False
    """Evaluate window after window, in a random order that is always the same, and a candidate no further once it is
    surely worse than another of its ratio; of `frontier`, surely on one side of the limit; of `sensitivity`, surely
    worse or better than the unpruned model."""
    race_margin: Annotated[float, check_not_negative] = 0.005
    """Of a race: nats a token that count as no difference, 0.005 being half a per cent of perplexity; a race ends when
    all that are left are surely that close. 0: it never ends so."""

    BESIDE = (
        Beside("evaluation.length evaluation.bos", *OF_OURS),
        Beside("race_margin", "--race", lambda config: config.race),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig(JudgingConfig):
    """Methods at some ratios: one calibration pass a seed, one masked evaluation a candidate."""

    name: RunName = "sweep"
    """Name of the run, a directory below `runs`."""
    methods: Names = USUAL
    """Chains, `"wanda > uniform > least_squares"` or `wanda,uniform,least_squares`, and recipes by name; braces
    stand for several: `"{wanda,fisher} > {uniform,global}"`. `saap methods` lists what there is."""
    seeds: Annotated[tuple[int, ...], check_several, check_seed] = ()
    """Seeds of the calibration text, in place of `calibration.seed`; one pass each. Three or more say how much a result
    depends on the text drawn."""
    ratios: Ratios = (0.2, 0.5)
    """Shares of the prunable parameters to remove."""

    @property
    def seeds_drawn(self) -> tuple[int, ...]:
        """The seeds of the calibration text."""
        return self.seeds or (self.calibration.seed,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig(SweepConfig):
    """A comparison: one calibration pass a seed, one masked evaluation a candidate.

    >>> CompareConfig(methods=("wanda", "fast"), ratios=(0.3, 0.4)).cut_ratio
    0.3
    """

    name: RunName = "compare"
    """Name of the run, a directory below `runs`."""
    cut: bool = False
    """Cut the best candidate, save it in the run's `best`, load it back, check its perplexity and time it."""
    best_ratio: float | None = None
    """Ratio at which the best candidate is cut, one of `ratios`; None: 0.2 if that is one of them, else the smallest
    above 0."""
    new_tokens: Natural = 0
    """Of a cut: tokens that the unpruned model and the best pruned one write after each of three prompts, such as 64.
    None are written on several devices, nor by a model of a factory."""

    BESIDE = (Beside("new_tokens", "--cut, since a cut model writes,", lambda config: config.cut),)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.best_ratio not in (None, *self.ratios):
            raise ValueError(
                f"best_ratio: expected one of ratios {list(self.ratios)}, got {self.best_ratio}{meant(self.best_ratio)}"
            )

    @property
    def cut_ratio(self) -> float:
        """The ratio at which the best candidate is cut."""
        if self.best_ratio is not None:
            return self.best_ratio
        if 0.2 in self.ratios:
            return 0.2
        return min((ratio for ratio in self.ratios if ratio), default=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrontierConfig(SweepConfig):
    """Perplexity against ratio, and the largest ratio that still holds a limit, of each variant and seed."""

    name: RunName = "frontier"
    """Name of the run, a directory below `runs`."""
    methods: Names = ("wanda", QUICK)
    """Chains of steps and recipes, as `saap compare` takes them."""
    ratios: Annotated[
        Ratios, number("numbers above 0, since the unpruned model is part anyway", lambda ratio: ratio > 0)
    ] = (0.1, 0.2, 0.3, 0.4, 0.5)
    """Points of the curve, as shares of the prunable parameters; where it first breaks the limit, it is bisected."""
    max_ppl_increase: Annotated[str, read_percent] = "10%"
    """How far the perplexity may be above the unpruned model's, on the text out of the calibration domain where there
    is one: a percentage with its sign."""
    tolerance: Annotated[float, number("a ratio in [0.0005, 1)", lambda ratio: 0.0005 <= ratio < 1)] = 0.005
    """How exactly the largest ratio is found."""
    resamples: Positive = 1000
    """Bootstrap resamples of each interval."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneConfig(JobConfig):
    """Prune a model by one method to a ratio, or to what it may take, and save the smaller model."""

    out: str = "models/pruned"
    """Directory of the pruned model; it must not exist."""
    method: str = ""
    """A chain of steps, such as `"wanda > uniform > least_squares"`, or a recipe; `saap methods` lists all. `fast`
    and `default` are ours, by how long they take. Empty: `default`; `fast` beside targets, which try many ratios; of a
    traced model `gate_taylor`."""
    ratio: Annotated[float | None, check_ratios] = None
    """Share of the prunable parameters to remove, beside targets at least; without targets it has to be said."""
    targets: TargetsConfig = TargetsConfig()
    from_run: str = ""
    """A run directory on whose text the model is pruned, by the scores that are kept beside it; `calibration`, where
    anything is said of it, has to be that of the run. Empty: on `calibration`."""
    judge: bool = True
    """Measure the perplexity and the speed of the unpruned and the pruned model at the end."""
    evaluation: EvaluationConfig = EvaluationConfig()

    BESIDE = (
        Beside(f"judge evaluation.length evaluation.bos from_run targets.{' targets.'.join(TARGETS)}", *OF_OURS),
        Beside(SPREAD, "no target that is measured", lambda config: not MEASURED & {*config.targets.asked}),
    )

    def check_asked(self) -> None:
        """Raise ValueError where nothing says how much goes."""
        if self.ratio is None and not self.targets.asked:
            raise ValueError("expected how much goes, such as --ratio 0.2 or --targets.parameters 70%, got none")

    @property
    def chain(self) -> str:
        """The method, also where none was said."""
        return self.method or (TRACED if self.model.traced else QUICK if self.targets.asked else OURS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreConfig(JobConfig):
    """Score every unit; keep scores, statistics and a report in a run directory."""

    name: RunName = "score"
    """Name of the run, a directory below `runs`."""
    estimators: tuple[str, ...] = USUAL
    """Scores as chains begin with them: estimators, `a+b`, `a/b`, `fused(a, b)`, `FILE.py:FACTORY`."""
    from_run: str = ""
    """A run directory whose statistics are scored instead of a pass over text; `calibration` is then not read. Unless
    estimators are named, those of the usual ones are scored that the run serves by statistics or scores."""
    keep_statistics: Literal["all", "small", "none"] = "all"
    """Statistics that are kept for later scoring: `all`, the `small` ones only, or `none`. Gradients of weights, mean
    and squared, each take as much space as the model in float32."""

    BESIDE = (Beside("keep_statistics", "no --from-run, which observes nothing,", lambda config: not config.from_run),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FidelityConfig(JobConfig):
    """How well do estimators predict the exact change of loss when a unit goes?"""

    name: RunName = "fidelity"
    """Name of the run, a directory below `runs`."""
    calibration: CalibrationConfig = CalibrationConfig(examples=8)
    estimators: tuple[str, ...] = USUAL
    """Scores as chains begin with them: estimators, `a+b`, `a/b`, `fused(a, b)`, `FILE.py:FACTORY`."""
    channels_per_layer: Natural = 4
    """MLP channels of each layer that are ablated, drawn at random; all attention units are."""
    seed: Seed = 0
    """Seed of the channels drawn and of the bootstrap."""
    resamples: Positive = 1000
    """Bootstrap resamples of each interval."""


def _check_fractions(name: str, values: Any) -> None:
    check_several(name, [f"{fraction:g}" for fraction in values])
    if not all(0 < fraction <= 1 for fraction in values):
        raise ValueError(f"{name}: expected numbers in (0, 1], got {list(values)}{meant(*values)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SensitivityConfig(JudgingConfig):
    """What does a layer's attention or MLP cost, when units of it alone go? And what follows for the search?"""

    name: RunName = "sensitivity"
    """Name of the run, a directory below `runs`."""
    method: str = "wanda"
    """A chain, or a recipe, that does not begin with `best_of`, as `fast` does: its score says which units of a layer
    go first, its limits and its allocation how `ratio` is spread now, and what suggestions would change."""
    fractions: Annotated[tuple[float, ...], _check_fractions] = (0.1, 0.2, 0.3, 0.5)
    """Shares of a layer's units to remove, rounded up to whole units; 1 removes the whole structure from the layer. The
    text out of the calibration domain, where there is one, says what a removal costs."""
    ratio: Annotated[float, check_ratios] = 0.2
    """Share of all prunable parameters that suggestions are made for."""
    evaluation: EvaluationConfig = EvaluationConfig(windows=8)


# --- a model of one's own ------------------------------------------------------------------------

ESTIMATED = (
    "random", "magnitude", "taylor_vector", "taylor_element", "taylor_element_second", "fisher", "gate_taylor",
    "gate_fisher", "fused(taylor_element, gate_taylor, attention=fused)",
)  # fmt: skip
"""What is compared on a traced model; `ablation`, the exact change of the loss, is one pass a unit."""

_OWN: dict[str, Any] = {
    "calibration": CalibrationConfig(scenarios=(), examples=0),
    "evaluation": EvaluationConfig(in_domain="", out_of_domain="", windows=0),
    "methods": ESTIMATED,
    "estimators": ESTIMATED,
    "method": "gate_taylor",
}
"""Fields of commands as they are for every example of a factory's problem."""


def for_factory(kind: type[T], factory: str, **fields: Any) -> T:
    """Build the configuration of a command for a factory's problem, named as `MODULE:FACTORY` or `FILE.py:FACTORY`: all
    its examples, estimators that can be observed.

    >>> for_factory(CompareConfig, "mine.py:problem", ratios=(0.3,)).methods[:2]
    ('random', 'magnitude')
    """
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    own = {name: value for name, value in _OWN.items() if name in names}
    return kind(**{"model": ModelConfig(name=factory), **own, **fields})
