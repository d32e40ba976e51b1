"""Segments: stretches of equal-shaped layers. Where whole-model trees are split into a model's segments and joined."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from saap_jax.llama.spec import LayerWidths
from saap_jax.types import EXPERT_CHANNELS, QUERY_HEADS, STRUCTURES, TIED, Gates, Keep, LayerGates


class SegmentBounds(NamedTuple):
    """Layers `start … stop - 1` of the model form a segment whose layers have `units[structure]` units each.

    `units[QUERY_HEADS]` are their query heads, `units[EXPERT_CHANNELS]` of a mixture the channels of all experts.
    """

    start: int
    stop: int
    units: dict[str, int]


def segment_bounds(segments: Sequence[Any]) -> list[SegmentBounds]:
    """Return the bounds of each segment of a model, from the shapes of its arrays."""
    bounds, start = [], 0
    for segment in segments:
        widths = segment.widths
        heads = widths.kv_heads * widths.q_per_kv
        units = {"attention": widths.kv_heads, "mlp": widths.mlp, QUERY_HEADS: heads}
        units |= {} if widths.channels is None else {EXPERT_CHANNELS: widths.mlp_channels}
        bounds.append(SegmentBounds(start, start + segment.length, units))
        start += segment.length
    return bounds


def split_gates(gates: Gates | None, bounds: list[SegmentBounds]) -> list[LayerGates | None]:
    """Slice whole-model gates `[*batch, layers, units]` into a tree a segment, `[layers, *batch, units]`, for scan."""
    if gates is None:
        return [None] * len(bounds)
    names = STRUCTURES + tuple(name for name in TIED if name in gates)
    if EXPERT_CHANNELS in names and EXPERT_CHANNELS not in bounds[0].units:
        raise ValueError("gates: expected no expert_channels for a model without experts; leave them out")
    widest = {name: max(segment.units[name] for segment in bounds) for name in names}
    for name in names:
        if gates[name].shape[-2:] != (bounds[-1].stop, widest[name]):
            raise ValueError(
                f"gates: expected {name} of shape [..., {bounds[-1].stop} layers, {widest[name]} units] for this "
                f"model, got {gates[name].shape}; make them with `ones_gates(model)`"
            )
    return [
        {n: jnp.moveaxis(gates[n][..., segment.start : segment.stop, : segment.units[n]], -2, 0) for n in names}
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
    """Return which units a model has: all True for a dense one, False in the padding of a cut one's narrow layers."""
    return {name: _existing(segments, name) for name in STRUCTURES}


def existing_query_heads(segments: Sequence[Any]) -> Bool[np.ndarray, "_layers _heads"]:
    """Return which query heads a model has; False in the padding of layers with fewer than others."""
    return _existing(segments, QUERY_HEADS)


def existing_tied(segments: Sequence[Any]) -> Keep:
    """Return which units of each structure of `TIED` a model has; a model without experts has none of theirs."""
    return {name: _existing(segments, name) for name in TIED if name in segment_bounds(segments)[0].units}


def _existing(segments: Sequence[Any], name: str) -> Bool[np.ndarray, "_layers _units"]:
    bounds = segment_bounds(segments)
    widest = max(segment.units[name] for segment in bounds)
    return np.stack(
        [np.arange(widest) < segment.units[name] for segment in bounds for _ in range(segment.start, segment.stop)]
    )


def ones_gates(segments: Sequence[Any]) -> Gates:
    """Return gates that keep everything, `[layers, units]` a structure, float32."""
    return {name: jnp.ones(units.shape, jnp.float32) for name, units in existing_units(segments).items()}


def masks(keep: Keep) -> Gates:
    """Return gates that are 1 where a unit (or a query head) is kept and 0 where it is removed, float32."""
    return {name: jnp.asarray(kept, jnp.float32) for name, kept in keep.items()}


def units_inside(
    holders: Bool[np.ndarray, "layers holders"], widths: Sequence[LayerWidths], name: str, shape: tuple[int, ...]
) -> Bool[np.ndarray, "layers units"]:
    """Return which units of a structure of `TIED` lie inside of the given holders, such as query heads of KV heads."""
    units = np.zeros(shape, bool)
    for row, kept, (count, each) in zip(units, holders, [held_by(layer, name) for layer in widths], strict=True):
        row[: count * each] = np.repeat(kept[:count], each)
    return units


def held_by(widths: LayerWidths, name: str) -> tuple[int, int]:
    """Return how many holders of a structure of `TIED` a layer has, and how many units lie inside of each."""
    if name == QUERY_HEADS:
        return widths.kv_heads, widths.q_per_kv
    return widths.mlp, widths.channels or 1
