"""Stage 2d: from a keep-set to a pruned model, masked (gates) or cut (smaller arrays). Both give the same logits."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from saap_jax.llama.model import DecoderLayer, Llama
from saap_jax.llama.product import check_plain
from saap_jax.llama.segments import existing_units, segment_bounds
from saap_jax.llama.spec import LlamaSpec
from saap_jax.runtime.gather import concatenated, put_beside, read_in_place
from saap_jax.types import PRUNABLE_AXES, STRUCTURES, Keep

TILE = 128
"""Channels that accelerators multiply at once: the lanes of a TPU, or the tile of a GPU's tensor cores."""


def cut(model: Llama, keep: Keep) -> Llama:
    """Return a model with the removed units' weights gone; neighbouring layers of equal widths form one segment.

    A layer may lose all units of a structure. The given model is left as it is. Of one that is spread over devices, so
    is the result: an axis that they do not divide any more is held whole on each.

    >>> keep = {"attention": np.ones((2, 2), bool), "mlp": np.arange(16) < np.array([[4], [0]])}
    >>> [layer.mlp for layer in cut(model, keep).spec.layers]
    [4, 0]

    Raises:
        ValueError: a keep-set of the wrong shape, one that keeps a unit that does not exist, or a model whose matrices
            are not plain floats.
    """
    check_plain(model, "cut")
    check_keep(keep, model.segments)
    # Cut each layer into a segment of its own.
    layers: list[DecoderLayer] = []
    for segment, bounds in zip(model.segments, segment_bounds(model.segments), strict=True):
        for offset, layer in enumerate(range(bounds.start, bounds.stop)):
            kept = {axis: np.flatnonzero(keep[name][layer]) for axis, name in PRUNABLE_AXES.items()}
            cut_one = functools.partial(_cut_parameter, offset=offset, kept=kept)
            layers.append(jax.tree.map(cut_one, segment, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)))
    # Stack neighbours of equal widths again: a segment is run as one loop over its layers.
    pruned = jax.tree.map(lambda x: x, model)
    segments = nnx.List(
        jax.tree.map(lambda *values: _kept_in_place(values[0], concatenated(values)), *stretch)
        for _, stretch in itertools.groupby(layers, key=lambda layer: layer.widths)
    )
    pruned.segments = put_beside(model.embedding[...], segments)
    return pruned


def _cut_parameter(parameter: nnx.Param, offset: int, kept: dict[str, np.ndarray]) -> nnx.Param:
    """Take one layer of a stacked parameter, and the kept units along its prunable axis."""
    value = read_in_place(parameter[...])[offset : offset + 1]
    # What was read to the host is cut there, and does not take memory of a device.
    numpy: Any = jnp
    if isinstance(value, np.ndarray):
        numpy = np
    for position, axis in enumerate(parameter.axes):
        if axis in kept:
            value = numpy.take(value, kept[axis], axis=position)
    return nnx.Param(_kept_in_place(parameter[...], value), axes=parameter.axes)


def _kept_in_place(whole: Array | np.ndarray, part: Array | np.ndarray) -> Array | np.ndarray:
    """Cut a part of an array that is spread over devices, spread alike; axes that these do not divide, on each."""
    place = getattr(whole, "sharding", None)
    if not isinstance(place, NamedSharding):
        return part
    entries = [*place.spec, *[None] * (part.ndim - len(place.spec))]
    for position, entry in enumerate(entries):
        # An entry is one axis of the mesh, several of them, or None.
        axes = entry or ()
        if isinstance(entry, str):
            axes = (entry,)
        if part.shape[position] % math.prod(place.mesh.shape[axis] for axis in axes):
            entries[position] = None
    return jax.device_put(part, NamedSharding(place.mesh, PartitionSpec(*entries)))


def pruned_spec(spec: LlamaSpec, keep: Keep) -> LlamaSpec:
    """Make the spec of the model that `cut` makes."""
    layers = tuple(
        dataclasses.replace(widths, kv_heads=int(attention.sum()), mlp=int(mlp.sum()))
        for widths, attention, mlp in zip(spec.layers, keep["attention"], keep["mlp"], strict=True)
    )
    return dataclasses.replace(spec, layers=layers)


def check_keep(keep: Keep, segments: Sequence[DecoderLayer]) -> None:
    """Raise ValueError unless `keep` has the shape of a model with these segments and keeps only units that exist."""
    for name, existing in existing_units(segments).items():
        got: Any = "nothing"
        if name in keep:
            got = keep[name].shape
        if got != existing.shape:
            raise ValueError(f"keep: expected {name} of shape {existing.shape} for this model, got {got}")
        extra = np.argwhere(keep[name] & ~existing)
        if len(extra):
            raise ValueError(f"keep: {name} unit {extra[0][1]} of layer {extra[0][0]} does not exist in this model")
    unknown = ", ".join(name for name in keep if name not in STRUCTURES)
    if unknown:
        raise ValueError(f"keep: expected {' and '.join(STRUCTURES)} alone, got {unknown} too")


def keep_to_json(keep: Keep) -> dict:
    """Return the kept indices of each layer, and how many units there were, as JSON values."""
    found = {}
    for name, kept in keep.items():
        indices = [np.flatnonzero(row).tolist() for row in kept]
        found[name] = {"units": int(kept.shape[1]), "kept": indices}
    return found


def width_note(spec: LlamaSpec) -> str:
    """Say in a sentence that channels of MLPs suit no accelerator; empty where they do, and for small models.

    >>> from saap_jax.llama.spec import LayerWidths
    >>> layers = tuple(LayerWidths(kv_heads=3, q_per_kv=3, mlp=mlp) for mlp in (536, 1126, 1024))
    >>> width_note(LlamaSpec(vocab=9, embed=576, head_dim=64, layers=layers, tied=True)).split(",")[0]
    '2 of 3 layers have numbers of channels (536 to 1126) that are no multiples of 128'
    """
    widths = [layer.mlp for layer in spec.layers]
    odd = sum(width % TILE > 0 for width in widths)
    if not odd or max(widths) < 4 * TILE or spec.constants.traits.experts:
        return ""
    return (
        f"{odd} of {len(widths)} layers have numbers of channels ({min(widths)} to {max(widths)}) that are no "
        f"multiples of {TILE}, by which TPUs and GPUs compute; within(multiple_of={{mlp: {TILE}}}) in the method keeps "
        "multiples, and the step shape makes layers alike"
    )
