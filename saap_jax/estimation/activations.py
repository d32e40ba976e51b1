"""Estimators on activations: how large, or how variable, a unit's contribution to the residual stream is."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from saap_jax.discovery.weights import Weights, units_of
from saap_jax.estimation.base import Estimator, Moments, Statistic, Statistics, score_writers
from saap_jax.types import Scores

MULTIPLES: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
"""Multiples of the layer's RMS at which usage is counted, so that each of them can be scored from one pass."""


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
    return jnp.sum(coordinate_variance(weight, mean, square), axis=-1)


def coordinate_variance(
    weight: Float[Array, "layers units coordinates embed"],
    mean: Float[Array, "layers units coordinates"],
    square: Float[Array, "layers units coordinates"],
) -> Float[Array, "layers units coordinates"]:
    """Var(a_c) · ‖W_out[c]‖² of each coordinate c."""
    return jnp.maximum(square - jnp.square(mean), 0) * jnp.sum(jnp.square(weight), axis=-1)


def standardized_variance(
    weight: Float[Array, "layers units coordinates embed"],
    mean: Float[Array, "layers units coordinates"],
    square: Float[Array, "layers units coordinates"],
) -> Float[Array, "layers units"]:
    """Mean over a unit's coordinates c of (f_c - mean f) / std f, with f_c = Var(a_c) · ‖W_out[c]‖².

    Mean and std (divisor n - 1) are those of all n coordinates of a layer.
    """
    f = coordinate_variance(weight, mean, square)
    center = jnp.nanmean(f, axis=(1, 2), keepdims=True)
    spread = jnp.nanstd(f, axis=(1, 2), keepdims=True, ddof=1)
    return jnp.mean(jnp.where(spread > 0, (f - center) / spread, jnp.where(jnp.isnan(f), f, 0)), axis=-1)


def used(activation: Float[Array, "batch seq units coordinates"], multiple: float) -> Bool[Array, "batch seq units"]:
    """Return where r_u > multiple · √(mean_v r_v²), with r_u = √(mean_c a_{u,c}²) on one token.

    r_u is |a_u| for a channel, and the RMS of its coordinates for an attention unit; the right side is the RMS of the
    structure's whole activation in the layer on the same token. A token is compared with itself only, so neither the
    batch nor the rest of the text matters.
    """
    square = jnp.mean(jnp.square(activation), axis=-1)
    return square > multiple**2 * jnp.mean(square, axis=-1, keepdims=True)


def wanda() -> Estimator:
    """Score a unit by Σ over its writing weights of |W| · √(mean a²).

    Source: Wanda (arXiv:2306.11695), equation 1, summed over the weights of a unit; the paper removes single weights.
    """

    def score(statistics: Statistics, params: Weights) -> Scores:
        moments: Moments = statistics.of(Statistic.ACTIVATION_MOMENTS)
        return score_writers(weighted_magnitude, params, moments.square)

    return Estimator(frozenset({Statistic.ACTIVATION_MOMENTS}), score)


def fluctuation(*, standardize: bool = False) -> Estimator:
    """Score a unit by Var(a) · ‖W_out‖², summed over its coordinates.

    With `standardize` the coordinates of each layer and structure get mean 0 and deviation 1 first, and their mean is
    the score: what FLAP ranks over all layers (allocation `global`, `rank_by="score"`). Such scores have either sign.

    Source: FLAP (arXiv:2312.11983), WIFV, equation 3. Deviations: the population variance over all tokens (FLAP uses
    the sample variance of batches), and without `standardize` a head's coordinates are summed (FLAP averages them: a
    constant factor).
    """
    formula = standardized_variance if standardize else weighted_variance

    def score(statistics: Statistics, params: Weights) -> Scores:
        moments: Moments = statistics.of(Statistic.ACTIVATION_MOMENTS)
        return score_writers(formula, params, moments.mean, moments.square)

    return Estimator(frozenset({Statistic.ACTIVATION_MOMENTS}), score)


def activation_frequency(*, multiple: int | float = 1.0) -> Estimator:
    """Score a unit by the share of tokens on which it is `used`: how often, not how much. In [0, 1].

    `multiple` is one of `MULTIPLES`: the statistic is counted at these only. No unit of a layer with n of them exceeds
    √n times the RMS, so a multiple of 2 or more says nothing about layers with few attention units.

    Raises:
        ValueError: another multiple.
    """
    if multiple not in MULTIPLES:
        expected = ", ".join(f"{m:g}" for m in MULTIPLES)
        raise ValueError(f"activation_frequency: expected multiple to be one of {expected}, got {multiple}")
    column = MULTIPLES.index(multiple)

    def score(statistics: Statistics, params: Weights) -> Scores:
        usage = statistics.of(Statistic.ACTIVATION_USAGE)
        exists = units_of(params)
        return {n: jnp.where(jnp.asarray(exists[n]), share[..., column], jnp.nan) for n, share in usage.items()}

    return Estimator(frozenset({Statistic.ACTIVATION_USAGE}), score)
