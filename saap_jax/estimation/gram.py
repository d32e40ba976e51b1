"""Second moments of what enters the output matrices, for compensation: observed in the pass only when asked for."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Gram(NamedTuple):
    """Weighted means over all tokens of a sub-block's activations a, flat: a channel has one, a head head_dim.

    A token weighs w = 1/(mean x² + ε), with x the residual stream behind the sub-block. Row 0 of the first axis is of
    the text that least squares is fitted on, row 1 of what is held out; both are divided by the tokens of all of it.
    """

    product: dict[str, Float[Array, "2 layers coordinates coordinates"]]
    """Of w a aᵀ."""
    mean: dict[str, Float[Array, "2 layers coordinates"]]
    """Of w a."""
    weight: dict[str, Float[Array, "2 layers"]]
    """Of w."""


def token_weights(
    behind: Float[Array, "batch seq embed"], mask: Bool[Array, "batch seq"], norm_eps: float
) -> Float[Array, "batch seq"]:
    """Return w = 1/(mean x² + ε) of each token, 0 of padding: whatever reads the stream divides it by its RMS."""
    return mask.astype(behind.dtype) / (jnp.mean(jnp.square(behind), axis=-1) + norm_eps)


def gram_sums(
    active: Float[Array, "batch seq coordinates"], weights: Float[Array, "batch seq"]
) -> tuple[Float[Array, "coordinates coordinates"], Float[Array, "coordinates"], Float[Array, ""]]:
    """Return Σ w a aᵀ, Σ w a and Σ w over the tokens of a microbatch."""
    weighted = active * weights[..., None]
    product = jnp.einsum("btc,bte->ce", weighted, active)
    return product, jnp.sum(weighted, axis=(0, 1)), jnp.sum(weights)
