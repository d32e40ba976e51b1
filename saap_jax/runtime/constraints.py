"""What a sharded forward and backward pass holds where: constraints on activations and weights, layer by layer.

Left to itself, the partitioner may split the residual stream by its width, because that is how weights are spread, and
then sums activations over all devices after every product. What is wanted is the other way round: examples stay on
their devices, a layer's weights are gathered for as long as the layer is worked on, and its gradients are summed and
split again (fully sharded data parallelism, as ZeRO stage 3, arXiv:1910.02054).

The mesh is the one in force (`jax.set_mesh`, entered by `on_mesh_of`); without one nothing here does anything.
"""

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import linear_call
from jax.lax import with_sharding_constraint
from jax.sharding import PartitionSpec
from jaxtyping import Array

from saap_jax.config.mesh import BATCH, EXPERT, WEIGHTS
from saap_jax.runtime.mesh import batch_axes, mesh_of

GATHERED = "gathered weights"
"""Name of a layer's gathered weights, which are not kept for the backward pass: they would be the whole model."""


def on_mesh_of(tree: Any) -> contextlib.AbstractContextManager:
    """Make a context in which programs know the mesh of a model, or of a part of one, if any."""
    mesh = mesh_of(tree)
    if mesh is not None and mesh.size > 1:
        return jax.set_mesh(mesh)
    return contextlib.nullcontext()


def _sizes() -> Mapping[str, int]:
    """Read the sizes of the axes of the mesh in force."""
    return jax.sharding.get_abstract_mesh().shape


def in_force() -> bool:
    """Say whether there is a mesh that anything could be spread over."""
    return math.prod(_sizes().values()) > 1


def by_example(x: Array) -> Array:
    """Hold an activation `[batch, ...]` where its examples are: split by the batch, and by nothing else.

    On every device where the batch cannot be split evenly.
    """
    if not in_force():
        return x
    return with_sharding_constraint(x, PartitionSpec(batch_parts(len(x)) or None, *(None,) * (x.ndim - 1)))


def batch_parts(examples: int) -> tuple[str, ...]:
    """Name the axes of the mesh that a batch of so many examples is split over; none where they do not divide it."""
    return batch_axes(_sizes(), examples)


def batch_shards(examples: int) -> int:
    """Count the equal parts, each on devices of its own, that a batch of so many examples is split into."""
    return math.prod(_sizes()[axis] for axis in batch_parts(examples))


def vocab_shards(vocab: int) -> int:
    """Count the parts of the vocabulary on devices, by the default rules."""
    shards = _sizes().get("tensor", 1)
    return 1 if vocab % shards else shards


def unit_axes(axes: tuple[str, ...], width: int) -> tuple[str, ...]:
    """Find the axes of the mesh for the units of a matrix, by the default rules.

    None where they do not divide the flat `width` of the units. `axes` are the logical axes of the matrix.
    """
    sizes = _sizes()
    parts = tuple(axis for axis in ((EXPERT, "tensor") if "experts" in axes else ("tensor",)) if sizes.get(axis, 1) > 1)
    if width % math.prod(sizes[axis] for axis in parts):
        return ()
    return parts


def expert_shards(axes: tuple[str, ...], units: int) -> int:
    """Count the parts of the units of a matrix where the mesh has an axis for experts; else 1."""
    parts = unit_axes(axes, units)
    if EXPERT in parts:
        return math.prod(_sizes()[axis] for axis in parts)
    return 1


def sum_of_shards(own: Array, embed: int) -> Array:
    """Sum over the first axis of `[shards, ...]`, split along its axis `embed` as the weights are.

    Row s is the sum of the examples of part s of `batch_shards`: parts are exchanged, and each device adds up its part
    of those of the others.
    """
    sizes = _sizes()
    if len(own) == 1 or own.shape[1 + embed] % sizes.get(WEIGHTS, 1):
        return own.sum(axis=0)
    spec: list[Any] = [tuple(axis for axis in BATCH if axis != WEIGHTS and sizes.get(axis, 1) > 1) or None]
    spec += [PartitionSpec.UNCONSTRAINED] * (own.ndim - 1)
    spec[1 + embed] = WEIGHTS if WEIGHTS in sizes else None
    return with_sharding_constraint(own, PartitionSpec(*spec)).sum(axis=0)


def gathered(tree: Any) -> Any:
    """Gather the parameters of a layer along the axis that weights are split by; their gradients stay split."""
    if not in_force():
        return tree
    return jax.tree.map(_gathered, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _gathered(variable: Any) -> Any:
    axes = getattr(variable, "axes", ())
    value = None
    if isinstance(variable, nnx.Variable):
        value = variable[...]
    split = next((axis for axis in ("embed", "outputs") if axis in axes), None)
    if value is None or split is None:
        return variable
    place = axes.index(split) - len(axes)  # from the end: a scan took `layers`
    shards = _sizes().get(WEIGHTS)

    def constrained(x: Array, axis: str | None) -> Array:
        spec: list[Any] = [PartitionSpec.UNCONSTRAINED] * x.ndim
        spec[place] = axis
        return with_sharding_constraint(x, PartitionSpec(*spec))

    if not jnp.issubdtype(value.dtype, jnp.inexact):
        return variable.replace(checkpoint_name(constrained(value, None), GATHERED))
    back = None
    if shards is not None and value.shape[place] % shards == 0:
        back = WEIGHTS
    whole = linear_call(lambda _, x: constrained(x, None), lambda _, x: constrained(x, back), (), value)
    return variable.replace(checkpoint_name(whole, GATHERED))
