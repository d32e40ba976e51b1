"""How statistics are kept: allocated, added to by microbatches, divided at the end, merged with those of other text.

Sums are float32 (float64 for a float64 model). Nothing is allocated for a statistic that nobody needs; the largest,
mean and squared weight gradients, take one float32 a parameter of the layers each.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Int

from saap_jax.estimation.base import Accumulation, Plan, Statistic, Statistics, wide
from saap_jax.llama.model import Llama, at_least_float32
from saap_jax.llama.product import is_matrix
from saap_jax.llama.segments import existing_units
from saap_jax.runtime.finite import leaves_by_path
from saap_jax.types import Gates


def statistics_dtype(model: Llama) -> Any:
    """The type of sums and statistics: float32, or float64 for a float64 model."""
    return at_least_float32(model.embedding.dtype)


# --- zeros -----------------------------------------------------------------------------------------


def like_matrices(model: Llama, plan: Plan) -> Llama:
    """Return zeros like the matrices of the layers, spread over the same devices, and a single 0 for each other one."""

    def zeros(variable: nnx.Variable) -> nnx.Variable:
        shape, place = (variable.shape, _sharding(variable.get_value())) if is_matrix(variable) else ((), None)
        return variable.replace(jnp.zeros(shape, at_least_float32(variable.dtype), device=place))

    return jax.tree.map(zeros, model, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def matrices_of(gradient: Llama) -> Llama:
    """Return a tree like the model's with its matrices of the layers, float32 at least, as `like_matrices` makes one.

    What else a backward pass could make, the gradient of the embedding above all, is then never computed.
    """

    def kept(variable: nnx.Variable) -> nnx.Variable:
        return variable.replace(wide(variable[...]) if is_matrix(variable) else jnp.zeros((), jnp.float32))

    return jax.tree.map(kept, gradient, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _sharding(array: Any) -> Any:
    """Return the sharding of a parameter that is spread over devices; None of any other, also of an abstract one."""
    place = getattr(array, "sharding", None)
    return place if isinstance(place, NamedSharding) else None


def like_units(model: Llama, before: tuple[int, ...] = (), after: dict[str, int] | None = None) -> Gates:
    """Return zeros `[*before, layers, units]`, with `after[structure]` numbers a unit if given."""
    return {
        name: jnp.zeros(before + units.shape + (() if after is None else (after[name],)), statistics_dtype(model))
        for name, units in existing_units(model.segments).items()
    }


# --- sums, and what becomes of them ----------------------------------------------------------------


def mean_over(per: Literal["examples", "tokens", "seen"]) -> Accumulation:
    """Return the accumulation of a sum that becomes a mean over a count of `Statistics`."""

    def merge(a: Array, b: Array, first: Statistics, second: Statistics) -> Array:
        weights = [int(getattr(part, per)) for part in (first, second)]
        share = weights[0] / sum(weights)
        return share * a + (1 - share) * b

    return Accumulation(
        add=lambda total, new, position, size: total + new.astype(total.dtype),
        finish=lambda total, counts: total / int(getattr(counts, per)),
        merge=merge,
    )


def _put(total: Array, new: Array, position: Int[Array, ""], size: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(total, wide(new), position, axis=0)


ROWS = Accumulation(
    add=_put,
    finish=lambda total, counts: total[: int(counts.examples)],
    merge=lambda a, b, first, second: jnp.concatenate([a, b]),
)
"""A row an example, kept as it is; padding is cut off at the end."""


def merge(first: Statistics, second: Statistics) -> Statistics:
    """Return the statistics of a text from those of its two parts, observed alike on the same model.

    A mean is weighted by what it is a mean over: tokens, or examples; rows of examples follow each other.

    Raises:
        ValueError: the parts hold different statistics, or of different shapes (another model, other probes).
    """
    if set(first.values) != set(second.values):
        names = [", ".join(statistic.name for statistic in sorted(part.values)) or "none" for part in (first, second)]
        raise ValueError(f"merge: expected the same statistics in both parts, got {names[0]} and {names[1]}")
    return Statistics(
        examples=first.examples + second.examples,
        tokens=first.tokens + second.tokens,
        losses=jnp.concatenate([first.losses, second.losses]),
        values={statistic: _merge_one(statistic, first, second) for statistic in first.values},
    )


def _merge_one(statistic: Statistic, first: Statistics, second: Statistics) -> Any:
    parts = [part.values[statistic] for part in (first, second)]
    shapes = [
        [x.shape[statistic.axes(path)[:1] == ("examples",) :] for path, x in leaves_by_path(part).items()]
        for part in parts
    ]
    if jax.tree.structure(parts[0]) != jax.tree.structure(parts[1]) or shapes[0] != shapes[1]:
        raise ValueError(
            f"merge: statistic {statistic.name} has other shapes in the second part than in the first; "
            "observe both on the same model with the same options"
        )
    return jax.tree.map(lambda a, b: statistic.accumulation.merge(a, b, first, second), *parts)
