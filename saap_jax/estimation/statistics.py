"""The statistics of this package by name; each stands beside the formulas that use it."""

from saap_jax.estimation.activations import ACTIVATION_MOMENTS, ACTIVATION_NORMS, ACTIVATION_USAGE, WRITTEN_NORMS
from saap_jax.estimation.base import Statistic
from saap_jax.estimation.blocks import BLOCK_CHANGE
from saap_jax.estimation.gates import GATE_GRADIENT
from saap_jax.estimation.gram import GRAM
from saap_jax.estimation.hessian import GATE_HESSIAN
from saap_jax.estimation.objectives import OBJECTIVES
from saap_jax.estimation.reconstruction import SECOND_MOMENT
from saap_jax.estimation.squares import SQUARED_WEIGHT_GRADIENT
from saap_jax.estimation.taylor import WEIGHT_GRADIENT

_GRADIENTS = WEIGHT_GRADIENT, SQUARED_WEIGHT_GRADIENT, GATE_GRADIENT

STATISTICS: dict[str, Statistic] = {
    statistic.name: statistic
    for statistic in (
        WEIGHT_GRADIENT,
        SQUARED_WEIGHT_GRADIENT,
        GATE_GRADIENT,
        GATE_HESSIAN,
        ACTIVATION_MOMENTS,
        ACTIVATION_NORMS,
        ACTIVATION_USAGE,
        WRITTEN_NORMS,
        BLOCK_CHANGE,
        GRAM,
        SECOND_MOMENT,
        *(each.of_objective(objective) for objective in OBJECTIVES[1:] for each in _GRADIENTS),
    )
}
"""Name in files and messages -> statistic."""
