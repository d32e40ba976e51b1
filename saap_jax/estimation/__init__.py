"""Stage 2a: how important is each unit? Statistics from one calibration pass, formulas on top."""

from saap_jax.estimation.activations import (
    ACTIVATION_MOMENTS,
    ACTIVATION_NORMS,
    ACTIVATION_USAGE,
    BLOCK_CHANGE,
    Moments,
    Norms,
)
from saap_jax.estimation.base import (
    Curvature,
    Estimator,
    Statistic,
    Statistics,
    score_matrices,
    score_writers,
)
from saap_jax.estimation.gates import GATE_GRADIENT
from saap_jax.estimation.hessian import GATE_HESSIAN, GateHessian, curvature_of
from saap_jax.estimation.observe import observe, score, union_of_needs
from saap_jax.estimation.reconstruction import SECOND_MOMENT
from saap_jax.estimation.registry import ESTIMATORS, STATISTICS, make_estimator, make_estimators, register
from saap_jax.estimation.squares import SQUARED_WEIGHT_GRADIENT
from saap_jax.estimation.storage import load_statistics, save_statistics
from saap_jax.estimation.taylor import WEIGHT_GRADIENT

__all__ = [
    "ACTIVATION_MOMENTS",
    "ACTIVATION_NORMS",
    "ACTIVATION_USAGE",
    "BLOCK_CHANGE",
    "ESTIMATORS",
    "GATE_GRADIENT",
    "GATE_HESSIAN",
    "SECOND_MOMENT",
    "SQUARED_WEIGHT_GRADIENT",
    "STATISTICS",
    "WEIGHT_GRADIENT",
    "Curvature",
    "Estimator",
    "GateHessian",
    "Moments",
    "Norms",
    "Statistic",
    "Statistics",
    "curvature_of",
    "load_statistics",
    "make_estimator",
    "make_estimators",
    "observe",
    "register",
    "save_statistics",
    "score",
    "score_matrices",
    "score_writers",
    "union_of_needs",
]
