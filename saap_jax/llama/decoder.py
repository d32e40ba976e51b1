"""A model that decodes: its cache of keys and values, and the form in which a CPU reads its matrices fastest.

A cache has one pair of arrays a segment. What a layer's query heads share (GQA) is stored once, and a layer without
heads stores nothing. Prompts of one batch end at the same slot, with their padding on the left: row b starts at slot
`start[b]`, which is its position 0. So every row writes to the same slot, and one update in place serves all. The
shapes are chosen for XLA on a CPU, which works in place only where no reshape stands between an update and the product
that reads it: a layer's keys are `[batch * kv_heads, slots, head_dim]`, as a batched product wants them.

One token a row makes every product of a layer a matrix times a vector, whose time is that of reading the matrix; below
a few megabytes XLA gives it one core. Two things help. Query, key and value read the same normalised activations, and
so do gate and up, so each group is one product of a larger matrix. And a matrix whose inputs are split in as many parts
as there are cores is a batch of products, which XLA does give to all of them: a narrow (cut) layer is then read as fast
as a wide one. Measured by `experiments/benchmarks/matrix_vector.py`.
"""

import math
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from saap_jax.llama.model import (
    Attention,
    DecoderLayer,
    Llama,
    Mlp,
    at_least_float32,
    feed,
    param,
    post_normed,
    project,
    rms_norm,
    written_by,
)
from saap_jax.llama.positions import Seen, Sight, apart_of, rotary
from saap_jax.llama.product import Matrix, added, product, sides
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
    single = nnx.merge(*nnx.split(model))
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
        # A table, made when the program is traced: XLA would take sines and cosines into every layer that uses them, a
        # twentieth of the time of a prompt on a CPU.
        with jax.ensure_compile_time_eval():
            cos, sin = rotary(count, head_dim, how)
        return Sight((cos[positions], sin[positions]), allowed)

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


# --- the form of a CPU --------------------------------------------------------------------------


class Shared(Matrix):
    """A matrix in as many parts as there are cores, each for as many inputs; what does not divide is a part of its own.

    A product with one row of activations is a batch of one product a part; with more rows, for which that is slower, it
    is the ordinary one.
    """

    def __init__(self, axes: tuple[str, ...], value: Float[Array, "layers *sizes"], parts: int) -> None:
        self.axes = axes
        self.sizes = value.shape[1:]
        inputs, outputs = (math.prod(side) for side in sides(axes[1:], self.sizes))
        each = inputs // parts
        flat = value.reshape(value.shape[0], inputs, outputs)
        whole = flat[:, : each * parts].reshape(value.shape[0], parts, each, outputs)
        self.parts = param(("layers", "parts", "inputs", "outputs"), whole)
        self.rest = param(("layers", "inputs", "outputs"), flat[:, each * parts :])

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.parts.shape[:-3], *self.sizes)

    def product(self, equation: str, x: Array) -> Array:
        batch, seq = x.shape[:2]
        parts, each, outputs = self.parts.shape
        flat = x.reshape(batch * seq, math.prod(x.shape[2:]))
        main, rest = jnp.split(flat, [parts * each], axis=-1)
        if batch * seq == 1:
            y = jnp.einsum("pi,pio->po", main.reshape(parts, each), self.parts[...]).sum(axis=0, keepdims=True)
        else:
            y = main @ self.parts[...].reshape(parts * each, outputs)
        if rest.size:
            y = y + rest @ self.rest[...]
        return y.reshape(batch, seq, *sides(self.axes[1:], self.sizes)[1])

    def dense(self) -> Array:
        layers = self.parts.shape[:-3]
        parts, each, outputs = self.parts.shape[-3:]
        flat = self.parts[...].reshape(*layers, parts * each, outputs)
        return jnp.concatenate([flat, self.rest[...]], axis=-2).reshape(self.shape)


class FusedAttention(Attention):
    """Attention whose query, key and value heads are columns of one matrix, in that order, and nowhere else."""

    def __init__(self, attention: Attention, parts: int) -> None:
        layers, embed = attention.query.shape[:2]
        columns = [part[...].reshape(layers, embed, -1) for part in (attention.query, attention.key, attention.value)]
        self.inputs = Shared(("layers", "embed", "heads"), jnp.concatenate(columns, axis=-1), parts)
        for name in ("output", "output_bias", "query_bias", "key_bias", "value_bias", "query_norm", "key_norm"):
            setattr(self, name, getattr(attention, name))

    def heads(
        self, x: Float[Array, "batch seq embed"]
    ) -> tuple[
        Float[Array, "batch seq kv_heads q_per_kv head_dim"],
        Float[Array, "batch seq kv_heads head_dim"],
        Float[Array, "batch seq kv_heads head_dim"],
    ]:
        """Return queries, keys and values, as `Attention.heads`."""
        kv_heads, q_per_kv, head_dim, _ = self.output.shape
        columns = product("btd,df->btf", x, self.inputs)
        queries, own = kv_heads * q_per_kv * head_dim, kv_heads * head_dim
        query, key, value = jnp.split(columns, (queries, queries + own), axis=-1)
        single = (*x.shape[:2], kv_heads, head_dim)
        return query.reshape(*x.shape[:2], kv_heads, q_per_kv, head_dim), key.reshape(single), value.reshape(single)


class FusedMlp(Mlp):
    """Feed-forward block whose gate and up matrices are columns of one matrix, in that order, and nowhere else."""

    def __init__(self, mlp: Mlp, parts: int) -> None:
        columns = jnp.concatenate([mlp.gate[...], mlp.up[...]], axis=-1)
        self.inputs = Shared(("layers", "embed", "mlp"), columns, parts)
        self.down, self.down_bias, self.router = mlp.down, mlp.down_bias, None

    def halves(
        self, x: Float[Array, "batch seq embed"]
    ) -> tuple[Float[Array, "batch seq mlp"], Float[Array, "batch seq mlp"]]:
        """Return what the gate and the up matrix make, as `Mlp.halves`."""
        gate, up = jnp.split(product("btd,df->btf", x, self.inputs), 2, axis=-1)
        return gate, up


def fused_layers(model: Llama, parts: int | None = None) -> Llama:
    """Return the same function for `prefill` and `decode_steps`: `single_layers`, their matrices fused and shared out.

    A matrix that is not plain (quantised, adapted) stays as it is, and so do those beside it that read the same. For
    decoding only: what reads matrices by name (pruning, saving, compensation) wants the model that this was made of.

    Args:
        model: dense or cut.
        parts: in how many parts inputs are split; None for the number of cores.
    """
    if all(isinstance(segment.attention, FusedAttention) for segment in model.segments):
        return model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = parts or cores
    fused = nnx.merge(*nnx.split(single_layers(model)))
    for segment in fused.segments:
        if _plain(segment.attention.query, segment.attention.key, segment.attention.value):
            segment.attention = FusedAttention(segment.attention, parts)
        if segment.mlp.router is None and _plain(segment.mlp.gate, segment.mlp.up):
            segment.mlp = FusedMlp(segment.mlp, parts)
        for block, name in ((segment.attention, "output"), (segment.mlp, "down")):
            if _plain(matrix := getattr(block, name)):
                setattr(block, name, Shared(matrix.axes, matrix[...], parts))
    return fused


def _plain(*matrices: object) -> bool:
    return all(isinstance(matrix, nnx.Param) for matrix in matrices)
