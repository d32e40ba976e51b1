"""The configuration of an experiment: one dataclass a command, made of the parts in `options`."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from saap_jax.options import (
    STUDIED,
    CalibrationConfig,
    EstimationConfig,
    EvaluationConfig,
    FusionConfig,
    GridConfig,
    KeepStatistics,
    ModelConfig,
    SearchConfig,
    check_at_least,
    check_choice,
    check_ratios,
    check_run_name,
    check_share,
    read_bound,
    read_percent,
    read_points,
)
from saap_jax.types import Remat


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """A comparison: one calibration pass a seed, one masked evaluation a candidate, the best one cut."""

    name: str = "compare"
    """Name of the run, a directory below `runs`."""
    model: ModelConfig = ModelConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    estimation: EstimationConfig = EstimationConfig()
    fusion: FusionConfig = FusionConfig()
    search: SearchConfig = SearchConfig()
    ratios: tuple[float, ...] = (0.2, 0.5)
    """Shares of the prunable parameters to remove."""
    grid: GridConfig = GridConfig()
    best_ratio: float = 0.2
    """Ratio at which the best candidate is cut, saved and measured; one of `ratios`."""
    evaluation: EvaluationConfig = EvaluationConfig()
    runs: str = "runs"
    """Directory of all runs."""

    def __post_init__(self) -> None:
        check_run_name(self.name)
        check_ratios(self.ratios)
        if self.best_ratio not in self.ratios:
            raise ValueError(f"best_ratio: expected one of ratios {list(self.ratios)}, got {self.best_ratio}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatternsConfig:
    """Which units are unimportant in every scenario?"""

    importance: str = ""
    """The estimator that says what is important; empty: the first that is neither random nor a usage frequency, and
    differs between scenarios."""
    share: float = 0.2
    """Units of each structure that count as unimportant in a scenario: those of the lowest scores."""

    def __post_init__(self) -> None:
        check_share("patterns.share", self.share)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Score every unit; keep scores, statistics and a report in a run directory."""

    name: str = "score"
    """Name of the run, a directory below `runs`."""
    model: ModelConfig = ModelConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    estimation: EstimationConfig = EstimationConfig()
    fusion: FusionConfig = FusionConfig()
    from_run: str = ""
    """A run directory whose statistics are scored instead of a pass over text; `calibration` is then not read."""
    keep_statistics: KeepStatistics = "all"
    """Statistics that are kept for later scoring: `all`, or the `small` ones only. Gradients of weights, mean and
    squared, each take as much space as the model in float32."""
    patterns: PatternsConfig = PatternsConfig()
    runs: str = "runs"
    """Directory of all runs."""

    def __post_init__(self) -> None:
        check_run_name(self.name)
        check_choice("keep_statistics", self.keep_statistics, KeepStatistics)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """Prune a model with one estimator at one ratio, and save the smaller model; by default as docs/study.md found."""

    out: str = "models/pruned"
    """Directory of the pruned model; it must not exist."""
    estimator: str = "saap"
    """Name, with hyper-parameters in brackets if any."""
    ratio: float = 0.2
    """Share of the prunable parameters to remove."""
    from_run: str = ""
    """A run directory whose scores, or else statistics, are used (and its text on the way, with
    `search.rescore_every`); empty: score now."""
    model: ModelConfig = ModelConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    remat: Remat = "dots"
    """What the backward pass recomputes."""
    fusion: FusionConfig = FusionConfig()
    search: SearchConfig = STUDIED

    def __post_init__(self) -> None:
        check_ratios((self.ratio,))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Perplexity of models on texts."""

    models: tuple[str, ...] = ("smollm2-135m",)
    """Models: names, GGUF files, directories."""
    sources: tuple[str, ...] = ("builtin:reference", "builtin:descriptions")
    """Text sources; of a built-in one, the evaluation part."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the parameters."""
    windows: int = 24
    """Windows of each text; 0 takes all."""
    length: int = 128
    """Tokens a window; part of the metric's name."""
    batch_size: int = 8
    """Windows evaluated at once."""

    def __post_init__(self) -> None:
        if not self.models or not self.sources:
            raise ValueError("evaluate: expected at least one model and one source")
        check_at_least("windows", self.windows, 0)
        check_at_least("length", self.length, 2)
        check_at_least("batch_size", self.batch_size, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairConfig:
    """Two models on the same text. Where one of them is of a run, the run's text, type and batch size are taken."""

    sources: tuple[str, ...] = ("builtin:reference", "builtin:descriptions")
    """Text sources; of a built-in one, the evaluation part."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the parameters."""
    windows: int = 24
    """Windows of each text; 0 takes all."""
    length: int = 128
    """Tokens a window; part of the metric's name."""
    batch_size: int = 8
    """Windows evaluated at once."""
    resamples: int = 10_000
    """Bootstrap resamples of each interval."""
    seed: int = 0
    """Seed of the bootstrap."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources: expected at least one text source, got none")
        check_at_least("windows", self.windows, 0)
        check_at_least("length", self.length, 2)
        check_at_least("batch_size", self.batch_size, 1)
        check_at_least("resamples", self.resamples, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbConfig(PairConfig):
    """Is model A better than model B on the same text, by how much, and how sure is that?

    A model is `RUN:CANDIDATE`, `RUN:VARIANT@RATIO` (all its seeds together), `RUN:dense` (the unpruned model of a run),
    or a name, GGUF file or directory. Of two runs, the losses on record are compared and no model is loaded.
    """

    a: str = ""
    """Model A."""
    b: str = ""
    """Model B."""
    json: str = ""
    """File that the result is written to; empty: none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateConfig(PairConfig):
    """Does a model keep within limits beside a baseline? Exit code 0 if it does, 1 if it does not, 2 for bad input.

    A model is `RUN:CANDIDATE`, `RUN:VARIANT@RATIO` (all its seeds together), `RUN:dense` (the unpruned model of a run),
    or a name, GGUF file or directory. At least one limit has to be given, here or in a file.
    """

    model: str = ""
    """The model to judge."""
    baseline: str = ""
    """The model to judge it by."""
    max_ppl_increase: str = ""
    """How far its perplexity may be above the baseline's, on every text: `5%`. The estimate itself decides."""
    max_size: str = ""
    """The most that its weights may take in memory: `80%` of the baseline's, or `300MiB`."""
    max_latency: str = ""
    """The longest that its forward pass may take: `105%` of the baseline's. Times vary: leave room for that."""
    max_memory: str = ""
    """The most memory that its forward pass may take, weights included: `90%` of the baseline's, or `2GiB`."""
    max_accuracy_drop: float | None = None
    """How far its accuracy on tasks may be below the baseline's, in points; needs task results."""
    limits: str = ""
    """A TOML file of limits, such as configs/gates/default.toml; a limit on the command line overrides the file's."""
    repeats: int = 7
    """Forward passes timed of each model, in turns."""
    junit: str = ""
    """File that the outcome is written to as JUnit XML; empty: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("repeats", self.repeats, 1)
        for name, read in LIMITS.items():
            if getattr(self, name) not in ("", None):
                read(name, getattr(self, name))


LIMITS: dict[str, Callable[[str, Any], Any]] = {
    "max_ppl_increase": read_percent,
    "max_size": read_bound,
    "max_latency": read_percent,
    "max_memory": read_bound,
    "max_accuracy_drop": read_points,
}
"""What a gate can limit, a field of its configuration each -> how its value is read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FidelityConfig:
    """How well do estimators predict the exact change of loss when a unit goes?"""

    name: str = "fidelity"
    """Name of the run, a directory below `runs`."""
    model: ModelConfig = ModelConfig()
    calibration: CalibrationConfig = CalibrationConfig(examples=8)
    estimation: EstimationConfig = EstimationConfig()
    fusion: FusionConfig = FusionConfig()
    channels_per_layer: int = 4
    """MLP channels of each layer that are ablated, drawn at random; all attention units are."""
    seed: int = 0
    """Seed of the channels drawn and of the bootstrap."""
    resamples: int = 1000
    """Bootstrap resamples of each interval."""
    runs: str = "runs"
    """Directory of all runs."""

    def __post_init__(self) -> None:
        check_run_name(self.name)
        check_at_least("channels_per_layer", self.channels_per_layer, 0)
        check_at_least("resamples", self.resamples, 1)
