"""Arrays of trees on the host of every process: by path, whole although they are spread over devices, and finite."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from saap_jax.runtime.processes import in_host_memory


def fetched(array: Any, index: int | None = None) -> np.ndarray:
    """Fetch an array, or one entry of its first axis, on the host, whole, on every process; a numpy array as it is.

    From accelerators an array is gathered by the devices and copied once; what CPU devices hold is read where it is.
    Of several processes, all have to call this for an array that is spread over them.
    """
    if not isinstance(array, jax.Array):
        if index is None:
            return np.asarray(array)
        return np.asarray(array[index])
    if in_host_memory(array) and array.is_fully_addressable:
        if len(array.devices()) == 1:
            if index is None:
                return np.asarray(array)
            return np.asarray(array)[index]
        return _assembled(array, index)
    part = array if index is None else array[index]
    if part.is_fully_addressable or part.is_fully_replicated:
        return np.asarray(part)
    return np.asarray(multihost_utils.process_allgather(part, tiled=True))


def read_in_place(array: Any) -> Any:
    """Show an array to numpy, which compiles nothing, where it lies in host memory on one device; another as it is."""
    if isinstance(array, Tracer) or not isinstance(array, jax.Array):
        return array
    single = isinstance(array.sharding, SingleDeviceSharding)
    near = single and array.is_fully_addressable and in_host_memory(array)
    return np.asarray(array) if near else array


def put_beside(other: Any, tree: Any) -> Any:
    """Put what numpy made of such arrays where another array lies; arrays of jax stay as they are."""
    put = functools.partial(jax.device_put, may_alias=True)
    return jax.tree.map(lambda leaf: put(leaf, other.sharding) if isinstance(leaf, np.ndarray) else leaf, tree)


def concatenated(arrays: Sequence[Any], axis: int = 0) -> Any:
    """Join arrays: those of numpy by numpy."""
    return (np if all(isinstance(array, np.ndarray) for array in arrays) else jnp).concatenate(arrays, axis=axis)


def _assembled(array: jax.Array, index: int | None) -> np.ndarray:
    """Put an array, or one entry of its first axis, together from the parts that CPU devices of this process hold.

    A copy or a slice on each of them would count, and stay with their allocators.
    """
    whole = np.empty(array.shape if index is None else array.shape[1:], array.dtype)
    for shard in array.addressable_shards:
        if index is None:
            whole[shard.index] = np.asarray(shard.data)
        elif index in (rows := range(array.shape[0])[shard.index[0]]):
            whole[shard.index[1:]] = np.asarray(shard.data)[index - rows.start]
    return whole


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """List the arrays (or abstract ones) of a tree by path, such as `segments/0/mlp/down` or `mean/attention`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/").removesuffix("/value"): x for p, x in leaves}


def first_not_finite(tree: Any) -> str | None:
    """Find the first array with a number that is not finite, by path; None where all are finite."""
    for path, leaf in leaves_by_path(tree).items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        if isinstance(seen := read_in_place(leaf), np.ndarray):  # without flags as large as the values
            with np.errstate(invalid="ignore"):
                finite = np.isfinite(seen.min(initial=0)) and np.isfinite(seen.max(initial=0))
        else:
            finite = jnp.all(jnp.isfinite(leaf))
        if not finite:
            return path
    return None
