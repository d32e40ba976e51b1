"""Stage 2a: how important is each unit? Statistics from one calibration pass, formulas on top."""

from saap_jax.estimation.base import Estimator, Moments, Statistic, Statistics, score_matrices, score_writers
from saap_jax.estimation.observe import observe, score, union_of_needs
from saap_jax.estimation.registry import ESTIMATORS, make_estimator, make_estimators

__all__ = [
    "ESTIMATORS",
    "Estimator",
    "Moments",
    "Statistic",
    "Statistics",
    "make_estimator",
    "make_estimators",
    "observe",
    "score",
    "score_matrices",
    "score_writers",
    "union_of_needs",
]
