"""The configuration of an experiment with runs: one dataclass a command, of shared parts."""

import dataclasses
import math
from typing import Literal

from saap_jax.config.amounts import read_percent
from saap_jax.config.checks import (
    check_at_least,
    check_choice,
    check_ratios,
    check_run_name,
    check_seed,
    check_share,
    meant,
)
from saap_jax.config.kind import check_kind
from saap_jax.config.mesh import MeshConfig
from saap_jax.config.method import (
    OURS,
    USUAL,
    CalibrationConfig,
    EvaluationConfig,
    KeepStatistics,
    ModelConfig,
)
from saap_jax.types import Remat

Domain = Literal["in", "out"]
"""Of an evaluation text: in the calibration domain, or out of it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Methods at some ratios: one calibration pass a seed, one masked evaluation a candidate."""

    name: str = "sweep"
    """Name of the run, a directory below `runs`."""
    methods: tuple[str, ...] = USUAL
    """Chains, `"wanda > uniform > least_squares"` or `wanda,uniform,least_squares`, and recipes by name; braces
    stand for several: `"{wanda,fisher} > {uniform,global}"`. `saap methods` lists what there is."""
    model: ModelConfig = ModelConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    seeds: tuple[int, ...] = ()
    """Seeds of the calibration text, in place of `calibration.seed`; one pass each. Three or more say how much a result
    depends on the text drawn."""
    remat: Remat = "dots"
    """What the backward pass recomputes: `none`, all but matrix products (`dots`), or the whole layer (`full`)."""
    ratios: tuple[float, ...] = (0.2, 0.5)
    """Shares of the prunable parameters to remove."""
    evaluation: EvaluationConfig = EvaluationConfig()
    runs: str = "runs"
    """Directory of all runs, and of the cache of what they have in common."""

    def __post_init__(self) -> None:
        check_run_name(self.name)
        check_ratios(self.ratios)
        check_kind(self)
        if not self.methods:
            raise ValueError("methods: expected at least one, such as wanda, got none")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: expected each once, got {list(self.seeds)}")
        for seed in self.seeds:
            check_seed("seeds", seed)

    @property
    def seeds_drawn(self) -> tuple[int, ...]:
        """The seeds of the calibration text."""
        return self.seeds or (self.calibration.seed,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig(SweepConfig):
    """A comparison: one calibration pass a seed, one masked evaluation a candidate, the best one cut."""

    name: str = "compare"
    """Name of the run, a directory below `runs`."""
    race: bool = False
    """Evaluate window after window, in a random order that is always the same, and a candidate that is surely worse
    than another of its ratio no further. The verdict may be looked at at any time."""
    race_margin: float = 0.005
    """Of a race: nats a token that count as no difference, 0.005 being half a per cent of perplexity; a race ends when
    all that are left are surely that close. 0: it never ends so."""
    best_ratio: float | None = None
    """Ratio at which the best candidate is cut, saved and measured, one of `ratios`; None: 0.2 if that is one of them,
    else the smallest above 0."""
    new_tokens: int = 64
    """Tokens that the unpruned model and the one that was cut write after each of three prompts, for the report;
    0: none. None are written on several devices, nor by a model of a factory."""
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.race_margin) and self.race_margin >= 0):
            raise ValueError(f"race_margin: expected a number of at least 0, got {self.race_margin}")
        check_at_least("new_tokens", self.new_tokens, 0)
        if self.best_ratio not in (None, *self.ratios):
            raise ValueError(
                f"best_ratio: expected one of ratios {list(self.ratios)}, got {self.best_ratio}{meant(self.best_ratio)}"
            )

    @property
    def cut_ratio(self) -> float:
        """The ratio at which the best candidate is cut."""
        if self.best_ratio is not None:
            return self.best_ratio
        return 0.2 if 0.2 in self.ratios else min((ratio for ratio in self.ratios if ratio), default=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrontierConfig(SweepConfig):
    """Perplexity against ratio, and the largest ratio that still holds a limit, of each variant and seed."""

    name: str = "frontier"
    """Name of the run, a directory below `runs`."""
    methods: tuple[str, ...] = ("wanda", OURS)
    """Chains of steps and recipes, as `saap compare` takes them."""
    ratios: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5)
    """Points of the curve, as shares of the prunable parameters; where it first breaks the limit, it is bisected."""
    max_ppl_increase: str = "10%"
    """How far the perplexity may be above the unpruned model's: a percentage with its sign."""
    judged: Domain = "out"
    """Text whose perplexity is held against the limit: `out` of the calibration domain or `in` it."""
    tolerance: float = 0.005
    """How exactly the largest ratio is found."""
    resamples: int = 1000
    """Bootstrap resamples of each interval."""
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.ratios) == 0:
            raise ValueError("ratios: expected numbers above 0, got 0, which is the unpruned model: it is part anyway")
        read_percent("max_ppl_increase", self.max_ppl_increase)
        check_choice("judged", self.judged, Domain)
        if not 0.0005 <= self.tolerance < 1:
            raise ValueError(f"tolerance: expected a ratio in [0.0005, 1), got {self.tolerance}{meant(self.tolerance)}")
        check_at_least("resamples", self.resamples, 1)


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
    estimators: tuple[str, ...] = USUAL
    """Scores as chains begin with them: estimators, `a+b`, `a/b`, `fused(a, b)`, `FILE.py:FACTORY`."""
    remat: Remat = "dots"
    """What the backward pass recomputes."""
    from_run: str = ""
    """A run directory whose statistics are scored instead of a pass over text; `calibration` is then not read. Unless
    estimators are named, those of the usual ones are scored that the run serves by statistics or scores."""
    keep_statistics: KeepStatistics = "all"
    """Statistics that are kept for later scoring: `all`, the `small` ones only, or `none`. Gradients of weights, mean
    and squared, each take as much space as the model in float32."""
    patterns: PatternsConfig = PatternsConfig()
    mesh: MeshConfig = MeshConfig()
    runs: str = "runs"
    """Directory of all runs."""

    def __post_init__(self) -> None:
        check_run_name(self.name)
        check_kind(self)
        check_choice("keep_statistics", self.keep_statistics, KeepStatistics)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """One page of one run or several, of any kind: tables, figures, intervals, cost; as Markdown and CSV too."""

    runs: tuple[str, ...] = ()
    """Run directories."""
    out: str = ""
    """The page; Markdown and CSV go beside it. Empty: `report.html`, in the run's directory if there is one run, else
    in the working directory."""
    figures: str = ""
    """Directory for each figure as SVG, PNG and PDF, in the size of a paper; empty: none."""
    overwrite: bool = False
    """Replace files even if they are no report and no figure of saap."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a model for other programs, read it back, and compare its logits with the source's. See docs/export.md."""

    model: str = ""
    """The model: a name, GGUF file or directory."""
    out: str = ""
    """What to write: a directory, or with format gguf a file; it must not exist."""
    format: Literal["hf", "padded", "ragged", "gguf", "tunix", "maxtext"] = "hf"
    """`hf`: a plain LLaMA, if all layers are alike. `padded`: a plain LLaMA, widened by zeros. `ragged`: widths as they
    are, with code for transformers. `gguf`: a file for llama.cpp. `tunix`: as `hf`, with what configures Tunix.
    `maxtext`: a checkpoint of MaxText, with its configuration."""
    dtype: Literal["float32", "bfloat16", "float16", "q8_0"] = "float32"
    """Type of the stored matrices; q8_0 is for gguf alone."""
    teacher: str = ""
    """With format maxtext: the unpruned model, a name, GGUF file or directory, which is exported too, to `OUT/teacher`.
    MaxText's configuration names both."""
    dequantize: bool = False
    """Write quantised matrices in `dtype`. Without it, gguf takes those of 4 bits in groups of 32 as they are and
    refuses others; the other formats always dequantise."""

    def __post_init__(self) -> None:
        check_choice("format", self.format, ExportConfig.__annotations__["format"])
        check_choice("dtype", self.dtype, ExportConfig.__annotations__["dtype"])
        if self.dtype == "q8_0" and self.format != "gguf":
            raise ValueError(f"dtype: q8_0 is a type of GGUF, expected float32, bfloat16 or float16 for {self.format}")
        if self.teacher and self.format != "maxtext":
            raise ValueError(
                f"teacher: expected format maxtext beside it, whose distillation takes one, got {self.format}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FidelityConfig:
    """How well do estimators predict the exact change of loss when a unit goes?"""

    name: str = "fidelity"
    """Name of the run, a directory below `runs`."""
    model: ModelConfig = ModelConfig()
    calibration: CalibrationConfig = CalibrationConfig(examples=8)
    estimators: tuple[str, ...] = USUAL
    """Scores as chains begin with them: estimators, `a+b`, `a/b`, `fused(a, b)`, `FILE.py:FACTORY`."""
    remat: Remat = "dots"
    """What the backward pass recomputes."""
    channels_per_layer: int = 4
    """MLP channels of each layer that are ablated, drawn at random; all attention units are."""
    seed: int = 0
    """Seed of the channels drawn and of the bootstrap."""
    resamples: int = 1000
    """Bootstrap resamples of each interval."""
    mesh: MeshConfig = MeshConfig()
    runs: str = "runs"
    """Directory of all runs."""

    def __post_init__(self) -> None:
        check_run_name(self.name)
        check_kind(self)
        check_at_least("channels_per_layer", self.channels_per_layer, 0)
        check_seed("seed", self.seed)
        check_at_least("resamples", self.resamples, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SensitivityConfig:
    """What does a layer's attention or MLP cost, when units of it alone go? And what follows for the search?"""

    name: str = "sensitivity"
    """Name of the run, a directory below `runs`."""
    model: ModelConfig = ModelConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    method: str = OURS
    """A chain, or a recipe: the score that it begins with says which units of a layer go first, its limits and its
    allocation how `ratio` is spread now, and what suggestions would change."""
    remat: Remat = "dots"
    """What the backward pass recomputes."""
    fractions: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5)
    """Shares of a layer's units to remove, rounded up to whole units; 1 removes the whole structure from the layer."""
    judged: Domain = "out"
    """Text whose loss says what a removal costs: `out` of the calibration domain or `in` it."""
    ratio: float = 0.2
    """Share of all prunable parameters that suggestions are made for."""
    align: int = 0
    """Measure what MLP widths to multiples of this change at `ratio`, and the time of both models cut; 0: do not."""
    repeats: int = 3
    """Forward passes timed of each model, in turns, eight times over."""
    resamples: int = 1000
    """Bootstrap resamples of each interval."""
    mesh: MeshConfig = MeshConfig()
    evaluation: EvaluationConfig = EvaluationConfig(windows=8)
    runs: str = "runs"
    """Directory of all runs."""

    def __post_init__(self) -> None:
        check_run_name(self.name)
        check_ratios((self.ratio,), "ratio")
        check_choice("judged", self.judged, Domain)
        if not self.fractions or not all(0 < fraction <= 1 for fraction in self.fractions):
            raise ValueError(
                f"fractions: expected one or more numbers in (0, 1], got {list(self.fractions)}{meant(*self.fractions)}"
            )
        if len(set(self.fractions)) < len(self.fractions):
            raise ValueError(f"fractions: expected each once, got {list(self.fractions)}")
        if self.align < 0 or self.align == 1:
            raise ValueError(f"align: expected a multiple of at least 2, such as 64, or 0 for none, got {self.align}")
        check_kind(self)
        if self.align and self.model.traced:
            raise ValueError(f"align: expected 0 for a traced model, got {self.align}; use within(multiple_of=…)")
        check_at_least("repeats", self.repeats, 1)
        check_at_least("resamples", self.resamples, 1)
