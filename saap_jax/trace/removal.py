"""Parameters without some units of a traced structure, and whether the model's code takes them."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool

from saap_jax.trace.trace import AxisMember, Traced, TracedStructure, parameter_paths


def retrace(function: Callable[..., Any], traced: Traced, structure: TracedStructure, params: Any, *inputs: Any) -> str:
    """Trace the function again with parameters that lack one unit; return the error it raises, "" if none.

    An error means that the code holds a size of the structure as a number, or takes it from another array's shape.
    """
    smaller = iter(removed_shapes(traced, structure).values())
    leaves, tree = jax.tree.flatten(params)
    less = tree.unflatten([jax.ShapeDtypeStruct(next(smaller), jnp.result_type(leaf)) for leaf in leaves])
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


def kept_shapes(traced: Traced, keep: Mapping[str, Bool[np.ndarray, "*_copied _units"]]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter that `keep_units` returns."""
    axes = traced.follower.notes.axes
    removed = {traced.atoms[name]: lost_units(kept) for name, kept in keep.items()}
    return {path: tuple(axes.resized(node, removed) for node in layout) for path, layout in traced.layouts.items()}


def lost_units(keep: Bool[np.ndarray, "*_copied _units"]) -> int:
    """Return how many units each copy loses."""
    return keep.shape[-1] - int(keep.sum()) // math.prod(keep.shape[:-1])


def keep_units(traced: Traced, keep: Mapping[str, Bool[np.ndarray, "*_copied _units"]], params: Any) -> Any:
    """Return the parameters with the kept units only; `keep` has the names and shapes of gates.

    Arrays lie on the devices as the given ones do, but for axes that their new sizes do not divide: each device holds
    those whole.

    Raises:
        ValueError: a keep-set has no structure or another shape, its structure is pinned, copies keep different numbers
            of units, or each of two structures is copied along the other.
    """
    structures = {structure.name: structure for structure in traced.structures}
    leaves, tree = jax.tree.flatten(params)
    given = dict(zip(parameter_paths(params), leaves, strict=True))
    values = dict(given)
    masks: dict[str, dict[int, np.ndarray]] = {}
    for name, kept in keep.items():
        if name not in structures:
            raise ValueError(f"keep: expected names of structures {sorted(structures)}, got {name}")
        check_keep(structures[name], kept)
        for member in structures[name].members:
            axes = masks.setdefault(member.path, {})
            mask = _mask(values[member.path].shape, member, kept)
            axes[member.axis] = axes.get(member.axis, True) & mask
    for path, axes in masks.items():
        while axes:
            # an axis along which the units of another are chosen goes after that one
            last = [axis for axis in axes if all(axes[other].shape[axis] == 1 for other in axes if other != axis)]
            if not last:
                raise ValueError(
                    f"keep of {path}: expected units chosen along one of the axes {sorted(axes)}, got each"
                )
            values[path] = _taken(values[path], last[0], axes.pop(last[0]))
        values[path] = like(values[path], given[path])
    return tree.unflatten(list(values.values()))


def like(value: Array | np.ndarray, given: Any) -> Any:
    """Return an array as another one is: of numpy, or dealt out to devices in the same way where that divides it."""
    if isinstance(given, np.ndarray):
        return np.asarray(value)
    sharding = getattr(given, "sharding", None)
    if isinstance(sharding, NamedSharding):
        return jax.device_put(value, dividing(sharding, value.shape))
    return value


def dividing(sharding: NamedSharding, shape: Sequence[int]) -> NamedSharding:
    """Return a sharding without the axes of the mesh that do not divide an array of a shape."""
    sizes = dict(sharding.mesh.shape)
    spec = []
    for size, names in zip(shape, [*sharding.spec, *[None] * len(shape)], strict=False):
        count = math.prod(sizes[name] for name in ((names,) if isinstance(names, str) else names or ()))
        spec.append(names if size % count == 0 else None)
    return NamedSharding(sharding.mesh, PartitionSpec(*spec), memory_kind=sharding.memory_kind)


def check_keep(structure: TracedStructure, keep: Bool[np.ndarray, "*_copied _units"]) -> None:
    """Raise ValueError unless `keep` names the units of a prunable structure, as many in each copy."""
    shape = (*structure.copied, structure.units)
    if not structure.prunable:
        raise ValueError(f"structure {structure.name} is pinned: it {structure.pinned[0]}")
    if keep.shape != shape:
        raise ValueError(f"keep of {structure.name}: expected shape {shape}, got {keep.shape}")
    counts = set(keep.sum(-1).ravel().tolist())
    if len(counts) > 1:
        raise ValueError(f"keep of {structure.name}: expected as many units in each copy, got {sorted(counts)}")


def _mask(shape: tuple[int, ...], member: AxisMember, keep: Bool[np.ndarray, "*_copied _units"]) -> np.ndarray:
    """Return what a member keeps along its axis; other axes than those of the copies have size 1."""
    kept = np.ones((*keep.shape[:-1], shape[member.axis]), bool)
    for place in member.places:
        for unit in range(keep.shape[-1]):
            kept[..., place.indices(unit)] &= keep[..., unit, None]
    axes = (*member.shared, member.axis)
    return kept.transpose(np.argsort(axes)).reshape([n if axis in axes else 1 for axis, n in enumerate(shape)])


def _taken(value: Array | np.ndarray, axis: int, mask: np.ndarray) -> Array | np.ndarray:
    last = np.moveaxis(mask, axis, -1)
    indices = np.nonzero(last)[-1].reshape(*last.shape[:-1], last.reshape(-1, last.shape[-1])[0].sum())
    places = np.moveaxis(indices, -1, axis)
    if isinstance(value, np.ndarray):
        return np.take_along_axis(value, places, axis)
    if _on_host(value):  # numpy compiles nothing, where jax does for every shape
        return jnp.asarray(np.take_along_axis(np.asarray(value), places, axis))
    return jnp.take_along_axis(value, jnp.asarray(places), axis=axis)


def _on_host(value: Array) -> bool:
    """Say whether numpy sees an array as it is, and what is made of it comes to lie where it lies."""
    if isinstance(value, Tracer) or not value.is_fully_addressable:
        return False
    default = jnp.asarray(0).devices()
    return value.devices() == default and {device.platform for device in default} == {"cpu"}
