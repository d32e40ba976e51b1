"""Weights seen unit by unit: what formulas of estimators are applied to."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from saap_jax.llama.model import Llama
from saap_jax.llama.segments import existing_units, segment_bounds
from saap_jax.structures.discovery import Structure, channel_view, discover, unit_view
from saap_jax.types import Keep


@runtime_checkable
class Weights(Protocol):
    """Parameters of a model, or a tree of the same shapes such as their gradients, seen unit by unit.

    Matrices come by segment: a stretch of layers of equal shapes. A traced model has one segment, whose layers are the
    copies of a structure.
    """

    @property
    def model(self) -> Llama | None:
        """The model of ours that has these weights; None: a traced one, whose layers are not told apart."""
        ...

    @property
    def units(self) -> Keep:
        """Which units there are, `[layers, units]` a structure."""
        ...

    @property
    def heads(self) -> frozenset[str]:
        """The structures whose units are heads of attention."""
        ...

    def like(self, tree: Any) -> "Weights":
        """Show a tree of the same shapes in the same way."""
        ...

    def without(self, keep: Keep) -> "Weights":
        """Put zeros where removed units lie in the matrices of other structures, so that these look as if cut."""
        ...

    def matrices(self, structure: str, channels: bool = False) -> list[list[Shaped[Array, "layers units *rest"]]]:
        """Show the matrices of a structure: by segment, one for each member, in the order of the parameters.

        Args:
            channels: keep what meets the residual stream apart, `[layers, units, channels, embed]`.

        Raises:
            ValueError: `channels` of a traced model, whose axes have no names.
        """
        ...

    def writing(self, structure: str) -> list[tuple[slice, Shaped[Array, "layers units coordinates embed"]]]:
        """Show what each coordinate of a unit is multiplied with where it acts, by segment and its layers.

        In an MLP that is the down projection, of heads the output projection.

        Raises:
            ValueError: a structure of a traced model whose units act nowhere where that is known.
        """
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LlamaWeights:
    """`Weights` of a model of ours."""

    model: Llama
    structures: Mapping[str, Structure] | None = dataclasses.field(default=None, metadata={"static": True})
    """Of a tree of gradients, which has no numbers for norms: those of the model."""

    @property
    def units(self) -> Keep:
        return existing_units(self.model.segments)

    @property
    def heads(self) -> frozenset[str]:
        return frozenset({"attention"})

    def like(self, tree: Any) -> "LlamaWeights":
        return LlamaWeights(tree, self._structures())

    def without(self, keep: Keep) -> "LlamaWeights":
        return self  # each matrix belongs to one structure

    def matrices(self, structure: str, channels: bool = False) -> list[list[Float[Array, "layers units *rest"]]]:
        view = channel_view if channels else unit_view
        members = self._structures()[structure].members
        return [[view(segment, member) for member in members] for segment in self.model.segments]

    def writing(self, structure: str) -> list[tuple[slice, Float[Array, "layers units coordinates embed"]]]:
        writer = self._structures()[structure].writer
        embed = self.model.embedding.shape[-1]
        found = []
        for segment, bounds in zip(self.model.segments, segment_bounds(self.model.segments), strict=True):
            flat = unit_view(segment, writer)
            layers, units, rest = flat.shape
            found.append((slice(bounds.start, bounds.stop), jnp.reshape(flat, (layers, units, rest // embed, embed))))
        return found

    def _structures(self) -> Mapping[str, Structure]:
        if self.structures is None:
            return discover(self.model)
        return self.structures


def weights_of(model: Any) -> Weights:
    """Show a model of ours unit by unit; `Weights` stay as they are."""
    if isinstance(model, Llama):
        return LlamaWeights(model)
    return model
