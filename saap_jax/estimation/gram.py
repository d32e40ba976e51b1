"""Second moments of what enters the output matrices, for compensation: observed in the pass only when asked for."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from saap_jax.estimation.base import Plan, Point, Statistic, mean_over, statistics_dtype
from saap_jax.llama.model import Llama
from saap_jax.types import HELD_OUT


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
    """Weigh each token by w = 1/(mean x² + ε), 0 of padding: whatever reads the stream divides it by its RMS."""
    return mask.astype(behind.dtype) / (jnp.mean(jnp.square(behind), axis=-1) + norm_eps)


def gram_sums(
    active: Float[Array, "batch seq coordinates"], weights: Float[Array, "batch seq"]
) -> tuple[Float[Array, "coordinates coordinates"], Float[Array, "coordinates"], Float[Array, ""]]:
    """Sum w a aᵀ, w a and w over the tokens of a microbatch."""
    rows = active.reshape(math.prod(active.shape[:2]), active.shape[2])
    weighted = rows * weights.reshape(-1, 1)
    return weighted.T @ rows, jnp.sum(weighted, axis=0), jnp.sum(weights)


def widest_coordinates(model: Llama) -> dict[str, int]:
    """Count the coordinates that enter the output matrix of a sub-block, in the widest layer."""
    return {
        "attention": max(math.prod(segment.attention.output.shape[1:4]) for segment in model.segments),
        "mlp": max(segment.widths.mlp_channels for segment in model.segments),
    }


def flat_units(point: Point, structure: str) -> Float[Array, "batch seq coordinates"]:
    """Show the gated activations of a structure, those of a unit in a row."""
    units = point.units(structure)
    return units.reshape(*units.shape[:2], math.prod(units.shape[2:]))


def _zeros(model: Llama, plan: Plan) -> Gram:
    layers, dtype = sum(segment.length for segment in model.segments), statistics_dtype(model)
    widest = widest_coordinates(model)
    return Gram(
        {name: jnp.zeros((2, layers, width, width), dtype) for name, width in widest.items()},
        {name: jnp.zeros((2, layers, width), dtype) for name, width in widest.items()},
        {name: jnp.zeros((2, layers), dtype) for name in widest},
    )


def _sums(point: Point) -> dict[str, Any]:
    """Sum behind a sub-block, where the weights of the tokens are known."""
    name, _, side = point.name.rpartition("_")
    if side != "out":
        return {}
    return {name: gram_sums(flat_units(point, name), token_weights(point.values, point.mask, point.norm_eps))}


def _add(total: Array, new: Array, position: Int[Array, ""], size: int) -> Array:
    """Add to the part that a microbatch belongs to: every `HELD_OUT`-th is held out."""
    held = ((position // size) % HELD_OUT == HELD_OUT - 1).astype(jnp.int32)
    return total.at[held].add(new.astype(total.dtype))


GRAM = Statistic(
    name="gram",
    init=_zeros,
    source="activations",
    observe=_sums,
    kind=Gram,
    accumulation=mean_over("seen")._replace(add=_add),
    axes=lambda path: ("parts", "layers"),
)
"""`Gram` of the gated activations: two matrices a layer, of all coordinates squared. No estimator needs it."""
