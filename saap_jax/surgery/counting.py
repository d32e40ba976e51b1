"""How many parameters a model has, and a unit of it takes along, after a cut."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from saap_jax.discovery.structures import parameters_by_path
from saap_jax.llama import Llama
from saap_jax.llama.segments import heads_of
from saap_jax.types import PRUNABLE_AXES, QUERY_HEADS, RESIDUAL, Keep


class Counted(NamedTuple):
    """Parameters after a cut."""

    all: int
    prunable: int
    """Those of attention and MLP."""


def kept_parameters(model: Llama, keep: Keep) -> Counted:
    """Count the parameters that a model has after a cut, a tied unembedding once."""
    prunable = other = 0
    for layer, axes, sizes in _sizes_left(model, keep):
        units = next((name for axis, name in PRUNABLE_AXES.items() if axis in axes), None)
        if units is None or layer is None:
            other += math.prod(sizes.values())
        else:
            prunable += math.prod(sizes.values()) * int(keep[units][layer].sum())
    return Counted(other + prunable, prunable)


def costs_left(model: Llama, keep: Keep) -> dict[str, np.ndarray]:
    """Return the parameters that one unit of each layer takes along in a model without some units, `[layers]` int64.

    Without query heads or channels of the residual stream a unit of attention or MLP is smaller. `QUERY_HEADS` is what
    one query head takes along while its KV head stays; `RESIDUAL`, `[1]`, what a channel takes of attention and MLP.
    """
    layers = len(model.spec.layers)
    costs = {name: np.zeros(layers, np.int64) for name in (*PRUNABLE_AXES.values(), QUERY_HEADS)}
    channel = 0
    for layer, axes, sizes in _sizes_left(model, keep):
        units = next((name for axis, name in PRUNABLE_AXES.items() if axis in axes), None)
        if units is None or layer is None:
            continue
        size = math.prod(sizes.values())
        costs[units][layer] += size
        if "q_per_kv" in axes:
            costs[QUERY_HEADS][layer] += size // max(sizes["q_per_kv"], 1)
        if "embed" in axes:
            channel += size // sizes["embed"] * int(keep[units][layer].sum())
    return costs | {RESIDUAL: np.array([channel], np.int64)}


def _sizes_left(model: Llama, keep: Keep) -> Iterator[tuple[int | None, tuple[str, ...], dict[str, int]]]:
    """Yield layer (None outside of layers), axes, and the sizes of all other axes than that of the units, of each
    parameter."""
    embed = int(keep[RESIDUAL].sum()) if RESIDUAL in keep else model.spec.embed
    heads = _heads_left(model, keep)
    layer = -1
    for segment in model.segments:
        held = [(each.axes, each.shape) for each in parameters_by_path(segment).values()]
        for _ in range(segment.length):
            layer += 1
            left = {"embed": embed, "q_per_kv": heads[layer]}
            for axes, shape in held:
                rest = {axis: size for axis, size in zip(axes[1:], shape[1:], strict=True) if axis not in PRUNABLE_AXES}
                yield layer, axes, rest | {axis: left[axis] for axis in rest if axis in left}
    for name in ("embedding", "norm", "unembedding"):
        if (parameter := getattr(model, name)) is not None:
            sizes = dict(zip(parameter.axes, parameter.shape, strict=True))
            yield None, parameter.axes, sizes | ({"embed": embed} if "embed" in sizes else {})


def _heads_left(model: Llama, keep: Keep) -> list[int]:
    """Return how many query heads each KV head that stays keeps, of each layer."""
    widths = model.spec.layers
    if QUERY_HEADS not in keep:
        return [each.q_per_kv for each in widths]
    left = keep[QUERY_HEADS] & heads_of(keep["attention"], widths, keep[QUERY_HEADS].shape)
    return [
        int(heads.sum()) // int(kv.sum()) if kv.any() else each.q_per_kv
        for heads, kv, each in zip(left, keep["attention"], widths, strict=True)
    ]
