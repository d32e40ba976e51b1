"""Parameters of a traced model, seen unit by unit: `structures.weights.Weights` of its structures."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from saap_jax.trace.cut import kept_along
from saap_jax.trace.trace import AxisMember, TracedStructure
from saap_jax.trace.writers import Contraction, Writer
from saap_jax.types import Keep


@functools.partial(jax.tree_util.register_dataclass, data_fields=("values",), meta_fields=("structures", "acting"))
@dataclasses.dataclass(frozen=True)
class TracedWeights:
    """Parameters of a traced model (or a tree of the same shapes, such as their gradients) and the structures of it."""

    structures: tuple[TracedStructure, ...]
    """Those that are scored."""
    values: dict[str, Any]
    """Each array by its path."""
    acting: Callable[[str], Sequence[Contraction]] | None = None
    """Where the units of a structure act, by name; one object for the weights and for trees of their shapes."""

    @property
    def model(self) -> None:
        return None

    @property
    def units(self) -> Keep:
        return {each.name: np.ones((each.copies, each.units), bool) for each in self.structures}

    @property
    def heads(self) -> frozenset[str]:
        return frozenset(each.name for each in self.structures if each.role == "heads")

    def like(self, tree: Any) -> "TracedWeights":
        if isinstance(tree, TracedWeights):
            return tree
        return dataclasses.replace(self, values=tree)

    def view(self, structure: TracedStructure, member: AxisMember) -> Shaped[Array, "copies units rest"]:
        """Show a member of a structure with its copies first and its units second, the rest in a row.

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

    def without(self, keep: Keep) -> "TracedWeights":
        values = dict(self.values)
        for structure in self.structures:
            kept = keep[structure.name].reshape(*structure.copied, structure.units)
            for member in structure.members:
                if member.path in values:
                    there = kept_along(values[member.path].shape, member, kept)
                    values[member.path] = jnp.where(there, values[member.path], 0)
        return dataclasses.replace(self, values=values)

    def matrices(self, structure: str, channels: bool = False) -> list[list[Shaped[Array, "copies units rest"]]]:
        """Show the members of a structure, vectors included."""
        if channels:
            raise ValueError(
                "estimator: expected within='matrix' for a traced model, which does not tell the channels of a unit "
                "apart, got 'channel'"
            )
        own = self._named(structure)
        return [[self.view(own, member) for member in own.members]]

    def writing(self, structure: str) -> list[tuple[slice, Shaped[Array, "copies units coordinates out"]]]:
        """Show what each coordinate of a unit is multiplied with where its units act, all places side by side.

        Places of fewer outputs are filled up with zeros. Where units meet no parameter it is a single 1: what they meet
        is part of the statistics then.
        """
        found = ()
        if self.acting is not None:
            found = self.acting(structure)
        if not found:
            raise ValueError(f"{structure}: expected a contraction at which its units act, found none")
        own = self._named(structure)
        parts = []
        for each in found:
            places = each.places(own)
            matrix = jnp.ones((*places.shape, 1))
            if isinstance(each, Writer):
                matrices = each.matrices(self.values[each.path])
                matrix = matrices.reshape(-1, matrices.shape[-1])[places]
            parts.append(matrix)
        widest = max(part.shape[-1] for part in parts)
        filled = [jnp.pad(part, [(0, 0)] * 3 + [(0, widest - part.shape[-1])]) for part in parts]
        return [(slice(None), jnp.concatenate(filled, axis=2))]

    def _named(self, structure: str) -> TracedStructure:
        return next(each for each in self.structures if each.name == structure)
