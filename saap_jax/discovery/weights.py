"""Weights seen unit by unit, of our models and of traced ones: what formulas of estimators are applied to."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from saap_jax.discovery.tracing.trace import AxisMember, TracedStructure, parameter_paths
from saap_jax.llama.model import Llama
from saap_jax.llama.segments import existing_units
from saap_jax.types import Keep


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class TracedWeights:
    """Parameters of a traced model (or a tree of the same shapes, such as their gradients) and the structures of it."""

    structures: tuple[TracedStructure, ...]
    """Those that are scored."""
    values: dict[str, Any]
    """Each array by its path."""

    @classmethod
    def of(cls, structures: tuple[TracedStructure, ...], params: Any) -> "TracedWeights":
        """Return the weights of a pytree of parameters."""
        return cls(structures, dict(zip(parameter_paths(params), jax.tree.leaves(params), strict=True)))

    def view(self, structure: TracedStructure, member: AxisMember) -> Shaped[Array, "copies units rest"]:
        """Return a member of a structure with its copies first and its units second, the rest in a row.

        What lies on both of two axes of a parameter that belong to one structure is in the views of both.
        """
        value = jnp.asarray(self.values[member.path])
        first = (*member.shared, member.axis)
        moved = jnp.moveaxis(value, first, range(len(first)))
        places = [
            list(dict.fromkeys(i for place in member.places for i in place.indices(unit)))
            for unit in range(structure.units)
        ]
        taken = jnp.take(moved, np.asarray(places, np.int32), axis=len(member.shared))
        return taken.reshape(structure.copies, structure.units, -1)

    def tree_flatten(self) -> tuple[tuple[dict[str, Any]], tuple[TracedStructure, ...]]:
        """Return the arrays, and what is static."""
        return (self.values,), self.structures

    @classmethod
    def tree_unflatten(cls, structures: tuple[TracedStructure, ...], children: tuple[Any, ...]) -> "TracedWeights":
        """Undo `tree_flatten`."""
        return cls(structures, *children)


Weights = Llama | TracedWeights
"""What estimators score."""


def units_of(weights: Weights) -> Keep:
    """Return which units there are, `[layers, units]` a structure; of a traced model `[copies, units]`, all True."""
    if isinstance(weights, TracedWeights):
        return {each.name: np.ones((each.copies, each.units), bool) for each in weights.structures}
    return existing_units(weights.runs)


def traced_costs(structures: tuple[TracedStructure, ...]) -> dict[str, np.ndarray]:
    """Return the parameters that one unit takes with it, `[copies]` int64, by structure."""
    return {each.name: np.full(each.copies, each.parameters_per_unit, np.int64) for each in structures}
