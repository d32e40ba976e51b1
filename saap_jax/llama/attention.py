"""How layers see positions, and attention of whole rows by one of two paths, whose results differ by rounding alone.

In most families all layers see positions alike. In some, layers apart from the rest have a window or a base of their
own (`Constants.apart`): a pass makes both sights once, and each layer takes its own.

| path     | scores in memory                  |
|----------|-----------------------------------|
| `plain`  | the whole matrix, `[t, s]` a head |
| `blocks` | those of some queries             |

`auto` is plain for rows of at most `LONG` tokens, for longer ones blocks. `attending` says otherwise for the programs
that are traced within it.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from saap_jax.llama.segments import SegmentBounds
from saap_jax.llama.spec import Apart, Constants
from saap_jax.runtime.constraints import batch_shards
from saap_jax.types import AttentionPath

LONG = 2048
"""Tokens of the longest row whose scores `auto` keeps whole."""

SCORES = 2**27
"""Bytes of scores, float32, that `blocks` has in memory at once on a device."""

FEWEST = 128
"""Queries of a block, at least: a side of a TPU's matrix unit."""

Queries = Float[Array, "batch seq kv_heads q_per_kv head_dim"]
Keys = Float[Array, "batch seen kv_heads head_dim"]
Places = Int[Array, "batch seq"]

Rotation = tuple[Float[Array, "*batch seq half"], Float[Array, "*batch seq half"]]
"""Cosine and sine of each position's rotary angles; with a batch axis where rows start at different positions."""

