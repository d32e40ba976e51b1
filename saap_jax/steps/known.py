"""The package's own steps: importing this registers them."""

from saap_jax.steps.allocation import log, ranking, rounds, softmax, uniform
from saap_jax.steps.limits import Within
from saap_jax.steps.refinement import evolve, layerwise, learn, shape
from saap_jax.steps.repair import bias, blended, least_squares, scales
from saap_jax.steps.score import score

__all__ = [
    "Within", "bias", "blended", "evolve", "layerwise", "learn", "least_squares", "log", "ranking", "rounds", "scales",
    "score", "shape", "softmax", "uniform",
]  # fmt: skip
