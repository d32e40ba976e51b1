"""How many parameters a model has, and a unit of it takes along, after a cut."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from saap_jax.llama import Llama
from saap_jax.llama.segments import held_by, units_inside
from saap_jax.structures.structures import parameters_by_path
from saap_jax.types import PRUNABLE_AXES, RESIDUAL, TIED, Keep


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

    Without query heads, channels of experts or of the residual stream a unit of attention or MLP is smaller. That of a
    structure of `TIED` is what one unit takes along while its holder stays, such as a query head; `RESIDUAL`, `[1]`,
    what a channel takes of attention and MLP.
    """
    layers = len(model.spec.layers)
    costs = {name: np.zeros(layers, np.int64) for name in (*PRUNABLE_AXES.values(), *TIED)}
    channel = 0
    for layer, axes, sizes in _sizes_left(model, keep):
        units = next((name for axis, name in PRUNABLE_AXES.items() if axis in axes), None)
        if units is None or layer is None:
            continue
        size = math.prod(sizes.values())
        costs[units][layer] += size
        for name, (_, axis) in TIED.items():
            if axis in axes:
                costs[name][layer] += size // max(sizes[axis], 1)
        if "embed" in axes:
            channel += size // sizes["embed"] * int(keep[units][layer].sum())
    return costs | {RESIDUAL: np.array([channel], np.int64)}


def _sizes_left(model: Llama, keep: Keep) -> Iterator[tuple[int | None, tuple[str, ...], dict[str, int]]]:
    """Yield layer (None outside of layers), axes, and the sizes of all other axes than that of the units, of each
    parameter."""
    embed = int(keep[RESIDUAL].sum()) if RESIDUAL in keep else model.spec.embed
    inside = {axis: _left_inside(model, keep, name) for name, (_, axis) in TIED.items()}
    layer = -1
    for segment in model.segments:
        held = [(each.axes, each.shape) for each in parameters_by_path(segment).values()]
        for _ in range(segment.length):
            layer += 1
            left = {"embed": embed} | {axis: each[layer] for axis, each in inside.items()}
            for axes, shape in held:
                rest = {axis: size for axis, size in zip(axes[1:], shape[1:], strict=True) if axis not in PRUNABLE_AXES}
                yield layer, axes, rest | {axis: left[axis] for axis in rest if axis in left}
    for name in ("embedding", "norm", "unembedding"):
        if (parameter := getattr(model, name)) is not None:
            sizes = dict(zip(parameter.axes, parameter.shape, strict=True))
            yield None, parameter.axes, sizes | ({"embed": embed} if "embed" in sizes else {})


def _left_inside(model: Llama, keep: Keep, name: str) -> list[int]:
    """Return how many units of a structure of `TIED` each holder that stays keeps, of each layer."""
    widths, (holder, _) = model.spec.layers, TIED[name]
    if name not in keep:
        return [held_by(each, name)[1] for each in widths]
    left = keep[name] & units_inside(keep[holder], widths, name, keep[name].shape)
    return [
        int(units.sum()) // int(holders.sum()) if holders.any() else held_by(each, name)[1]
        for units, holders, each in zip(left, keep[holder], widths, strict=True)
    ]
