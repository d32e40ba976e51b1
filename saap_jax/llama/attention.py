"""Attention of whole rows, by one of three paths, whose results differ by rounding alone.

| path     | scores in memory                 | where                                                              |
|----------|----------------------------------|--------------------------------------------------------------------|
| `plain`  | the whole matrix, `[t, s]` a head | anywhere                                                           |
| `blocks` | those of some queries            | anywhere, also for second derivatives                              |
| `splash` | none: they stay in vector memory | TPU (`jax.experimental.pallas.ops.tpu.splash_attention`)           |

`auto` is plain for rows of at most `LONG` tokens; for longer ones splash where it can be, else blocks. `attending` says
otherwise for the programs that are traced within it.
"""

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from saap_jax.config.mesh import BATCH
from saap_jax.llama.positions import Seen, at_least_float32
from saap_jax.runtime.constraints import batch_shards, in_force
from saap_jax.types import AttentionPath

LONG = 2048
"""Tokens of the longest row whose scores `auto` keeps whole."""

SCORES = 2**27
"""Bytes of scores, float32, that `blocks` has in memory at once on a device."""

FEWEST = 128
"""Queries of a block, at least: a side of a TPU's matrix unit."""

TILES = (512, 256, 128)
"""Queries and keys of a tile of the kernel: the largest that divides the row, which is padded to the smallest."""

Queries = Float[Array, "batch seq kv_heads q_per_kv head_dim"]
Keys = Float[Array, "batch seen kv_heads head_dim"]


class Choice(NamedTuple):
    """Which path programs take, part of what `jax.jit` tells them apart by."""

    path: AttentionPath = "auto"
    tpu: bool | None = None
    """Whether they are for TPUs; None: if jax runs on them."""
    twice: bool = False
    """Whether they take second derivatives."""


_CHOICE = jax.make_user_context(Choice())


def attending(
    path: AttentionPath | None = None, *, tpu: bool | None = None, twice: bool | None = None
) -> AbstractContextManager[None]:
    """Return a context in which programs are traced with another choice; None leaves it as it is.

    Args:
        tpu: whether they are for TPUs, as when they are compiled elsewhere.
        twice: whether they are differentiated twice, which the kernel cannot be.
    """
    changes = {name: value for name, value in (("path", path), ("tpu", tpu), ("twice", twice)) if value is not None}
    return _CHOICE(_CHOICE.value._replace(**changes))


def attended(query: Queries, key: Keys, value: Keys, seen: Seen, scale: float) -> Queries:
    """Return each query's mean of the values that it sees, weighted by the softmax of `scale` times the scores.

    Scores and softmax are float32 (at least).

    Raises:
        ValueError: splash was asked for where it cannot be.
    """
    path = chosen(query, seen)
    if path == "plain":
        return plain(query, key, value, seen, scale)
    return (in_blocks if path == "blocks" else splash)(query, key, value, seen, scale)


def chosen(query: Queries, seen: Seen) -> Literal["plain", "blocks", "splash"]:
    """Return the path that rows take; that of a layer without heads is plain."""
    choice: Choice = _CHOICE.value
    if not query.size:
        return "plain"
    if choice.path == "splash" and (reason := _no_kernel(query, seen, choice)):
        raise ValueError(f"attention: splash {reason}; pass auto or blocks")
    if choice.path != "auto":
        return choice.path
    if whole(choice.path, query.shape[1]):
        return "plain"
    return "blocks" if _no_kernel(query, seen, choice) else "splash"


def whole(path: AttentionPath, length: int) -> bool:
    """Say whether the scores of rows of `length` tokens are all in memory."""
    return path == "plain" or (path == "auto" and length <= LONG)


def _no_kernel(query: Queries, seen: Seen, choice: Choice) -> str:
    """Return why the kernel cannot be taken; empty where it can."""
    if not (jax.default_backend() == "tpu" if choice.tpu is None else choice.tpu):
        return f"is for TPUs, got programs for {jax.default_backend()}"
    if choice.twice:
        return "has no second derivatives, which gate_hessian takes"
    if query.dtype == jnp.float64:
        return "computes in float32, got a model in float64"
    if seen.shared:
        return "cannot show several texts the beginning that they share, as rows of tasks have it"
    return ""


def plain(
    query: Queries, key: Keys, value: Keys, seen: Seen, scale: float, rows: Int[Array, "seq"] | None = None
) -> Queries:
    """Attend with all scores in memory; `rows` are the places of the queries where they are some of the row's."""
    wide = at_least_float32(query.dtype)
    scores = jnp.einsum("btkgh,bskh->bkgts", query, key, preferred_element_type=wide) * scale
    allowed = seen.by(jnp.arange(query.shape[1]) if rows is None else rows)
    weights = jax.nn.softmax(jnp.where(allowed[:, None, None], scores, -jnp.inf), axis=-1).astype(query.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, value)


