"""Arrays that are spread over devices, whole on the host of every process.

From accelerators an array is gathered by the devices and copied once. CPU devices have their memory on the host, where
a copy or a slice on each of them would count, and stay with their allocators. So parts that lie there are read where
they are, and what other processes hold comes in pieces by one device of each.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from saap_jax.runtime.processes import belongs_here, controllers, in_host_memory, number, owner, room

PIECE = 4 * 2**20
"""Bytes that a process sends at once at most."""

Box = tuple[tuple[int, int], ...]
"""Where a part of an array begins and ends on each of its axes."""


def fetched(array: Any, index: int | None = None) -> np.ndarray:
    """Return an array, or one entry of its first axis, on the host, whole, on every process; a numpy array as it is.

    Of several processes, all have to call this for an array that is spread over them.
    """
    if not isinstance(array, jax.Array):
        return np.asarray(array) if index is None else np.asarray(array[index])
    if in_host_memory(array):
        if len(array.devices()) == 1 and array.is_fully_addressable:
            return np.asarray(array) if index is None else np.asarray(array)[index]
        return _assembled(array, index)
    part = array if index is None else array[index]
    if belongs_here(part) or part.is_fully_replicated:
        return np.asarray(part)
    return np.asarray(multihost_utils.process_allgather(part, tiled=True))


def _assembled(array: jax.Array, index: int | None) -> np.ndarray:
    """Put an array, or one entry of its first axis, together from the parts that CPU devices hold."""
    shape = array.shape if index is None else array.shape[1:]
    whole = np.empty(shape, array.dtype)
    here = {_box(shard.index, array.shape): shard.data for shard in array.addressable_shards}

    def part(box: Box) -> np.ndarray:
        return np.asarray(here[box]) if index is None else np.asarray(here[box])[index - box[0][0]]

    def place(box: Box) -> tuple[slice, ...]:
        return tuple(slice(*edges) for edges in (box if index is None else box[1:]))

    wanted = {
        box: holders for box, holders in _holders(array).items() if index is None or box[0][0] <= index < box[0][1]
    }
    for box in wanted.keys() & here.keys():
        whole[place(box)] = part(box)
    everyone = frozenset(range(controllers()))
    missing = {box: min(holders) for box, holders in wanted.items() if holders != everyone}
    if not missing:
        return whole
    own = [part(box) for box, sender in missing.items() if sender == number()]
    sizes = {box: whole[place(box)].nbytes for box in missing}
    sent = {sender: sum(sizes[box] for box, other in missing.items() if other == sender) for sender in missing.values()}
    received = _exchanged([np.ascontiguousarray(each).reshape(-1).view(np.uint8) for each in own], max(sent.values()))
    for sender, stream in enumerate(received):
        at = 0
        for box in (box for box, other in missing.items() if other == sender):
            values = stream[at : at + sizes[box]].view(array.dtype)
            whole[place(box)] = values.reshape(whole[place(box)].shape)
            at += sizes[box]
    return whole


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    return tuple(
        (part.start or 0, size if part.stop is None else part.stop) for part, size in zip(index, shape, strict=True)
    )


def _holders(array: jax.Array) -> Mapping[Box, frozenset[int]]:
    """List the processes that hold each part of an array, in an order that is the same on all of them."""
    found: dict[Box, set[int]] = {}
    for device, index in array.sharding.devices_indices_map(array.shape).items():
        found.setdefault(_box(index, array.shape), set()).add(owner(device))
    return {box: frozenset(found[box]) for box in sorted(found)}


def _exchanged(own: list[np.ndarray], longest: int) -> np.ndarray:
    """Return the bytes that each process has to say, `[processes, bytes]`, on all; `longest` is the most of them."""
    size = min(PIECE, room(longest))
    gather, mesh = _gatherer()
    spread = NamedSharding(mesh, PartitionSpec("process"))
    device, processes = mesh.devices[number()], controllers()
    received = np.empty((processes, -(-longest // size) * size), np.uint8)
    mine = np.concatenate(own) if len(own) > 1 else own[0] if own else np.empty(0, np.uint8)
    for start in range(0, longest, size):
        piece = np.zeros((1, size), np.uint8)
        said = mine[start : start + size]
        piece[0, : len(said)] = said
        array = jax.make_array_from_single_device_arrays((processes, size), spread, [jax.device_put(piece, device)])
        received[:, start : start + size] = np.asarray(gather(array).addressable_data(0))
    return received


@functools.cache
def _gatherer() -> tuple[Any, Mesh]:
    """Compile a program that gathers an array over the processes, and make their mesh of one device each."""
    each = {owner(device): device for device in reversed(jax.devices())}
    mesh = Mesh(np.array([each[number] for number in sorted(each)]), ("process",))
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec())), mesh
