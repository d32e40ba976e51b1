"""Which weights must go together: coupled structures, read off the axis names that the parameters carry.

For any other function of parameters `saap_jax.trace` finds them in the traced program. Two parameter axes are coupled
when no computation of the model can change the size of one without the other. Within a decoder layer those are the axes
that share a prunable name: `mlp` of gate, up and down, or `experts` of these and the router; `kv_heads` of query, key,
value and output, and of the biases of query, key and value where a model has them.
Source: method of LLM-Pruner (arXiv:2305.11627) section 3.1, where the coupling is found by tracing.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from saap_jax.llama.model import DecoderLayer, Llama
from saap_jax.llama.product import Matrix, check_plain, is_parameter
from saap_jax.types import PRUNABLE_AXES


class Member(NamedTuple):
    """One parameter of a structure: its path within the layer, and the position of the unit axis."""

    path: str
    axis: int
    """Position of the unit axis in the stacked parameter (axis 0 is `layers`)."""


@dataclasses.dataclass(frozen=True)
class Structure:
    """A coupled structure: parameters of a layer whose unit axes must be cut together, in every layer of the model."""

    name: str
    axis: str
    members: tuple[Member, ...]
    """The projection back into the residual stream (output, down) comes last."""
    units: tuple[int, ...]
    """Units of each layer."""
    parameters_per_unit: tuple[int, ...]
    """Parameters that one unit of each layer takes with it, all members together."""

    @property
    def parameters(self) -> int:
        """Parameters in the whole structure, all layers."""
        return sum(units * each for units, each in zip(self.units, self.parameters_per_unit, strict=True))

    @property
    def writer(self) -> Member:
        """The member that writes the units' activations into the residual stream."""
        return self.members[-1]


def discover(model: Llama) -> dict[str, Structure]:
    """Find the coupled structures of a model (concrete, traced or abstract) by name.

    >>> {name: structure.units for name, structure in discover(model).items()}
    {'attention': (2, 2), 'mlp': (16, 16)}

    Raises:
        ValueError: a parameter carries no axis names, or two prunable ones, or matrices are not plain floats.
    """
    check_plain(model, "pruning")
    structures = {}
    for axis, name in PRUNABLE_AXES.items():
        if not any(axis in each.axes for segment in model.segments for each in parameters_by_path(segment).values()):
            continue
        layouts = [layout for segment in model.segments for layout in [_layout(segment, axis)] * segment.length]
        members, units, parameters = zip(*layouts, strict=True)
        if len({*members}) > 1:
            raise ValueError(f"structure {name}: expected the same members in every segment, got {layouts}")
        structures[name] = Structure(name, axis, members[0], units, parameters)
    return structures


def _layout(segment: DecoderLayer, axis: str) -> tuple[tuple[Member, ...], int, int]:
    """Find the members, the units a layer and the parameters a unit of the structure on `axis` in one segment."""
    members = []
    units = set()
    each = 0
    for path, parameter in parameters_by_path(segment).items():
        axes = getattr(parameter, "axes", ())
        if len(axes) != len(parameter.shape):
            raise ValueError(f"parameter {path}: expected an axis name a dimension, got {axes} for {parameter.shape}")
        prunable = [name for name in axes if name in PRUNABLE_AXES]
        if len(prunable) > 1:
            raise ValueError(f"parameter {path}: expected at most one prunable axis, got {prunable}")
        if axis in prunable:
            position = axes.index(axis)
            members.append(("embed" in axes[position:], Member(path, position)))
            units.add(parameter.shape[position])
            each += math.prod(parameter.shape[1:position] + parameter.shape[position + 1 :])
    if len(units) != 1:
        raise ValueError(f"axis {axis}: expected one size in all members of a layer, got {sorted(units)}")
    return tuple(member for _, member in sorted(members)), units.pop(), each


def parameters_by_path(tree: Any) -> dict[str, nnx.Variable | Matrix]:
    """Key the parameters of a module by path, such as `mlp/gate`.

    What stands in the place of one (`Matrix`) is there under its path, with the shape and axes of the parameter.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_parameter)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def weight_bytes(model: Any) -> int:
    """Count the bytes of all parameters in memory; a tied unembedding counts once."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model))


def unit_view(segment: Any, member: Member) -> Float[Array, "layers units rest"]:
    """Show a member of one segment (of weights, or of any tree of the same shape) with the unit axis second.

    The remaining axes are flattened in their order, so `rest` of a writing member is (coordinates, embed).
    """
    value = parameters_by_path(segment)[member.path][...]
    moved = jnp.moveaxis(value, member.axis, 1)
    return moved.reshape(*moved.shape[:2], math.prod(moved.shape[2:]))


def channel_view(segment: Any, member: Member) -> Float[Array, "layers units channels embed"]:
    """Show `unit_view` channel by channel: one for each coordinate of a unit, with all that meets the stream there.

    Of a bias, which does not meet it, each number is a channel.
    """
    parameter = parameters_by_path(segment)[member.path]
    moved = jnp.moveaxis(parameter[...], member.axis, 1)
    axes = list(parameter.axes)
    axes.insert(1, axes.pop(member.axis))
    if "embed" in axes:
        moved = jnp.moveaxis(moved, axes.index("embed"), -1)
    else:
        moved = moved[..., None]
    return moved.reshape(*moved.shape[:2], math.prod(moved.shape[2:-1]), moved.shape[-1])


def prunable_parameters(structures: dict[str, Structure]) -> int:
    """Count the parameters that belong to some structure: attention and MLP matrices, and biases of heads.

    >>> prunable_parameters(discover(model))
    1280
    """
    return sum(structure.parameters for structure in structures.values())


def count_parameters(model: Llama) -> int:
    """Count all parameters of a model; a tied unembedding counts once.

    >>> count_parameters(model)
    3368
    """
    return sum(math.prod(parameter.shape) for parameter in parameters_by_path(model).values())
