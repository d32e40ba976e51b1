"""Parts of a forward pass: some of the layers, from a residual stream that is at hand; the loss without all logits.

What many variants of a model have in common is computed once; only the layers behind the first difference run again.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from saap_jax.llama.model import DecoderLayer, Llama, at_least_float32, decode
from saap_jax.llama.positions import apart_of, sight_of
from saap_jax.llama.segments import segment_bounds, split_gates
from saap_jax.types import Gates

VOCAB_CHUNK = 1024
"""Logits that are in memory at once, a token: they stay in the cache, and large vocabularies fit."""


def run_layers(
    model: Llama,
    x: Float[Array, "examples seq embed"],
    start: Int[Array, ""] | int,
    stop: Int[Array, ""] | int,
    gates: Gates | None = None,
) -> Float[Array, "examples seq embed"]:
    """Return the residual stream behind the layers `start … stop - 1`; `x` is the one before layer `start`.

    The bounds are inputs: loops with dynamic bounds over the stacked parameters, one a segment, of which
    those outside turn zero times. The cost is that of the layers between, and no pair of bounds compiles anew.

    Args:
        gates: whole-model, `[layers, units]` or `[examples, layers, units]`; None stands for all ones.
    """
    sight = sight_of(x.shape[1], model.segments[0].attention.output.shape[-2], model.constants)
    bounds = segment_bounds(model.segments)
    parts = model.segments, split_gates(gates, bounds), apart_of(model.constants, bounds), bounds
    for segment, segment_gates, apart, place in zip(*parts, strict=True):

        def layer(
            index: Array, x: Array, segment: DecoderLayer = segment, own: tuple[Any, Any] = (segment_gates, apart)
        ) -> Array:
            own_gates, own_apart = (None if each is None else layer_of(each, index) for each in own)
            seen = sight.of(own_apart)
            return decode(layer_of(segment, index), x, own_gates, seen, model.constants)[0]

        first, last = (jnp.clip(jnp.asarray(bound) - place.start, 0, segment.length) for bound in (start, stop))
        x = jax.lax.fori_loop(first, last, layer, x)
    return x


def layer_of(segment: Any, layer: Int[Array, ""]) -> Any:
    """Return the parameters of one layer of a segment, by its number within it."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), segment)


def summed_losses(
    model: Llama,
    hidden: Float[Array, "units batch seq embed"],
    tokens: Int[Array, "batch seq"],
    mask: Bool[Array, "batch seq"],
) -> Float[Array, "units batch"]:
    """Return each example's summed next-token loss, as `next_token_losses` does, from normalised last hidden states.

    log Σ_v exp(z_v) is gathered over chunks of the vocabulary, so that the logits z are never in memory at once.
    """
    tied, dtype = model.unembedding is None, at_least_float32(hidden.dtype)
    table = model.embedding[...] if model.unembedding is None else model.unembedding[...]
    axis, product = (0, "ubtd,vd->ubtv") if tied else (1, "ubtd,dv->ubtv")
    vocab, chunk = table.shape[axis], min(VOCAB_CHUNK, table.shape[axis])
    hidden, target = hidden[:, :, :-1], tokens[:, 1:]

    def gather(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        highest, total = carry
        start = jnp.minimum(index * chunk, vocab - chunk)  # the last chunk overlaps the one before
        piece = jax.lax.dynamic_slice_in_dim(table, start, chunk, axis)
        z = jnp.einsum(product, hidden, piece, preferred_element_type=dtype)
        new = start + jnp.arange(chunk) >= index * chunk
        z = jnp.where(new[None, None, None], z, -jnp.inf)
        higher = jnp.maximum(highest, jnp.max(z, axis=-1))
        return higher, total * jnp.exp(highest - higher) + jnp.sum(jnp.exp(z - higher[..., None]), axis=-1)

    nothing = (jnp.full(hidden.shape[:3], -jnp.inf, dtype), jnp.zeros(hidden.shape[:3], dtype))
    highest, total = jax.lax.fori_loop(0, -(-vocab // chunk), gather, nothing)
    rows = table[target] if tied else jnp.moveaxis(table[:, target], 0, -1)
    losses = highest + jnp.log(total) - jnp.einsum("ubtd,btd->ubt", hidden, rows, preferred_element_type=dtype)
    return jnp.sum(jnp.where(mask[None, :, 1:], losses, 0), axis=-1)
