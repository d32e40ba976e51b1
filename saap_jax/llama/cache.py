"""Keys and values of the tokens seen so far, and the decoder that reads and extends them.

A cache has one pair of arrays a run, `[layers, batch, kv_heads, slots, head_dim]`: what a layer's query heads share
(GQA) is stored once, and a layer without heads stores nothing. Prompts of one batch end at the same slot, with their
padding on the left: row b starts at slot `start[b]`, which is its position 0. So every row writes to the same slot, and
one update in place serves all.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from saap_jax.llama.model import (
    DecoderLayer,
    Llama,
    Rotation,
    add_bias,
    at_least_float32,
    feed,
    project,
    rms_norm,
    rotary_at,
)


class RunCache(NamedTuple):
    """Keys (turned to their positions) and values of the layers of one run."""

    keys: Float[Array, "layers batch kv_heads slots head_dim"]
    values: Float[Array, "layers batch kv_heads slots head_dim"]


Cache = list[RunCache]
"""One for each run of the model."""


def empty_cache(model: Llama, batch: int, slots: int) -> Cache:
    """Return a cache for `slots` tokens a row, zeros in the dtype of the model."""

    def zeros(run: DecoderLayer) -> Array:
        head_dim = run.attention.query.shape[-1]
        return jnp.zeros((run.length, batch, run.widths.kv_heads, slots, head_dim), run.attention.query.dtype)

    return [RunCache(zeros(run), zeros(run)) for run in model.runs]


def cache_bytes(model: Llama, batch: int, slots: int) -> int:
    """Return the bytes of such a cache."""
    shapes = jax.eval_shape(lambda: empty_cache(model, batch, slots))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def single_layers(model: Llama) -> Llama:
    """Return the same model with every layer as a run of its own, which is how a CPU decodes fastest.

    A scan over the layers of a run copies each layer's weights out of the stack before it uses them. A decoder that
    makes one token reads all weights once, so on a CPU that copy doubles its time. The layers are copied here, once,
    and each has its arrays to itself; embeddings are shared with `model`. Memory: one more copy of the layers' weights
    as long as `model` is kept. A model whose runs are single layers already is returned as it is.
    """
    if all(run.length == 1 for run in model.runs):
        return model
    graph, rest = nnx.split(model)
    single = nnx.merge(graph, rest)
    single.runs = nnx.List(
        [
            jax.tree.map(lambda leaf, index=index: leaf[index : index + 1], run)
            for run in model.runs
            for index in range(run.length)
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
    window: int,
) -> tuple[Float[Array, "batch seq embed"], Cache]:
    """Write `tokens` to the slots from `slot` on; return their normalised last hidden states, and the cache.

    `window` is how many slots, from the first, are looked at: all that are filled once the tokens are in.
    """
    slots = slot + jnp.arange(tokens.shape[1])
    positions = jnp.maximum(slots[None] - start[:, None], 0)
    rotation = rotary_at(positions, model.runs[0].attention.query.shape[-1], model.constants)
    keys = jnp.arange(window)
    visible = (keys[None, None] >= start[:, None, None]) & (keys[None, None] <= slots[None, :, None])
    x = model.embedding[...][tokens]
    extended = []
    for run, run_cache in zip(model.runs, cache, strict=True):

        def step(
            carry: tuple[Array, RunCache], inputs: tuple[DecoderLayer, Array]
        ) -> tuple[tuple[Array, RunCache], None]:
            layer, index = inputs
            return _layer(layer, index, *carry, rotation, visible, slot, model.constants.norm_eps), None

        if run.length == 1:  # no loop, hence no copy of the weights out of a stack
            (x, run_cache), _ = step((x, run_cache), (jax.tree.map(lambda leaf: leaf[0], run), jnp.int32(0)))
        else:
            (x, run_cache), _ = jax.lax.scan(step, (x, run_cache), (run, jnp.arange(run.length, dtype=jnp.int32)))
        extended.append(run_cache)
    return rms_norm(x, model.norm[...], model.constants.norm_eps), extended


def _layer(
    layer: DecoderLayer,
    index: Int[Array, ""],
    x: Float[Array, "batch seq embed"],
    cache: RunCache,
    rotation: Rotation,
    visible: Array,
    slot: Int[Array, ""],
    norm_eps: float,
) -> tuple[Float[Array, "batch seq embed"], RunCache]:
    """Apply layer `index` of a run, extending its part of the run's cache."""
    middle, cache = _attend(
        layer, index, rms_norm(x, layer.attention_norm[...], norm_eps), cache, rotation, visible, slot
    )
    x = x + add_bias(jnp.einsum("btkgh,kghd->btd", middle, layer.attention.output[...]), layer.attention.output_bias)
    channels = feed(layer.mlp, rms_norm(x, layer.mlp_norm[...], norm_eps))
    return x + add_bias(jnp.einsum("btf,fd->btd", channels, layer.mlp.down[...]), layer.mlp.down_bias), cache


def _attend(
    layer: DecoderLayer,
    index: Int[Array, ""],
    x: Float[Array, "batch seq embed"],
    cache: RunCache,
    rotation: Rotation,
    visible: Array,
    slot: Int[Array, ""],
) -> tuple[Float[Array, "batch seq kv_heads q_per_kv head_dim"], RunCache]:
    """Attention of new tokens to the cache, up to, not including, the output projection; softmax in float32."""
    query, key, value = project(layer.attention, x, rotation)
    if not query.shape[2]:  # a layer without heads
        return query, cache
    place = (index, 0, 0, slot, 0)
    cache = RunCache(
        *(
            jax.lax.dynamic_update_slice(old, jnp.swapaxes(new, 1, 2)[None], place)
            for old, new in zip(cache, (key, value), strict=True)
        )
    )
    window, wide = visible.shape[-1], at_least_float32(x.dtype)
    keys, values = (jax.lax.dynamic_index_in_dim(array, index, keepdims=False)[:, :, :window] for array in cache)
    scores = jnp.einsum("btkgh,bksh->bkgts", query, keys, preferred_element_type=wide) * query.shape[-1] ** -0.5
    # Not -inf: a padding token sees nothing, and its NaN would spread to the rows that multiply it by zero.
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(wide).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
    return jnp.einsum("bkgts,bksh->btkgh", weights, values), cache
