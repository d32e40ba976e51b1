"""Rules for programs over several devices: what a collective does to the axes of one device's part, and `shard_map`."""

from collections.abc import Sequence
from typing import Any

from jax.extend.core import JaxprEqn

from saap_jax.trace.rules import Layout, Notes, Rule, free, regroup, unknown

EACH = frozenset(["psum", "psum_invariant", "pmax", "pmin", "ppermute", "pcast", "preduced", "all_reduce"])
"""Collectives whose results have the shapes of their operands, one by one."""


def local(notes: Notes, layout: Layout, spec: Any, sizes: dict[str, int]) -> Layout:
    """Return the axes of one device's part of an array: of an axis that is dealt out, the minor factor.

    The units of such an axis are those of one device: where one goes, one of each device goes, so that the parts stay
    alike.
    """
    return tuple(_part(notes, node, _devices(spec, axis, sizes)) for axis, node in enumerate(layout))


def whole(notes: Notes, layout: Layout, spec: Any, sizes: dict[str, int]) -> Layout:
    """Return the axes of an array of which each device holds a part; the reverse of `local`."""
    return tuple(_joined(notes, node, _devices(spec, axis, sizes)) for axis, node in enumerate(layout))


def _devices(spec: Any, axis: int, sizes: dict[str, int]) -> int:
    names = spec[axis] if axis < len(spec) else None
    count = 1
    for name in (names,) if isinstance(names, str) else names or ():
        count *= sizes[name]
    return count


def _part(notes: Notes, node: int, devices: int) -> int:
    if devices == 1:
        return node
    each = notes.axes.size(node) // devices
    major, *minor = regroup(notes, [node], [size for size in (devices, each) if size > 1])
    notes.pin(major, "split", f"dealt out to {devices} devices")
    return minor[0] if minor else notes.axes.fresh(each)


def _joined(notes: Notes, node: int, devices: int) -> int:
    if devices == 1:
        return node
    major = notes.axes.pinned(devices, "split", f"dealt out to {devices} devices")
    return notes.axes.product([major, node])


def several(notes: Notes, eqn: JaxprEqn, ins: Sequence[Layout]) -> Sequence[Layout]:
    """`psum` and its kin, over devices only."""
    axes = eqn.params.get("axes", ())
    return unknown(notes, eqn, ins) if any(isinstance(axis, int) for axis in axes) else ins


def all_gather(notes: Notes, eqn: JaxprEqn, ins: Sequence[Layout]) -> Sequence[Layout]:
    """`all_gather`: the parts of the devices, side by side or along a new axis."""
    axis, devices = eqn.params["all_gather_dimension"], eqn.params["axis_size"]
    (layout,) = ins
    if eqn.params["tiled"]:
        return [(*layout[:axis], _joined(notes, layout[axis], devices), *layout[axis + 1 :])]
    new = notes.axes.pinned(devices, "split", f"of {devices} devices")
    return [(*layout[:axis], new, *layout[axis:])]


def reduce_scatter(notes: Notes, eqn: JaxprEqn, ins: Sequence[Layout]) -> Sequence[Layout]:
    """`reduce_scatter`: each device gets a part of the sum."""
    axis, (layout,) = eqn.params["scatter_dimension"], ins
    if eqn.params["tiled"]:
        return [(*layout[:axis], _part(notes, layout[axis], eqn.params["axis_size"]), *layout[axis + 1 :])]
    notes.pin(layout[axis], "split", "one for each device")
    return [(*layout[:axis], *layout[axis + 1 :])]


DEVICE_RULES: dict[str, Rule] = {
    **dict.fromkeys(EACH, several),
    **dict.fromkeys(("all_gather", "all_gather_invariant"), all_gather),
    "reduce_scatter": reduce_scatter,
    "axis_index": free,
}
