"""What commands take by default for a model of one's own, named as `MODULE:FACTORY` or `FILE.py:FACTORY`."""

import dataclasses
from typing import Any, TypeVar

from saap_jax.config.jobs import FidelityConfig, FrontierConfig, ScoreConfig, SensitivityConfig, SweepConfig
from saap_jax.config.method import CalibrationConfig, EvaluationConfig, ModelConfig
from saap_jax.config.prune import PruneConfig

T = TypeVar("T")

ESTIMATED = (
    "random", "magnitude", "taylor_vector", "taylor_element", "taylor_element_second", "fisher", "gate_taylor",
    "gate_fisher", "fused(taylor_element, gate_taylor, attention=fused)",
)  # fmt: skip
"""What is compared on a traced model; `ablation`, the exact change of the loss, is one pass a unit."""

_PARTS: dict[str, Any] = {
    "calibration": CalibrationConfig(scenarios=(), examples=0),
    "evaluation": EvaluationConfig(in_domain="", out_of_domain="", windows=0),
}
"""Parts of configurations as they are for every example of a problem."""

_OWN: dict[type, dict[str, Any]] = {
    FrontierConfig: {"judged": "in", "methods": ESTIMATED},
    SensitivityConfig: {"judged": "in", "method": "gate_taylor"},
    PruneConfig: {"method": "gate_taylor", "ratio": 0.25},
    SweepConfig: {"methods": ESTIMATED},
    ScoreConfig: {"estimators": ESTIMATED},
    FidelityConfig: {"estimators": ESTIMATED},
}


def for_factory(kind: type[T], factory: str, **fields: Any) -> T:
    """Build the configuration of a command for a factory's problem: all its examples, estimators that can be observed.

    >>> from saap_jax.config import CompareConfig
    >>> for_factory(CompareConfig, "mine.py:problem", ratios=(0.3,)).methods[:2]
    ('random', 'magnitude')
    """
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    defaults = {name: part for name, part in _PARTS.items() if name in names}
    own = next((each for base, each in _OWN.items() if issubclass(kind, base)), {})
    return kind(**{"model": ModelConfig(name=factory), **defaults, **own, **fields})