def in_blocks(query: Queries, key: Keys, value: Keys, seen: Seen, scale: float, *, size: int | None = None) -> Queries:
    """Attend some queries at a time, `size` of them or as `SCORES` allows; the backward pass makes scores again.

    Gradients by keys and values are summed over the blocks in float32 (at least).
    """
    batch, length, kv_heads, q_per_kv, _ = query.shape
    wide, dtype = at_least_float32(query.dtype), query.dtype
    size = size or block_of(length, _heads_of_a_device(batch, kv_heads) * q_per_kv)
    count = -(-length // size)
    rows = jnp.minimum(jnp.arange(count * size), length - 1).reshape(count, size)  # what is padded sees something too
    key, value = key.astype(wide), value.astype(wide)

    def block(inputs: tuple[Array, Array]) -> Array:
        some, places = inputs
        return plain(some, key.astype(dtype), value.astype(dtype), seen, scale, places)

    padded = jnp.pad(query, [(0, 0), (0, count * size - length)] + [(0, 0)] * 3)
    blocks = jnp.moveaxis(padded.reshape(batch, count, size, *query.shape[2:]), 1, 0)
    result = jax.lax.map(jax.checkpoint(block, prevent_cse=False), (blocks, rows))
    return jnp.moveaxis(result, 0, 1).reshape(padded.shape)[:, :length]


def block_of(length: int, heads: int) -> int:
    """Return how many queries of rows of `length` tokens a block has, with so many query heads of rows on a device.

    >>> block_of(8192, 32), block_of(8192, 1), block_of(4096, 10**6)
    (128, 4096, 128)
    """
    most = SCORES // (4 * heads * length)
    return min(length, max(FEWEST, 2 ** int(math.log2(max(most, 1)))))


def _heads_of_a_device(batch: int, kv_heads: int) -> int:
    """Return how many KV heads of rows each device has."""
    tensor = _tensor(kv_heads)
    shards = jax.sharding.get_abstract_mesh().shape[tensor] if tensor else 1
    return (batch // batch_shards(batch)) * (kv_heads // shards)


def _tensor(kv_heads: int) -> str | None:
    """Return the axis of the mesh that KV heads are spread over evenly, if there is one."""
    shards = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    return "tensor" if shards > 1 and kv_heads % shards == 0 else None


def splash(query: Queries, key: Keys, value: Keys, seen: Seen, scale: float, *, interpret: bool = False) -> Queries:
    """Attend by jax's kernel for TPU, each device its own rows and heads.

    Windows count places in the row: within a text they are as far apart as positions.

    Args:
        interpret: run it anywhere, slowly, as the tests do.
    """
    query = (query.astype(jnp.float32) * scale).astype(query.dtype)
    if seen.apart is None:
        return _on_devices(query, key, value, seen.segments, seen.window, interpret)
    apart, other = seen.apart
    paths = [functools.partial(_on_devices, window=window, interpret=interpret) for window in (other, seen.window)]
    return jax.lax.cond(apart, *paths, query, key, value, seen.segments)


def _on_devices(
    query: Queries,
    key: Keys,
    value: Keys,
    segments: Int[Array, "batch seq"] | None,
    window: int | None,
    interpret: bool,
) -> Queries:
    """Run the kernel on every device of the mesh in force: the partitioner cannot split it."""
    kernel = functools.partial(_rows, window=window, interpret=interpret)
    if not in_force():
        return kernel(query, key, value, segments)
    sizes = jax.sharding.get_abstract_mesh().shape
    parts = tuple(axis for axis in BATCH if sizes.get(axis, 1) > 1) if batch_shards(len(query)) > 1 else ()
    rows, heads = PartitionSpec(parts or None), PartitionSpec(parts or None, None, _tensor(key.shape[2]))
    return jax.shard_map(kernel, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)(
        query, key, value, segments
    )


def _rows(
    query: Queries,
    key: Keys,
    value: Keys,
    segments: Int[Array, "batch seq"] | None,
    window: int | None,
    interpret: bool,
) -> Queries:
    batch, length, kv_heads, q_per_kv, head_dim = query.shape
    padding = -length % TILES[-1]  # on the right, where nothing sees it but itself

    def by_head(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, length + padding, -1, head_dim), 1, 2)

    if segments is not None:
        segments = jnp.pad(segments, [(0, 0), (0, padding)], constant_values=-1)
    kernel = _kernel(length + padding, kv_heads * q_per_kv, window, interpret)
    result = jnp.moveaxis(jax.vmap(kernel)(by_head(query), by_head(key), by_head(value), segments), 1, 2)
    return result[:, :length].reshape(query.shape)


def _kernel(length: int, heads: int, window: int | None, interpret: bool) -> Callable[..., Any]:
    """Return what attends the heads of one row, `[heads, seq, head_dim]`, with its segments or None."""
    from jax.experimental.pallas.ops.tpu import splash_attention  # here: elsewhere than on a TPU nothing needs it

    shape = (length, length)
    mask = splash_attention.CausalMask(shape)
    if window is not None:
        mask = splash_attention.LocalMask(shape, (window - 1, 0), 0)
    tile = next(size for size in TILES if length % size == 0)
    sizes = dict.fromkeys(("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), tile)
    kernel: Any = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def attend(query: Array, key: Array, value: Array, segments: Array | None) -> Array:
        ids = None if segments is None else splash_attention.SegmentIds(segments, segments)
        return kernel(query, key, value, ids)

    return attend
