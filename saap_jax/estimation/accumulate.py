"""How statistics are kept: allocated, added to by microbatches, divided at the end, merged with those of other text.

Every statistic but the gate gradients is a sum that becomes a mean; the table below says over what. Sums are float32
(float64 for a float64 model). Nothing is allocated for a statistic that nobody needs; the largest, mean and squared
weight gradients, take one float32 a parameter each.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Int

from saap_jax.config.method import HELD_OUT
from saap_jax.estimation.activations import MULTIPLES
from saap_jax.estimation.base import Curvature, GateHessian, Moments, Statistic, Statistics, wide
from saap_jax.estimation.gram import Gram
from saap_jax.estimation.squares import is_matrix
from saap_jax.llama.model import Llama, at_least_float32
from saap_jax.llama.segments import existing_units
from saap_jax.types import STRUCTURES, Gates


class Plan(NamedTuple):
    """What the shapes of the statistics depend on beside the model."""

    examples: int
    """Rows of the gate gradients, padding included."""
    curvature: Curvature = Curvature()


class Accumulator(NamedTuple):
    """How one statistic is kept."""

    init: Callable[[Llama, Plan], Any]
    """Zeros, from shapes alone."""
    per: Literal["examples", "tokens", "seen"] | None
    """The count in `Statistics` that the sum is divided by; None: a row an example, kept as it is."""


def _like_parameters(model: Llama, plan: Plan) -> Llama:
    """Zeros where the parameters are: spread over the same devices."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, at_least_float32(x.dtype), device=_place(x)), model)


def _like_matrices(model: Llama, plan: Plan) -> Llama:
    """Zeros like the matrices of the layers, and a single one for each other parameter: see `squares.parts`."""
    return jax.tree.map(
        lambda variable: variable if is_matrix(variable) else variable.replace(jnp.zeros((), variable.dtype)),
        _like_parameters(model, plan),
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )


def _place(array: Any) -> Any:
    """Return the sharding of a parameter that is spread over devices; None of any other, also of an abstract one."""
    place = getattr(array, "sharding", None)
    return place if isinstance(place, NamedSharding) else None


def _like_units(model: Llama, before: tuple[int, ...] = (), after: dict[str, int] | None = None) -> Gates:
    """Return zeros `[*before, layers, units]`, with `after[structure]` numbers a unit if given."""
    return {
        name: jnp.zeros(before + units.shape + (() if after is None else (after[name],)), statistics_dtype(model))
        for name, units in existing_units(model.runs).items()
    }


def _moments(model: Llama, plan: Plan) -> Moments:
    q_per_kv, head_dim = (max(run.attention.output.shape[axis] for run in model.runs) for axis in (2, 3))
    coordinates = {"attention": q_per_kv * head_dim, "mlp": 1}
    return Moments(_like_units(model, after=coordinates), _like_units(model, after=coordinates))


def _gram(model: Llama, plan: Plan) -> Gram:
    layers, dtype = sum(run.length for run in model.runs), statistics_dtype(model)
    widest = {
        "attention": max(math.prod(run.attention.output.shape[1:4]) for run in model.runs),
        "mlp": max(run.mlp.down.shape[1] for run in model.runs),
    }
    return Gram(
        {name: jnp.zeros((2, layers, width, width), dtype) for name, width in widest.items()},
        {name: jnp.zeros((2, layers, width), dtype) for name, width in widest.items()},
        {name: jnp.zeros((2, layers), dtype) for name in widest},
    )


def _block_change(model: Llama, plan: Plan) -> dict[str, Array]:
    layers = sum(run.length for run in model.runs)
    return {name: jnp.zeros(layers, statistics_dtype(model)) for name in (*STRUCTURES, "layer")}


def _gate_hessian(model: Llama, plan: Plan) -> GateHessian:
    gates, probed = _like_units(model), _like_units(model, (plan.curvature.probes,))
    if plan.curvature.attention == "exact":
        return GateHessian(gates, {"attention": jnp.zeros_like(gates["attention"])}, {"mlp": probed["mlp"]})
    return GateHessian(gates, {}, probed)


