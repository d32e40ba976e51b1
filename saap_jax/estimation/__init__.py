"""Stage 2a: how important is each unit? Statistics from one calibration pass, formulas on top."""

from saap_jax.estimation.accumulate import merge
from saap_jax.estimation.base import (
    Curvature,
    Estimator,
    GateHessian,
    Moments,
    Statistic,
    Statistics,
    score_matrices,
    score_writers,
)
from saap_jax.estimation.observe import curvature_of, observe, score, union_of_needs
from saap_jax.estimation.registry import ESTIMATORS, make_estimator, make_estimators, register
from saap_jax.estimation.storage import load_statistics, save_statistics

__all__ = [
    "ESTIMATORS",
    "Curvature",
    "Estimator",
    "GateHessian",
    "Moments",
    "Statistic",
    "Statistics",
    "curvature_of",
    "load_statistics",
    "make_estimator",
    "make_estimators",
    "merge",
    "observe",
    "register",
    "save_statistics",
    "score",
    "score_matrices",
    "score_writers",
    "union_of_needs",
]
