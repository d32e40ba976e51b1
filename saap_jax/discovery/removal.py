"""Parameters without some units of a traced structure, and whether the model's code takes them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from saap_jax.discovery.trace import AxisMember, Traced, TracedStructure, parameter_paths


def retrace(function: Callable[..., Any], traced: Traced, structure: TracedStructure, params: Any, *inputs: Any) -> str:
    """Trace the function again with parameters that lack one unit; return the error it raises, "" if none.

    An error means that the code holds a size of the structure as a number, or takes it from another array's shape.
    """
    smaller = iter(removed_shapes(traced, structure).values())
    leaves, tree = jax.tree.flatten(params)
    less = tree.unflatten([jax.ShapeDtypeStruct(next(smaller), leaf.dtype) for leaf in leaves])
    try:
        after = jax.eval_shape(function, less, *inputs)
    except Exception as error:  # whatever the user's code says about sizes
        return f"{type(error).__name__}: {error}"
    shapes = [[leaf.shape for leaf in jax.tree.leaves(out)] for out in (traced.results, after)]
    return "" if shapes[0] == shapes[1] else f"the outputs change their shapes from {shapes[0]} to {shapes[1]}"


def removed_shapes(
    traced: Traced, structure: TracedStructure, members: Sequence[AxisMember] | None = None
) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter when one unit of a structure (of some of its members) is removed."""
    shapes = {path: list(shape) for path, shape in traced.shapes.items()}
    for member in structure.members if members is None else members:
        gone = {index for place in member.places for index in place.indices(0)}
        shapes[member.path][member.axis] -= len(gone)
    return {path: tuple(shape) for path, shape in shapes.items()}


def keep_units(structure: TracedStructure, keep: Bool[np.ndarray, "*_copied _units"], params: Any) -> Any:
    """Return the parameters with the kept units of a structure only.

    `keep` has the shape of the structure's gates.

    Raises:
        ValueError: `keep` has another shape, the structure is pinned, or copies would keep different numbers of units.
    """
    shape = (*structure.copied, structure.units)
    if not structure.prunable:
        raise ValueError(f"structure {structure.name} is pinned: it {structure.pinned[0]}")
    if keep.shape != shape:
        raise ValueError(f"keep of {structure.name}: expected shape {shape}, got {keep.shape}")
    counts = set(keep.sum(-1).ravel().tolist())
    if len(counts) > 1:
        raise ValueError(f"keep of {structure.name}: expected as many units in each copy, got {sorted(counts)}")
    leaves, tree = jax.tree.flatten(params)
    values = dict(zip(parameter_paths(params), leaves, strict=True))
    for member in structure.members:
        values[member.path] = _taken(values[member.path], member, keep)
    return tree.unflatten(list(values.values()))


def _taken(value: Array, member: AxisMember, keep: Bool[np.ndarray, "*_copied _units"]) -> Array:
    kept = np.ones((*keep.shape[:-1], value.shape[member.axis]), bool)
    for place in member.places:
        for unit in range(keep.shape[-1]):
            kept[..., place.indices(unit)] &= keep[..., unit, None]
    indices = np.nonzero(kept)[-1].reshape(*kept.shape[:-1], kept.reshape(-1, kept.shape[-1])[0].sum())
    if indices.ndim == 1:
        return jnp.take(value, indices, axis=member.axis)
    axes = (*member.shared, member.axis)
    indices = indices.transpose(np.argsort(axes))
    ordered = dict(zip(sorted(axes), indices.shape, strict=True))
    indices = indices.reshape([ordered.get(axis, 1) for axis in range(value.ndim)])
    return jnp.take_along_axis(value, jnp.asarray(indices), axis=member.axis)
