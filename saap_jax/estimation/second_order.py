"""Second-order Taylor estimators on weights (LLM-Pruner, arXiv:2305.11627, equation 5, element-wise).

Removing a unit's weights w changes the loss by ∂wᵀw - ½ wᵀHw up to sign and O(‖w‖³). H is replaced by the diagonal of
the empirical Fisher information, F_k = (1/N) Σ_n (∂_n w_k)² with ∂_n the gradient of example n's mean loss. Deviations:
∂w is the gradient of the mean loss over all tokens, which LLM-Pruner takes over one batch of equally long examples
(the same, then); units are scored from all calibration examples, LLM-Pruner from 10.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from saap_jax.discovery.weights import Weights
from saap_jax.estimation.base import Estimator, Reduction, Statistics, score_matrices
from saap_jax.estimation.squares import SQUARED_WEIGHT_GRADIENT
from saap_jax.estimation.taylor import WEIGHT_GRADIENT
from saap_jax.types import Scores


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


def taylor_element_second(*, reduction: Reduction = "sum") -> Estimator:
    """Score a unit by the reduction over its matrices M of Σ_{k∈M} |w_k ∂w_k - ½ w_k² F_k|.

    Source: LLM-Pruner, `param_mix`.
    """

    def score(statistics: Statistics, params: Weights) -> Scores:
        gradient = statistics.of(WEIGHT_GRADIENT)
        fisher = statistics.of(SQUARED_WEIGHT_GRADIENT)
        return score_matrices(element_wise_second, params, gradient, fisher, reduction=reduction)

    return Estimator(frozenset({WEIGHT_GRADIENT, SQUARED_WEIGHT_GRADIENT}), score)


def fisher(*, reduction: Reduction = "sum") -> Estimator:
    """Score a unit by the reduction over its matrices M of Σ_{k∈M} w_k² F_k.

    Source: LLM-Pruner, `param_second`.
    """

    def score(statistics: Statistics, params: Weights) -> Scores:
        squares = statistics.of(SQUARED_WEIGHT_GRADIENT)
        return score_matrices(fisher_weighted, params, squares, reduction=reduction)

    return Estimator(frozenset({SQUARED_WEIGHT_GRADIENT}), score)