ACCUMULATORS: dict[Statistic, Accumulator] = {
    Statistic.WEIGHT_GRADIENT: Accumulator(_like_parameters, per="tokens"),
    Statistic.SQUARED_WEIGHT_GRADIENT: Accumulator(_like_matrices, per="examples"),
    Statistic.GATE_GRADIENT: Accumulator(lambda model, plan: _like_units(model, (plan.examples,)), per=None),
    Statistic.ACTIVATION_MOMENTS: Accumulator(_moments, per="seen"),
    Statistic.ACTIVATION_USAGE: Accumulator(
        lambda model, plan: _like_units(model, after=dict.fromkeys(STRUCTURES, len(MULTIPLES))), per="seen"
    ),
    Statistic.BLOCK_CHANGE: Accumulator(_block_change, per="seen"),
    Statistic.GRAM: Accumulator(_gram, per="seen"),
    Statistic.GATE_HESSIAN: Accumulator(_gate_hessian, per="tokens"),
}


def statistics_dtype(model: Llama) -> Any:
    """The type of sums and statistics: float32, or float64 for a float64 model."""
    return at_least_float32(model.embedding.dtype)


def add(statistic: Statistic, total: Any, new: Any, position: Int[Array, ""], size: int) -> Any:
    """Add what a microbatch of `size` examples shows, whose first has index `position` in the pass."""

    def one(a: Array, b: Array) -> Array:
        if statistic is Statistic.GRAM:
            held = ((position // size) % HELD_OUT == HELD_OUT - 1).astype(jnp.int32)
            return a.at[held].add(b.astype(a.dtype))
        if ACCUMULATORS[statistic].per is None:
            return jax.lax.dynamic_update_slice_in_dim(a, wide(b), position, axis=0)
        return a + b.astype(a.dtype)

    return jax.tree.map(one, total, new)


def finish(statistic: Statistic, total: Any, counts: Statistics) -> Any:
    """Turn sums into means, and cut the padding off rows."""
    per = ACCUMULATORS[statistic].per
    if per is None:
        return jax.tree.map(lambda rows: rows[: int(counts.examples)], total)
    return jax.tree.map(lambda x: x / int(getattr(counts, per)), total)


def merge(first: Statistics, second: Statistics) -> Statistics:
    """Return the statistics of a text from those of its two parts, observed alike on the same model.

    A mean is weighted by what it is a mean over: tokens, or examples; rows of examples follow each other.

    Raises:
        ValueError: the parts hold different statistics, or of different shapes (another model, other probes).
    """
    if set(first.values) != set(second.values):
        names = [", ".join(sorted(part.values)) or "none" for part in (first, second)]
        raise ValueError(f"merge: expected the same statistics in both parts, got {names[0]} and {names[1]}")
    return Statistics(
        examples=first.examples + second.examples,
        tokens=first.tokens + second.tokens,
        losses=jnp.concatenate([first.losses, second.losses]),
        values={statistic: _merge_one(statistic, first, second) for statistic in first.values},
    )


def _merge_one(statistic: Statistic, first: Statistics, second: Statistics) -> Any:
    per = ACCUMULATORS[statistic].per
    parts = [part.values[statistic] for part in (first, second)]
    shapes = [[x.shape[1:] if per is None else x.shape for x in jax.tree.leaves(part)] for part in parts]
    if jax.tree.structure(parts[0]) != jax.tree.structure(parts[1]) or shapes[0] != shapes[1]:
        raise ValueError(
            f"merge: statistic {statistic.value} has other shapes in the second part than in the first; "
            "observe both on the same model with the same options"
        )
    if per is None:
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *parts)
    weights = [int(getattr(part, per)) for part in (first, second)]
    share = weights[0] / sum(weights)
    return jax.tree.map(lambda a, b: share * a + (1 - share) * b, *parts)