# --- positions -------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """Which positions of a row its tokens see: their own and those before, of their own text and within a window.

    A rule, because the matrix of a long row is large, 64 MiB for 8,192 tokens, and only some rows of it are asked for.
    """

    length: int
    """Tokens of the row."""
    window: int | None = None
    """Positions that a token sees, its own among them; None for all."""
    apart: tuple[Bool[Array, ""], int | None] | None = None
    """Whether the window is another one, which is known when the program runs, and that one."""
    positions: Places | None = None
    """By which windows count; None: by places in the row."""
    segments: Places | None = None
    """The text that each token is of; None: all of one."""

    def by(self, rows: Int[Array, "some"]) -> Bool[Array, "#batch some seq"]:
        """Mask the places that some token at the places `rows` sees."""
        place = jnp.arange(self.length)
        window = self.window
        seen = (place[None] <= rows[:, None])[None]
        if self.apart is not None:
            apart, other = self.apart
            window = jnp.where(apart, self.length if other is None else other, self.window or self.length)
        if window is not None:
            if self.positions is None:
                position = place[None]
            else:
                position = self.positions
            seen = seen & (position[:, rows, None] - position[:, None] < window)
        if self.segments is not None:
            seen = seen & (self.segments[:, rows, None] == self.segments[:, None])
        return seen


class Sight(NamedTuple):
    """What a layer sees: angles of positions, and which position sees which."""

    rotation: Rotation
    seen: Any
    """A rule (`Seen`); or, with caches, whether token t sees slot s, `[#batch, seq, seen]`."""
    apart: "Sight | None" = None
    """That of the layers of `Constants.apart`."""

    def of(self, apart: Any) -> "Sight":
        """Choose the sight of a layer: `apart` says whether it is one of those, None that there are none.

        It may be an input of a program, as in a loop over layers.
        """
        if self.apart is None or apart is None:
            return self
        if isinstance(apart, bool | np.bool_):
            if apart:
                return self.apart
            return self._replace(apart=None)
        rotation = jax.tree.map(lambda own, main: jnp.where(apart, own, main), self.apart.rotation, self.rotation)
        own = self.apart.seen
        main = self.seen
        if isinstance(own, Seen) and isinstance(main, Seen):
            return Sight(rotation, main if own.window == main.window else main._replace(apart=(apart, own.window)))
        return Sight(rotation, jnp.where(apart, self.apart.seen, self.seen))


def sight_of(
    length: int, head_dim: int, constants: Constants, *, positions: Places | None = None, segments: Places | None = None
) -> Sight:
    """Make the sight of layers in rows whose tokens are at 0 … length - 1, those before each and itself.

    Of packed rows, see `passes`, tokens are at any `positions`, and each sees its own segment.
    """

    def one(how: Constants | Apart) -> Sight:
        window = how.sliding_window  # w cuts off what is not t - w < s <= t
        seen = Seen(length, None if window is None or window >= length else window, None, positions, segments)
        return Sight(rotary(jnp.arange(length) if positions is None else positions, head_dim, how), seen)

    return one(constants)._replace(apart=None if constants.apart is None else one(constants.apart))


def apart_of(constants: Constants, bounds: Sequence[SegmentBounds]) -> list[Bool[np.ndarray, "layers"] | None]:
    """Mark for each segment the layers that are apart from the rest; None where no layer of the model is."""
    if constants.apart is None:
        return [None] * len(bounds)
    return [np.isin(np.arange(each.start, each.stop), constants.apart.layers) for each in bounds]


def rotary(positions: Int[Array, "*batch seq"], head_dim: int, how: Constants | Apart) -> Rotation:
    """Cosines and sines of the rotary embedding at positions, float32 `[*batch, seq, head_dim / 2]`.

    Source: RoFormer (arXiv:2104.09864) in the half-split layout of Hugging Face; `llama3` scaling as in Llama 3.1.
    """
    frequency = how.rope_theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    scaling = how.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        frequency = frequency / scaling.factor
    elif scaling is not None:
        turns = scaling.original_max_positions * frequency / (2 * jnp.pi)
        smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        smooth = jnp.clip(smooth, 0.0, 1.0)
        frequency = frequency * (smooth + (1 - smooth) / scaling.factor)
    angle = positions.astype(jnp.float32)[..., None] * frequency.reshape((1,) * positions.ndim + (-1,))
    return jnp.cos(angle), jnp.sin(angle)


def at_least_float32(dtype: Any) -> Any:
    """The dtype in which norms, softmax and losses are computed: float32, or float64 for float64 arrays."""
    if dtype == jnp.float64:
        return jnp.float64
    return jnp.float32


def rotate(x: Array, rotation: Rotation) -> Array:
    """Rotate each pair (x_i, x_{i + head_dim/2}) of `[batch, seq, ..., head_dim]` by its position's angle, in f32."""
    wide = at_least_float32(x.dtype)
    batch = rotation[0].shape[0] if rotation[0].ndim == 3 else 1
    shape = (batch, x.shape[1], *(1,) * (x.ndim - 3), x.shape[-1] // 2)
    cos, sin = (angle.reshape(shape).astype(wide) for angle in rotation)
    first, second = jnp.split(x.astype(wide), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


# --- paths -----------------------------------------------------------------------------------------


_PATH: Any = jax.make_user_context("auto")
"""The path that programs take, part of what `jax.jit` tells them apart by."""


def attending(path: AttentionPath) -> AbstractContextManager[None]:
    """Make a context in which programs are traced with another path."""
    return _PATH(path)


def attended(query: Queries, key: Keys, value: Keys, seen: Seen, scale: float) -> Queries:
    """Compute each query's mean of the values that it sees, weighted by the softmax of `scale` times the scores.

    Scores and softmax are float32 (at least).
    """
    path = plain if chosen(query) == "plain" else in_blocks
    return path(query, key, value, seen, scale)


def chosen(query: Queries) -> AttentionPath:
    """Choose the path for rows, `plain` or `blocks`; that of a layer without heads is plain."""
    if not query.size or whole(_PATH.value, query.shape[1]):
        return "plain"
    return "blocks"


def whole(path: AttentionPath, length: int) -> bool:
    """Say whether the scores of rows of `length` tokens are all in memory."""
    return path == "plain" or (path == "auto" and length <= LONG)


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
    wide = at_least_float32(query.dtype)
    dtype = query.dtype
    tensor = _tensor(kv_heads)
    if size is None:
        shards = 1
        if tensor:
            shards = jax.sharding.get_abstract_mesh().shape[tensor]
        size = block_of(length, (batch // batch_shards(batch)) * (kv_heads // shards) * q_per_kv)
    count = -(-length // size)
    rows = jnp.minimum(jnp.arange(count * size), length - 1).reshape(count, size)  # what is padded sees something too
    key = key.astype(wide)
    value = value.astype(wide)

    def block(inputs: tuple[Array, Array]) -> Array:
        some, places = inputs
        return plain(some, key.astype(dtype), value.astype(dtype), seen, scale, places)

    padded = jnp.pad(query, [(0, 0), (0, count * size - length)] + [(0, 0)] * 3)
    blocks = jnp.moveaxis(padded.reshape(batch, count, size, *query.shape[2:]), 1, 0)
    result = jax.lax.map(jax.checkpoint(block, prevent_cse=False), (blocks, rows))
    return jnp.moveaxis(result, 0, 1).reshape(padded.shape)[:, :length]


def block_of(length: int, heads: int) -> int:
    """Count the queries of a block of rows of `length` tokens, with so many query heads of rows on a device.

    >>> block_of(8192, 32), block_of(8192, 1), block_of(4096, 10**6)
    (128, 4096, 128)
    """
    most = SCORES // (4 * heads * length)
    return min(length, max(FEWEST, 2 ** int(math.log2(max(most, 1)))))


def _tensor(kv_heads: int) -> str | None:
    """Find the axis of the mesh over which KV heads are spread evenly."""
    shards = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    if shards > 1 and kv_heads % shards == 0:
        return "tensor"
    return None
