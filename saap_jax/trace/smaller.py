"""The program of a cut model: the traced one on smaller parameters, whatever sizes stand in the model's code.

A Linen module checks the shapes that it was made with, and a flat projection is reshaped by a number of heads that the
code holds: neither can be traced with fewer units. The jaxpr can: its sizes are known as expressions of the structures'
units, and an equation that holds a size gets the new one. Sizes that entered as values (the divisor of a mean, the
scale of attention scores) stay those of the dense model, as they do when units are masked.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import JaxprEqn
from jax.sharding import NamedSharding
from jaxtyping import Bool

from saap_jax.trace.interpret import Changes, Path, evaluate
from saap_jax.trace.removal import dividing, lost_units
from saap_jax.trace.rules import shape_of
from saap_jax.trace.trace import Traced


def smaller(traced: Traced, keep: dict[str, Bool[np.ndarray, "*_copied _units"]]) -> Callable[..., Any]:
    """Return `function(params, *inputs)` for parameters that `removal.keep_units` cut by the same keep-sets.

    Raises:
        ValueError: a name that is no structure of the program; in the function: parameters that do not fit together.
    """
    missing = keep.keys() - traced.atoms.keys()
    if missing:
        raise ValueError(f"keep: expected names of structures {sorted(traced.atoms)}, got {sorted(missing)}")
    removed = {traced.atoms[name]: lost_units(kept) for name, kept in keep.items()}
    tree = jax.tree.structure(traced.results)

    def resize(path: Path, eqn: JaxprEqn, values: Sequence[Any]) -> dict[str, Any]:
        return _resized(traced, removed, path, eqn, values)

    def function(params: Any, *inputs: Any) -> Any:
        flat = jax.tree.leaves((params, inputs))
        results = evaluate(traced.program.jaxpr, traced.program.consts, flat, (), Changes([], resize))
        return jax.tree.unflatten(tree, results)

    return function


def _resized(traced: Traced, removed: dict[int, int], path: Path, eqn: JaxprEqn, values: Sequence[Any]) -> dict:
    """Return the parameters of an equation with the sizes that they hold brought up to date."""
    axes, name = traced.follower.notes.axes, eqn.primitive.name
    parameters = dict(eqn.primitive.get_bind_params(eqn.params))
    outs = [tuple(axes.resized(node, removed) for node in layout) for layout in traced.follower.layouts[path]]
    if name in ("broadcast_in_dim", "reshape"):
        _check(path, eqn, values[0].shape, outs[0])
    if name in ("broadcast_in_dim", "iota", "rng_uniform"):
        parameters["shape"] = outs[0]
    elif name == "reshape":
        parameters["new_sizes"] = outs[0]
    elif name in ("random_bits", "rng_bit_generator"):
        parameters["shape"] = outs[-1][len(outs[-1]) - len(parameters["shape"]) :]
    elif name == "dynamic_slice":
        whole = zip(_sizes(eqn, values), outs[0], strict=True)
        _check(path, eqn, values[0].shape, tuple(out if size == was else now for (now, was, size), out in whole))
        parameters["slice_sizes"] = outs[0]
    elif name == "gather":
        parameters["slice_sizes"] = tuple(now if size == was else size for now, was, size in _sizes(eqn, values))
    elif name == "slice":
        taken = [[axes.resized(node, removed) for node in nodes] for nodes in traced.follower.notes.slices[path]]
        _check(path, eqn, values[0].shape, tuple(size for _, _, size in taken))
        parameters["start_indices"] = tuple(start for start, _, _ in taken)
        parameters["limit_indices"] = tuple(min(start + part, size) for start, part, size in taken)
    elif name == "split":
        parameters["sizes"] = tuple(out[parameters["axis"]] for out in outs)
    elif name == "sharding_constraint" and isinstance(parameters["sharding"], NamedSharding):
        parameters["sharding"] = dividing(parameters["sharding"], values[0].shape)
    elif name == "conv_general_dilated" and parameters["feature_group_count"] > 1:
        features = parameters["dimension_numbers"].lhs_spec[1]
        if parameters["feature_group_count"] == shape_of(eqn.invars[0])[features]:
            parameters["feature_group_count"] = values[0].shape[features]
    return parameters


def _sizes(eqn: JaxprEqn, values: Sequence[Any]) -> list[tuple[int, int, int]]:
    """Return the present size, the traced size and the traced slice's size of each axis of the operand."""
    return list(zip(values[0].shape, shape_of(eqn.invars[0]), eqn.params["slice_sizes"], strict=True))


def _check(path: Path, eqn: JaxprEqn, shape: tuple[int, ...], out: tuple[int, ...]) -> None:
    """Raise ValueError unless an array can be reshaped or broadcast so, or is one that can be sliced so."""
    fits = math.prod(shape) == math.prod(out) if eqn.primitive.name == "reshape" else tuple(shape) == out
    if "broadcast_dimensions" in eqn.params:
        places = zip(shape, eqn.params["broadcast_dimensions"], strict=True)
        fits = all(size in (1, out[axis]) for size, axis in places)
    if not fits:
        name = eqn.primitive.name
        raise ValueError(f"equation {path}, {name}: expected an array for shape {out}, got {shape}")
