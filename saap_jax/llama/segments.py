"""Segments: stretches of equal-shaped layers. Where whole-model trees are split into a model's segments and joined."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from saap_jax.types import STRUCTURES, Gates, Keep, LayerGates


class SegmentBounds(NamedTuple):
    """Layers `start … stop - 1` of the model form a segment whose layers have `units[structure]` units each."""

    start: int
    stop: int
    units: dict[str, int]


def segment_bounds(segments: Sequence[Any]) -> list[SegmentBounds]:
    """Return the bounds of each segment of a model, from the shapes of its arrays."""
    bounds = []
    start = 0
    for segment in segments:
        units = {"attention": segment.widths.kv_heads, "mlp": segment.widths.mlp}
        bounds.append(SegmentBounds(start, start + segment.length, units))
        start += segment.length
    return bounds


def split_gates(gates: Gates | None, bounds: list[SegmentBounds]) -> list[LayerGates | None]:
    """Slice whole-model gates `[*batch, layers, units]` into a tree a segment, `[layers, *batch, units]`, for scan."""
    if gates is None:
        return [None] * len(bounds)
    widest = {name: max(segment.units[name] for segment in bounds) for name in STRUCTURES}
    for name in STRUCTURES:
        if gates[name].shape[-2:] != (bounds[-1].stop, widest[name]):
            raise ValueError(
                f"gates: expected {name} of shape [..., {bounds[-1].stop} layers, {widest[name]} units] for this "
                f"model, got {gates[name].shape}; make them with `ones_gates(model)`"
            )
    return [
        {n: jnp.moveaxis(gates[n][..., segment.start : segment.stop, : segment.units[n]], -2, 0) for n in STRUCTURES}
        for segment in bounds
    ]


def join_segments(pieces: Sequence[Any], fill: float = 0.0) -> Any:
    """Join per-segment trees with leaves `[layers, units, ...]` into whole-model ones, narrow layers with `fill`.

    So is a unit with fewer coordinates, as of a layer with fewer query heads a KV head.
    """

    def join(*leaves: jax.Array) -> jax.Array:
        widest = [max(sizes) for sizes in zip(*(leaf.shape[1:] for leaf in leaves), strict=True)]
        pads = [[(0, 0), *((0, most - n) for most, n in zip(widest, leaf.shape[1:], strict=True))] for leaf in leaves]
        return jnp.concatenate([jnp.pad(x, p, constant_values=fill) for x, p in zip(leaves, pads, strict=True)])

    return jax.tree.map(join, *pieces)


def existing_units(segments: Sequence[Any]) -> Keep:
    """Mark the units of a model: all True for a dense one, False in the padding of a cut one's narrow layers."""
    bounds = segment_bounds(segments)
    found = {}
    for name in STRUCTURES:
        places = np.arange(max(segment.units[name] for segment in bounds))
        found[name] = np.stack([places < at.units[name] for at in bounds for _ in range(at.start, at.stop)])
    return found


def ones_gates(segments: Sequence[Any]) -> Gates:
    """Make gates that keep everything, `[layers, units]` a structure, float32."""
    return {name: jnp.ones(units.shape, jnp.float32) for name, units in existing_units(segments).items()}


def masks(keep: Keep) -> Gates:
    """Make gates that are 1 where a unit is kept and 0 where it is removed, float32.

    >>> masks({"mlp": np.array([[True, False]])})["mlp"].tolist()
    [[1.0, 0.0]]
    """
    return {name: jnp.asarray(kept, jnp.float32) for name, kept in keep.items()}
