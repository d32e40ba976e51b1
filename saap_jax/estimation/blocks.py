"""Estimators of whole sub-blocks: how much attention or MLP of a layer turns the residual stream.

All units of a sub-block get its score: they are tied, and depth pruning removes the sub-block as one.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from saap_jax.estimation.accumulate import mean_over, statistics_dtype
from saap_jax.estimation.base import Estimator, Plan, Point, Statistic, Statistics
from saap_jax.llama.model import Llama
from saap_jax.structures.weights import Weights, units_of
from saap_jax.types import STRUCTURES, Scores


def turn(before: Float[Array, "batch seq embed"], after: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq"]:
    """1 - cos(before, after) of each token, in [0, 2]; computed as ½ ‖before/‖before‖ - after/‖after‖‖².

    The residual stream turns by little, and 1 - cos would lose the digits that tell the blocks apart. A zero vector
    has no direction and counts as a zero unit vector.
    """
    return 0.5 * jnp.sum(jnp.square(_direction(before) - _direction(after)), axis=-1)


def _direction(x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.where(norm > 0, norm, 1)


def _layers(model: Llama, plan: Plan) -> dict[str, Array]:
    layers = sum(segment.length for segment in model.segments)
    return {name: jnp.zeros(layers, statistics_dtype(model)) for name in (*STRUCTURES, "layer")}


def _turns(point: Point) -> dict[str, Float[Array, ""]]:
    """Sum how far a sub-block turns the stream, and behind the MLP how far the whole layer does."""
    name, _, side = point.name.rpartition("_")
    if side != "out":
        return {}
    turns = {name: turn(point.layer[f"{name}_in"], point.values)}
    if name == "mlp":
        turns["layer"] = turn(point.layer["attention_in"], point.values)
    return {key: jnp.sum(point.mask.astype(angles.dtype) * angles) for key, angles in turns.items()}


BLOCK_CHANGE = Statistic(
    name="block_change",
    init=_layers,
    source="activations",
    observe=_turns,
    accumulation=mean_over("seen"),
    axes=lambda path: ("layers",),
)
"""Mean over all tokens of 1 - cos(in, out) of the residual stream: {"attention", "mlp", "layer": [layers]}."""


def block_influence(*, granularity: str = "sub_block") -> Estimator:
    """Score every unit by 1 - mean cos(in, out) of its sub-block, or of its whole layer.

    `sub_block`: the residual stream before and after attention, and before and after the MLP; `layer`: before and
    after both, one score for attention and MLP. Scores are in [0, 2]. Source: ShortGPT (arXiv:2403.03853), equation 1,
    which has `layer` only.
    """
    if granularity not in ("sub_block", "layer"):
        raise ValueError(f"block_influence: expected granularity 'sub_block' or 'layer', got {granularity!r}")

    def score(statistics: Statistics, params: Weights) -> Scores:
        change = statistics.of(BLOCK_CHANGE)
        return {
            name: jnp.where(jnp.asarray(exists), change["layer" if granularity == "layer" else name][:, None], jnp.nan)
            for name, exists in units_of(params).items()
        }

    return Estimator(frozenset({BLOCK_CHANGE}), score)
