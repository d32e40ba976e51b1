"""Estimators on activations: how large, or how variable, a unit's contribution to the residual stream is."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from saap_jax.estimation.base import Estimator, Moments, Statistic, Statistics, score_writers
from saap_jax.llama.model import Llama
from saap_jax.types import Scores


def weighted_magnitude(
    weight: Float[Array, "layers units coordinates embed"], square: Float[Array, "layers units coordinates"]
) -> Float[Array, "layers units"]:
    """Σ |W| · √(mean a²) over a unit's writing weights."""
    return jnp.einsum("lucd,luc->lu", jnp.abs(weight), jnp.sqrt(square))


def weighted_variance(
    weight: Float[Array, "layers units coordinates embed"],
    mean: Float[Array, "layers units coordinates"],
    square: Float[Array, "layers units coordinates"],
) -> Float[Array, "layers units"]:
    """Σ_c Var(a_c) · ‖W_out[c]‖² over a unit's coordinates c."""
    variance = jnp.maximum(square - jnp.square(mean), 0)
    return jnp.einsum("lucd,luc->lu", jnp.square(weight), variance)


def wanda() -> Estimator:
    """Score a unit by Σ over its writing weights of |W| · √(mean a²).

    Source: Wanda (arXiv:2306.11695), equation 1, summed over the weights of a unit; the paper removes single weights.
    """

    def score(statistics: Statistics, params: Llama) -> Scores:
        moments: Moments = statistics.of(Statistic.ACTIVATION_MOMENTS)
        return score_writers(weighted_magnitude, params, moments.square)

    return Estimator(frozenset({Statistic.ACTIVATION_MOMENTS}), score)


def fluctuation() -> Estimator:
    """Score a unit by Var(a) · ‖W_out‖², summed over its coordinates.

    Source: FLAP (arXiv:2312.11983), WIFV, equation 3. Deviations: the population variance over all tokens (FLAP uses
    the sample variance of batches), and a head's coordinates are summed (FLAP averages them: a constant factor).
    """

    def score(statistics: Statistics, params: Llama) -> Scores:
        moments: Moments = statistics.of(Statistic.ACTIVATION_MOMENTS)
        return score_writers(weighted_variance, params, moments.mean, moments.square)

    return Estimator(frozenset({Statistic.ACTIVATION_MOMENTS}), score)
