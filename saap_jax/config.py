"""The configuration of an experiment: one dataclass a command, made of the parts in `options`."""

import dataclasses
from typing import Literal

from saap_jax.options import (
    STUDIED,
    CalibrationConfig,
    EstimationConfig,
    EvaluationConfig,
    FusionConfig,
    KeepStatistics,
    ModelConfig,
    SearchConfig,
    check_at_least,
    check_choice,
    check_ratios,
    check_run_name,
    check_share,
)
from saap_jax.types import Remat


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """A comparison of estimators: one calibration pass, one masked evaluation a candidate, the best one cut."""

    name: str = "compare"
    """Name of the run, a directory below `runs`."""
    model: ModelConfig = ModelConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    estimation: EstimationConfig = EstimationConfig()
    fusion: FusionConfig = FusionConfig()
    search: SearchConfig = SearchConfig()
    ratios: tuple[float, ...] = (0.2, 0.5)
    """Shares of the prunable parameters to remove."""
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
