"""Second-order Taylor estimators on weights (LLM-Pruner, arXiv:2305.11627, equation 5, element-wise).

Removing a unit's weights w changes the loss by ∂wᵀw - ½ wᵀHw up to sign and O(‖w‖³). H is replaced by the diagonal of
the empirical Fisher information, F_k = (1/N) Σ_n (∂_n w_k)² with ∂_n the gradient of example n's mean loss. Deviations:
∂w is the gradient of the mean loss over all tokens, which LLM-Pruner takes over one batch of equally long examples
(the same, then); units are scored from all calibration examples, LLM-Pruner from 10.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from saap_jax.estimation.base import Estimator, Reduction, Statistics, score_matrices
from saap_jax.estimation.squares import SQUARED_WEIGHT_GRADIENT
from saap_jax.estimation.taylor import WEIGHT_GRADIENT
from saap_jax.structures.weights import Weights
from saap_jax.types import Objective, Scores


def element_wise_second(
    weight: Float[Array, "layers units rest"],
    gradient: Float[Array, "layers units rest"],
    fisher: Float[Array, "layers units rest"],
) -> Float[Array, "layers units"]:
    """Σ_k |w_k ∂w_k - ½ w_k² F_k| over a unit's part of one matrix."""
    return jnp.sum(jnp.abs(weight * gradient - 0.5 * jnp.square(weight) * fisher), axis=-1)


def fisher_weighted(
    weight: Float[Array, "layers units rest"], fisher: Float[Array, "layers units rest"]
) -> Float[Array, "layers units"]:
    """Σ_k w_k² F_k over a unit's part of one matrix."""
    return jnp.sum(jnp.square(weight) * fisher, axis=-1)


def taylor_element_second(*, reduction: Reduction = "sum", objective: Objective = "loss") -> Estimator:
    """Score a unit by the reduction over its matrices M of Σ_{k∈M} |w_k ∂w_k - ½ w_k² F_k|.

    Source: LLM-Pruner, `param_mix`. Gradients are of the loss, or of another objective (`estimation.objectives`).
    """
    first, second = WEIGHT_GRADIENT.of_objective(objective), SQUARED_WEIGHT_GRADIENT.of_objective(objective)

    def score(statistics: Statistics, params: Weights) -> Scores:
        gradient, fisher = statistics.of(first), statistics.of(second)
        return score_matrices(element_wise_second, params, gradient, fisher, reduction=reduction)

    return Estimator(frozenset({first, second}), score)


def fisher(*, reduction: Reduction = "sum", objective: Objective = "loss") -> Estimator:
    """Score a unit by the reduction over its matrices M of Σ_{k∈M} w_k² F_k.

    Source: LLM-Pruner, `param_second`. With `objective="sampled"` F is the Fisher information itself, estimated by one
    draw a token (`estimation.objectives`).
    """
    of_squares = SQUARED_WEIGHT_GRADIENT.of_objective(objective)

    def score(statistics: Statistics, params: Weights) -> Scores:
        squares = statistics.of(of_squares)
        return score_matrices(fisher_weighted, params, squares, reduction=reduction)

    return Estimator(frozenset({of_squares}), score)
