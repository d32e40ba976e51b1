"""Keys and values of the tokens seen so far, and the decoder that reads and extends them.

A cache has one pair of arrays a segment. What a layer's query heads share (GQA) is stored once, and a layer without
heads stores nothing. Prompts of one batch end at the same slot, with their padding on the left: row b starts at slot
`start[b]`, which is its position 0. So every row writes to the same slot, and one update in place serves all.

The shapes are chosen for XLA on a CPU, which works in place only where no reshape stands between an update and the
product that reads it: a layer's keys are `[batch * kv_heads, slots, head_dim]`, as a batched product wants them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from saap_jax.llama.model import (
    Attention,
    DecoderLayer,
    Llama,
    at_least_float32,
    feed,
    post_normed,
    project,
    rms_norm,
    written_by,
)
from saap_jax.llama.positions import Rotation, Seen, Sight, apart_of, rotary
from saap_jax.llama.product import added, product
from saap_jax.llama.segments import segment_bounds
from saap_jax.llama.spec import Apart, Constants


class SegmentCache(NamedTuple):
    """Keys (turned to their positions) and values of a segment; one of a single layer has no `layers` axis.

    An entry of the axis `heads` is a key/value head of a row of the batch: batch * kv_heads of them.
    """

    keys: Float[Array, "*layers heads slots head_dim"]
    values: Float[Array, "*layers heads slots head_dim"]


Cache = list[SegmentCache]
"""One for each segment of the model."""


def empty_cache(model: Llama, batch: int, slots: int) -> Cache:
    """Return a cache for `slots` tokens a row, zeros in the dtype of the model."""

    def zeros(segment: DecoderLayer) -> Array:
        shape = (batch * segment.widths.kv_heads, slots, segment.attention.output.shape[-2])
        return jnp.zeros(shape if segment.length == 1 else (segment.length, *shape), model.embedding.dtype)

    return [SegmentCache(zeros(segment), zeros(segment)) for segment in model.segments]


def cache_bytes(model: Llama, batch: int, slots: int) -> int:
    """Return the bytes of such a cache."""
    shapes = jax.eval_shape(lambda: empty_cache(model, batch, slots))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def single_layers(model: Llama) -> Llama:
    """Return the same model with every layer as a segment of its own, which is how a CPU decodes fastest.

    A scan over the layers of a segment copies each layer's weights out of the stack before it uses them. A decoder that
    makes one token reads all weights once, so on a CPU that copy doubles its time. The layers are copied here, once,
    and each has its arrays to itself; embeddings are shared with `model`. Memory: one more copy of the layers' weights
    as long as `model` is kept. A model whose segments are single layers already is returned as it is.
    """
    if all(segment.length == 1 for segment in model.segments):
        return model
    graph, rest = nnx.split(model)
    single = nnx.merge(graph, rest)
    single.segments = nnx.List(
        [
            jax.tree.map(lambda leaf, index=index: leaf[index : index + 1], segment)
            for segment in model.segments
            for index in range(segment.length)
        ]
    )
    return single


def extend(
    model: Llama,
    tokens: Int[Array, "batch seq"],
    cache: Cache,
    start: Int[Array, "batch"],
    slot: Int[Array, ""],
    *,
    empty: bool,
) -> tuple[Float[Array, "batch seq embed"], Cache]:
    """Write `tokens` to the slots from `slot` on; return their normalised last hidden states, and the cache.

    `empty` says that nothing is in the cache yet, so that the tokens have only each other to look at.
    """
    slots = slot + jnp.arange(tokens.shape[1])
    positions = jnp.maximum(slots[None] - start[:, None], 0)
    count = max(segment.keys.shape[-2] for segment in cache)
    seen = slots if empty else jnp.arange(count)
    visible = (seen[None, None] >= start[:, None, None]) & (seen[None, None] <= slots[None, :, None])
    constants, head_dim = model.constants, model.segments[0].attention.output.shape[-2]

    def one(how: Constants | Apart) -> Sight:
        allowed = visible
        if (window := how.sliding_window) is not None and window < count:  # slots are as far apart as positions
            allowed = visible & (seen[None, None] > slots[None, :, None] - window)
        return Sight(_rotation(positions, count, head_dim, how), allowed)

    sight = one(constants)._replace(apart=None if constants.apart is None else one(constants.apart))

    def step(x: Array, inputs: tuple[DecoderLayer, SegmentCache, Any]) -> tuple[Array, SegmentCache]:
        layer, layer_cache, apart = inputs
        return _layer(layer, layer_cache, x, sight.of(apart), slot, constants, empty)

    x = model.embedded(tokens)
    extended = []
    for segment, segment_cache, apart in zip(
        model.segments, cache, apart_of(constants, segment_bounds(model.segments)), strict=True
    ):
        if segment.length == 1:  # no loop: a scan would copy the layer out of its stack before using it
            one_layer = jax.tree.map(lambda leaf: leaf[0], segment)
            x, segment_cache = step(x, (one_layer, segment_cache, None if apart is None else bool(apart[0])))
        else:
            x, segment_cache = jax.lax.scan(step, x, (segment, segment_cache, apart))
        extended.append(segment_cache)
    return model.final(x), extended


def _rotation(positions: Int[Array, "batch seq"], count: int, head_dim: int, how: Constants | Apart) -> Rotation:
    """Look up the rotation of positions below `count` in a table, made when the program is traced.

    XLA would take sines and cosines into every layer that uses them, a twentieth of the time of a prompt on a CPU.
    """
    with jax.ensure_compile_time_eval():
        cos, sin = rotary(count, head_dim, how)
    return cos[positions], sin[positions]


def _layer(
    layer: DecoderLayer,
    cache: SegmentCache,
    x: Float[Array, "batch seq embed"],
    sight: Sight,
    slot: Int[Array, ""],
    constants: Constants,
    empty: bool,
) -> tuple[Float[Array, "batch seq embed"], SegmentCache]:
    """Apply one layer to new tokens, extending its cache."""
    attention, mlp = layer.attention, layer.mlp
    if cache.keys.size:
        normed = rms_norm(x, layer.attention_norm[...], constants)
        heads, cache = _attend(attention, normed, cache, sight, slot, constants, empty)
        # As a matrix, because with several axes to sum over XLA may reorder the weights instead of the activations.
        written = added(product("btf,fd->btd", heads, attention.output), attention.output_bias)
        x = x + post_normed(written, layer.attention_post_norm, constants)
    elif attention.output_bias is not None:
        bias = jnp.broadcast_to(attention.output_bias[...][None, None], x.shape)
        x = x + post_normed(bias, layer.attention_post_norm, constants)
    written = written_by(mlp, feed(mlp, rms_norm(x, layer.mlp_norm[...], constants), constants))
    return x + post_normed(written, layer.mlp_post_norm, constants), cache


def _attend(
    attention: Attention,
    x: Float[Array, "batch seq embed"],
    cache: SegmentCache,
    sight: Sight,
    slot: Int[Array, ""],
    constants: Constants,
    empty: bool,
) -> tuple[Float[Array, "batch seq heads_times_dim"], SegmentCache]:
    """Attention of new tokens, up to, not including, the output projection; scores and softmax in float32.

    Letters: r a key/value head of a row, s a slot, q a query (of g query heads and t tokens), h head_dim.
    """
    assert not isinstance(sight.seen, Seen)
    query, key, value = project(attention, x, sight.rotation, constants)
    batch, seq, kv_heads, q_per_kv, head_dim = query.shape
    new = [jnp.swapaxes(array, 1, 2).reshape(-1, seq, head_dim) for array in (key, value)]
    cache = SegmentCache(*(jax.lax.dynamic_update_slice(c, n, (0, slot, 0)) for c, n in zip(cache, new, strict=True)))
    keys, values = new if empty else cache
    wide = at_least_float32(x.dtype)
    queries = query.transpose(0, 2, 3, 1, 4).reshape(batch * kv_heads, q_per_kv * seq, head_dim)
    scores = jnp.einsum("rsh,rqh->rsq", keys, queries, preferred_element_type=wide)
    scores = scores * (constants.query_scalar or head_dim) ** -0.5
    scores = jnp.swapaxes(scores, 1, 2).reshape(batch, kv_heads, q_per_kv, seq, -1)
    # Not -inf: a padding token sees nothing, and its NaN would spread to the rows that multiply it by zero.
    scores = jnp.where(sight.seen[:, None, None], scores, jnp.finfo(wide).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype).reshape(*queries.shape[:2], -1)
    mixed = jnp.einsum("rqs,rsh->rqh", weights, values).reshape(batch, kv_heads, q_per_kv, seq, head_dim)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, seq, -1), cache
