"""Parameters without some units of traced structures, and the program on them, at any shape of its inputs.

A Linen module checks the shapes that it was made with, and a flat projection is reshaped by a number of heads that the
code holds: neither can be traced with fewer units. The jaxpr can: its sizes are known as expressions of the structures'
units, and an equation that holds a size gets the new one. Sizes that entered as values (the divisor of a mean, the
scale of attention scores) stay those of the dense model, as they do when units are masked.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import JaxprEqn
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool

from saap_jax.trace.interpret import Changes, evaluate
from saap_jax.trace.jaxpr import shape_of
from saap_jax.trace.program import Path
from saap_jax.trace.trace import AxisMember, Traced, by_path

KeptUnits = Bool[np.ndarray, "*_copied _units"]

# --- parameters ------------------------------------------------------------------------------------


def _removed(traced: Traced, keep: Mapping[str, KeptUnits]) -> dict[int, int]:
    """Count the units that each copy loses, by the atom of the structure."""
    return {traced.atoms[name]: int((~kept).sum()) // math.prod(kept.shape[:-1]) for name, kept in keep.items()}


def kept_shapes(traced: Traced, keep: Mapping[str, KeptUnits]) -> dict[str, tuple[int, ...]]:
    """Tell the shape of each parameter that `keep_units` makes."""
    axes = traced.follower.notes.axes
    removed = _removed(traced, keep)
    return {path: tuple(axes.resized(node, removed) for node in layout) for path, layout in traced.layouts.items()}


def keep_units(traced: Traced, keep: Mapping[str, KeptUnits], params: Any) -> Any:
    """Cut the parameters down to the kept units; `keep` has the names and shapes of gates.

    Arrays lie on the devices as the given ones do, but for axes that their new sizes do not divide: each device holds
    those whole.

    Raises:
        ValueError: a keep-set has no structure or another shape, its structure is pinned, copies keep different numbers
            of units, or each of two structures is copied along the other.
    """
    structures = {structure.name: structure for structure in traced.structures}
    given = by_path(params)
    values = dict(given)
    masks: dict[str, dict[int, np.ndarray]] = {}
    for name, kept in keep.items():
        if name not in structures:
            raise ValueError(f"keep: expected names of structures {sorted(structures)}, got {name}")
        structure = structures[name]
        shape = (*structure.copied, structure.units)
        if not structure.prunable:
            raise ValueError(f"structure {name} is pinned: it {structure.pinned[0]}")
        if kept.shape != shape:
            raise ValueError(f"keep of {name}: expected shape {shape}, got {kept.shape}")
        if len(counts := set(kept.sum(-1).ravel().tolist())) > 1:
            raise ValueError(f"keep of {name}: expected as many units in each copy, got {sorted(counts)}")
        for member in structure.members:
            axes = masks.setdefault(member.path, {})
            axes[member.axis] = axes.get(member.axis, True) & kept_along(values[member.path].shape, member, kept)
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
    return jax.tree.structure(params).unflatten(values.values())


def kept_along(shape: tuple[int, ...], member: AxisMember, keep: KeptUnits) -> np.ndarray:
    """Tell what a member keeps along its axis; other axes than those of the copies have size 1."""
    kept = np.ones((*keep.shape[:-1], shape[member.axis]), bool)
    for place in member.places:
        for unit in range(keep.shape[-1]):
            kept[..., place.indices(unit)] &= keep[..., unit, None]
    axes = (*member.shared, member.axis)
    return kept.transpose(np.argsort(axes)).reshape([n if axis in axes else 1 for axis, n in enumerate(shape)])


def _taken(value: Array | np.ndarray, axis: int, mask: np.ndarray) -> Array | np.ndarray:
    """Take what a mask keeps along an axis; of what lies on the host by numpy, which compiles nothing."""
    last = np.moveaxis(mask, axis, -1)
    indices = np.nonzero(last)[-1].reshape(*last.shape[:-1], last.reshape(-1, last.shape[-1])[0].sum())
    places = np.moveaxis(indices, -1, axis)
    if isinstance(value, np.ndarray):
        return np.take_along_axis(value, places, axis)
    if not isinstance(value, Tracer) and value.is_fully_addressable:
        default = jnp.asarray(0).devices()  # where what is made of it comes to lie
        if value.devices() == default and {device.platform for device in default} == {"cpu"}:
            return jnp.asarray(np.take_along_axis(np.asarray(value), places, axis))
    return jnp.take_along_axis(value, jnp.asarray(places), axis=axis)


def like(value: Array | np.ndarray, given: Any) -> Any:
    """Make an array as another one is: of numpy, or dealt out to devices in the same way where that divides it."""
    if isinstance(given, np.ndarray):
        return np.asarray(value)
    sharding = getattr(given, "sharding", None)
    if isinstance(sharding, NamedSharding):
        return jax.device_put(value, _dividing(sharding, value.shape))
    return value


def _dividing(sharding: NamedSharding, shape: Sequence[int]) -> NamedSharding:
    """Leave out the axes of the mesh that do not divide an array of a shape."""
    sizes = dict(sharding.mesh.shape)
    spec = []
    for size, names in zip(shape, [*sharding.spec, *[None] * len(shape)], strict=False):
        count = math.prod(sizes[name] for name in ((names,) if isinstance(names, str) else names or ()))
        spec.append(names if size % count == 0 else None)
    return NamedSharding(sharding.mesh, PartitionSpec(*spec), memory_kind=sharding.memory_kind)


# --- the program -----------------------------------------------------------------------------------


def smaller(traced: Traced, keep: Mapping[str, KeptUnits]) -> Callable[..., Any]:
    """Make `function(params, *inputs)` for parameters that `keep_units` cut by the same keep-sets.

    A custom derivative (`jax.custom_vjp`, `jax.custom_jvp`) stays where all arrays in its call keep their sizes. Others
    hold dense sizes: there the derivative is that of the call's program.

    Raises:
        ValueError: a name that is no structure of the program; in the function: parameters that do not fit together.
    """
    missing = keep.keys() - traced.atoms.keys()
    if missing:
        raise ValueError(f"keep: expected names of structures {sorted(traced.atoms)}, got {sorted(missing)}")
    removed = _removed(traced, keep)
    tree = jax.tree.structure(traced.results)
    axes = traced.follower.notes.axes
    nodes = {path: itertools.chain(*layouts) for path, layouts in traced.follower.layouts.items()}
    resized = [path for path, some in nodes.items() if any(axes.resized(n, removed) != axes.size(n) for n in some)]
    around = {path[:end] for path in resized for end in range(1, len(path) + 1)}

    def resize(path: Path, eqn: JaxprEqn, values: Sequence[Any]) -> dict[str, Any] | None:
        given = zip(values, eqn.invars, strict=True)
        if path not in around and all(np.shape(value) == shape_of(atom) for value, atom in given):
            return None
        return _resized(traced, removed, path, eqn, values)

    def function(params: Any, *inputs: Any) -> Any:
        results, _ = evaluate(traced.program, jax.tree.leaves((params, inputs)), (), Changes(resize=resize))
        return jax.tree.unflatten(tree, results)

    return function


def _resized(traced: Traced, removed: dict[int, int], path: Path, eqn: JaxprEqn, values: Sequence[Any]) -> dict:
    """Bring the sizes that an equation holds up to date."""
    axes = traced.follower.notes.axes
    name = eqn.primitive.name
    parameters = dict(eqn.primitive.get_bind_params(eqn.params))
    outs = [tuple(axes.resized(node, removed) for node in layout) for layout in traced.follower.layouts[path]]
    if name in ("broadcast_in_dim", "reshape"):
        _check(path, eqn, values[0].shape, outs[0])
    if name in ("broadcast_in_dim", "iota"):
        parameters["shape"] = outs[0]
    elif name == "reshape":
        parameters["new_sizes"] = outs[0]
    elif name in ("dynamic_slice", "gather"):
        sizes = list(zip(values[0].shape, shape_of(eqn.invars[0]), parameters["slice_sizes"], strict=True))
        parameters["slice_sizes"] = tuple(now if size == was else size for now, was, size in sizes)
        if name == "dynamic_slice":
            whole = zip(sizes, outs[0], strict=True)
            _check(path, eqn, values[0].shape, tuple(out if size == was else now for (now, was, size), out in whole))
            parameters["slice_sizes"] = outs[0]
    elif name == "slice":
        taken = [[axes.resized(node, removed) for node in nodes] for nodes in traced.follower.notes.slices[path]]
        _check(path, eqn, values[0].shape, tuple(size for _, _, size in taken))
        parameters["start_indices"] = tuple(start for start, _, _ in taken)
        parameters["limit_indices"] = tuple(min(start + part, size) for start, part, size in taken)
    elif name == "split":
        parameters["sizes"] = tuple(out[parameters["axis"]] for out in outs)
    elif name == "sharding_constraint" and isinstance(parameters["sharding"], NamedSharding):
        parameters["sharding"] = _dividing(parameters["sharding"], values[0].shape)
    elif name == "conv_general_dilated" and parameters["feature_group_count"] > 1:
        features = parameters["dimension_numbers"].lhs_spec[1]
        if parameters["feature_group_count"] == shape_of(eqn.invars[0])[features]:
            parameters["feature_group_count"] = values[0].shape[features]
    return parameters


def _check(path: Path, eqn: JaxprEqn, shape: tuple[int, ...], out: tuple[int, ...]) -> None:
    """Refuse an array that cannot be reshaped or broadcast so, or is none that can be sliced so."""
    if eqn.primitive.name == "reshape":
        fits = math.prod(shape) == math.prod(out)
    else:
        fits = tuple(shape) == out
    if "broadcast_dimensions" in eqn.params:
        places = zip(shape, eqn.params["broadcast_dimensions"], strict=True)
        fits = all(size in (1, out[axis]) for size, axis in places)
    if not fits:
        name = eqn.primitive.name
        raise ValueError(f"equation {path}, {name}: expected an array for shape {out}, got {shape}")
