"""What commands take by default for a model of one's own, named as `MODULE:FACTORY` or `FILE.py:FACTORY`."""

import dataclasses
from typing import Any, TypeVar

from saap_jax.config.compensation import CompensationConfig
from saap_jax.config.jobs import FrontierConfig, SensitivityConfig
from saap_jax.config.method import CalibrationConfig, EstimationConfig, EvaluationConfig, FusionConfig, ModelConfig
from saap_jax.config.prune import PruneConfig
from saap_jax.config.search import SearchConfig

T = TypeVar("T")

FUSED = FusionConfig(estimators=("taylor_element", "gate_taylor"), attention="")
"""What `saap` fuses in a traced model: a sum over elements, and the gradients of gates."""

ESTIMATED = EstimationConfig(
    estimators=(
        "random", "magnitude", "taylor_vector", "taylor_element", "taylor_element_second", "fisher", "gate_taylor",
        "gate_fisher", "saap",
    )
)  # fmt: skip
"""What is compared on a traced model; `ablation`, the exact change of the loss, is one pass a unit."""

_PARTS: dict[str, Any] = {
    "calibration": CalibrationConfig(scenarios=(), examples=0),
    "estimation": ESTIMATED,
    "fusion": FUSED,
    "search": SearchConfig(),
    "evaluation": EvaluationConfig(in_domain="", out_of_domain="", windows=0),
}
"""Parts of configurations as they are for every example of a problem."""

_OWN: dict[type, dict[str, Any]] = {
    FrontierConfig: {"judged": "in"},
    SensitivityConfig: {"judged": "in", "estimator": "gate_taylor"},
    PruneConfig: {"estimator": "gate_taylor", "ratio": 0.25, "compensation": CompensationConfig()},
}


def for_factory(kind: type[T], factory: str, **fields: Any) -> T:
    """Build the configuration of a command for a factory's problem: all its examples, estimators that can be observed.

    >>> from saap_jax.config import CompareConfig
    >>> for_factory(CompareConfig, "mine.py:problem", ratios=(0.3,)).estimation.estimators[:2]
    ('random', 'magnitude')
    """
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    defaults = {name: part for name, part in _PARTS.items() if name in names}
    own = next((each for base, each in _OWN.items() if issubclass(kind, base)), {})
    return kind(**{"model": ModelConfig(name=factory), **defaults, **own, **fields})
