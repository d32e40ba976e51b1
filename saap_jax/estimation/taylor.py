"""First-order Taylor estimators on weights (LLM-Pruner, arXiv:2305.11627, equations 3 to 5).

Removing a unit's weights w changes the loss by about ∂wᵀw. Here ∂w is the gradient of the mean loss over all tokens;
LLM-Pruner sums over the calibration set, which scales every score alike.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from saap_jax.estimation.accumulate import like_matrices, matrices_of, mean_over
from saap_jax.estimation.base import Estimator, Reduction, Statistic, Statistics, score_matrices
from saap_jax.structures.weights import Weights
from saap_jax.types import STRUCTURES, Objective, Scores

WEIGHT_GRADIENT = Statistic(
    name="weight_gradient",
    init=like_matrices,
    source="weights",
    contribute=matrices_of,
    accumulation=mean_over("tokens"),
    axes=lambda path: (),
)
"""Gradient of the mean loss over all tokens: a tree like the model's, of the matrices of its layers; each other
parameter has a single 0. A statistic of your own whose source is `weights` is shown the gradient of all parameters."""


def vector_wise(
    weight: Float[Array, "layers units rest"], gradient: Float[Array, "layers units rest"]
) -> Float[Array, "layers units"]:
    """|Σ_k w_k ∂w_k| over a unit's part of one matrix: the absolute value after the sum."""
    return jnp.abs(jnp.sum(weight * gradient, axis=-1))


def channel_wise(
    weight: Float[Array, "layers units channels embed"], gradient: Float[Array, "layers units channels embed"]
) -> Float[Array, "layers units"]:
    """Σ_c |Σ_{k∈c} w_k ∂w_k| over the channels c of a unit's part of one matrix."""
    return jnp.sum(jnp.abs(jnp.sum(weight * gradient, axis=-1)), axis=-1)


def element_wise(
    weight: Float[Array, "layers units rest"], gradient: Float[Array, "layers units rest"]
) -> Float[Array, "layers units"]:
    """Σ_k |w_k ∂w_k| over a unit's part of one matrix: the absolute value before the sum."""
    return jnp.sum(jnp.abs(weight * gradient), axis=-1)


def taylor_vector(
    *,
    reduction: Reduction = "sum",
    within: Literal["matrix", "channel"] = "matrix",
    objective: Objective = "loss",
) -> Estimator:
    """Score a unit by the reduction over its matrices M of |Σ_{k∈M} w_k ∂w_k|, equation 3.

    `within="channel"` takes the absolute value of each channel of the unit's part of a matrix (a row of query, key or
    value, a column of output, each over the residual stream) and adds these up, which is LLM-Pruner's code,
    `vectorize`. An MLP channel is one channel in each matrix, so only attention differs. ∂w is the gradient of the mean
    loss, or of another objective (`estimation.objectives`).
    """
    of_weights = WEIGHT_GRADIENT.of_objective(objective)

    def score(statistics: Statistics, params: Weights) -> Scores:
        formula, channels = (channel_wise, True) if within == "channel" else (vector_wise, False)
        return score_matrices(formula, params, statistics.of(of_weights), reduction=reduction, channels=channels)

    return Estimator(frozenset({of_weights}), score)


def taylor_element(
    *, reduction: Reduction = "sum", within: Literal["unit", "layer"] = "unit", objective: Objective = "loss"
) -> Estimator:
    """Score a unit by the reduction over its matrices M of Σ_{k∈M} |w_k ∂w_k|.

    `within="layer"` gives all units of a layer the sum over all of them, attention and MLP together: whole layers, as
    Shortened LLaMA's Taylor criterion ranks them (arXiv:2402.02834). ∂w is as in `taylor_vector`.
    """
    of_weights = WEIGHT_GRADIENT.of_objective(objective)

    def score(statistics: Statistics, params: Weights) -> Scores:
        scores = score_matrices(element_wise, params, statistics.of(of_weights), reduction=reduction)
        return _of_layers(scores) if within == "layer" else scores

    return Estimator(frozenset({of_weights}), score)


def _of_layers(scores: Scores) -> Scores:
    """Return for each unit the sum of its layer's scores."""
    if set(scores) != set(STRUCTURES):
        raise ValueError("taylor_element: expected within 'unit' for a traced model, which has no layers, got 'layer'")
    total = jnp.sum(jnp.stack([jnp.nansum(each, axis=1) for each in scores.values()]), axis=0)
    return {name: jnp.where(jnp.isnan(each), jnp.nan, total[:, None]) for name, each in scores.items()}
