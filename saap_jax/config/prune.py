"""Pruning a model by one method, to a ratio or to targets."""

import dataclasses

from saap_jax.config.checks import check_ratios
from saap_jax.config.compensation import CompensationConfig
from saap_jax.config.kind import check_kind, check_scenarios
from saap_jax.config.mesh import MeshConfig
from saap_jax.config.method import CalibrationConfig, EvaluationConfig, FusionConfig, ModelConfig, TargetsConfig
from saap_jax.config.search import PREFERRED, SearchConfig
from saap_jax.types import Remat

CORRECTED = CompensationConfig(method="least_squares")
"""What makes up for what goes, unless something else is asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """Prune a model with one estimator at one ratio, and save the smaller model; by default as docs/arena.md found."""

    out: str = "models/pruned"
    """Directory of the pruned model; it must not exist."""
    recipe: str = ""
    """A published method to prune by, see `saap recipes`: its own estimator, fusion, search and compensation, with the
    widths that `search.multiple_of` and `search.device` say. Empty: as these options say."""
    estimator: str = "saap"
    """Name, with hyper-parameters in brackets if any."""
    ratio: float | None = None
    """Share of the prunable parameters to remove at least; None: 0.2, or as little as the targets allow."""
    targets: TargetsConfig = TargetsConfig()
    from_run: str = ""
    """A run directory whose scores, or else statistics, are used (and its text on the way, with
    `search.rescore_every`); empty: score now."""
    model: ModelConfig = ModelConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    remat: Remat = "dots"
    """What the backward pass recomputes."""
    fusion: FusionConfig = FusionConfig()
    search: SearchConfig = PREFERRED
    compensation: CompensationConfig = CORRECTED
    judge: bool = True
    """Measure the perplexity and the speed of the unpruned and the pruned model at the end."""
    evaluation: EvaluationConfig = EvaluationConfig(windows=16)
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        if self.ratio is not None:
            check_ratios((self.ratio,), "ratio")
        check_kind(self)
        self._check_recipe()
        if (option := self.search.trains) and (asked := self.targets.asked):
            raise ValueError(
                f"search.{option}: expected no targets beside it, got {', '.join(asked)}: what comes of it has other "
                "widths than those that met them; leave one of the two out"
            )
        if self.model.traced:
            return self._check_traced()
        if not (self.from_run or self.recipe):  # a recipe has its own needs of text, and is looked at once it is read
            self.check_calibration(self.calibration)

    def _check_recipe(self) -> None:
        """Raise ValueError for what is said beside a recipe, which says it."""
        if not self.recipe:
            return
        widths = dataclasses.replace(PREFERRED, multiple_of=self.search.multiple_of, device=self.search.device)
        for name, said in (
            ("model.name", self.model.name if self.model.traced else ""),
            ("from_run", self.from_run),
            ("estimator", self.estimator if self.estimator != "saap" else ""),
            ("fusion", "another" if self.fusion != FusionConfig() else ""),
            ("search", "another" if self.search != widths else ""),
            ("compensation", "another" if self.compensation != CORRECTED else ""),
        ):
            if said:
                raise ValueError(
                    f"recipe: {self.recipe} says it all of a language model; expected no {name} beside it, got {said}"
                )

    def _check_traced(self) -> None:
        """Raise ValueError for what a traced model cannot be pruned by."""
        for name, value in (
            ("from_run", self.from_run),
            ("targets", ", ".join(self.targets.asked)),
        ):
            if value:
                raise ValueError(f"{name}: expected none for a traced model, got {value}; leave it out")

    def check_calibration(self, calibration: CalibrationConfig) -> None:
        """Check the text to prune by, that of a run or of this configuration, against what is asked for.

        Raises:
            ValueError: too few scenarios for stability over them, or too few microbatches to compensate.
        """
        check_scenarios(calibration, self.search.allocation, self.search.stability_over)
        count = calibration.microbatches(len(calibration.scenarios))
        self.search.check_microbatches(count)
        self.compensation.check_microbatches(count)
