"""Estimators that look at no data."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from saap_jax.config.checks import check_seed
from saap_jax.estimation.base import Estimator, Reduction, Statistics, score_matrices
from saap_jax.structures.weights import Weights, units_of
from saap_jax.types import Scores


def squared_norm(weight: Float[Array, "layers units rest"]) -> Float[Array, "layers units"]:
    """‖w_M‖² of each unit's part of a matrix M."""
    return jnp.sum(jnp.square(weight), axis=-1)


def random(*, seed: int = 0) -> Estimator:
    """Score each unit uniformly in [0, 1), independent of model and data: the floor of every comparison."""
    check_seed("random: seed", seed)

    def score(statistics: Statistics, params: Weights) -> Scores:
        root, scores = jax.random.key(seed), {}
        for index, (name, exists) in enumerate(units_of(params).items()):
            draw = jax.random.uniform(jax.random.fold_in(root, index), exists.shape)
            scores[name] = jnp.where(jnp.asarray(exists), draw, jnp.nan)
        return scores

    return Estimator(frozenset(), score)


def magnitude(*, reduction: Reduction = "sum") -> Estimator:
    """Score a unit by ‖w‖₂ = √(reduction over its matrices M of ‖w_M‖²).

    Source: LLM-Pruner (arXiv:2305.11627), `l2`, which leaves out the root; the ranking is the same.
    """

    def score(statistics: Statistics, params: Weights) -> Scores:
        squares = score_matrices(squared_norm, params, reduction=reduction)
        return {name: jnp.sqrt(square) for name, square in squares.items()}

    return Estimator(frozenset(), score)
