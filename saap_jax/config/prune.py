"""Pruning a model by one method, to a ratio or to targets."""

import dataclasses

from saap_jax.config.checks import check_ratios
from saap_jax.config.kind import check_kind
from saap_jax.config.mesh import MeshConfig
from saap_jax.config.method import OURS, CalibrationConfig, EvaluationConfig, ModelConfig, TargetsConfig
from saap_jax.types import Remat


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """Prune a model by one method at one ratio, and save the smaller model; by default as docs/arena.md found."""

    out: str = "models/pruned"
    """Directory of the pruned model; it must not exist."""
    method: str = OURS
    """A chain of steps, such as `"wanda > uniform > least_squares"`, or a recipe; `saap methods` lists all."""
    ratio: float | None = None
    """Share of the prunable parameters to remove at least; None: 0.2, or as little as the targets allow."""
    targets: TargetsConfig = TargetsConfig()
    from_run: str = ""
    """A run directory on whose text the model is pruned, by the scores that are kept beside it; empty: on
    `calibration`."""
    runs: str = "runs"
    """Directory of runs; what they keep there of the same weights and text is not made again."""
    model: ModelConfig = ModelConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    remat: Remat = "dots"
    """What the backward pass recomputes."""
    judge: bool = True
    """Measure the perplexity and the speed of the unpruned and the pruned model at the end."""
    evaluation: EvaluationConfig = EvaluationConfig(windows=16)
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        if self.ratio is not None:
            check_ratios((self.ratio,), "ratio")
        check_kind(self)
        if self.model.traced:
            for name, value in (("from_run", self.from_run), ("targets", ", ".join(self.targets.asked))):
                if value:
                    raise ValueError(f"{name}: expected none for a traced model, got {value}; leave it out")
