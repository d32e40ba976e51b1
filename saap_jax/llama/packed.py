"""Sequences that begin alike, packed into one row: what they share runs once. Log-likelihoods without all logits.

A row holds a shared beginning and then the rest of each sequence, its *branches*:

    tokens      The  cat  sat  |  on  the  mat  |  down
    segments     0    0    0      1    1    1       2
    positions    0    1    2      3    4    5       3

A branch sees the beginning and itself, and its positions go on from the beginning's, so that every hidden state is what
it would be with the sequence alone in a row. Padding has segment -1.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from saap_jax.llama.model import DecoderLayer, Llama, at_least_float32, decode, rematerialised
from saap_jax.llama.positions import apart_of, packed_sight
from saap_jax.llama.resume import VOCAB_CHUNK
from saap_jax.llama.segments import segment_bounds
from saap_jax.types import Remat

TARGETS = 64
"""Tokens whose log-likelihoods are computed at once: with `VOCAB_CHUNK`, all the logits that are in memory."""


def packed_hidden(
    model: Llama,
    tokens: Int[Array, "batch seq"],
    positions: Int[Array, "batch seq"],
    segments: Int[Array, "batch seq"],
    *,
    remat: Remat = "none",
) -> Float[Array, "batch seq embed"]:
    """Return the normalised last hidden states of packed rows.

    Args:
        positions: of each token within its own sequence.
        segments: 0 for the shared beginning, 1, 2, … for the branches, -1 for padding. Without any 0 the branches have
            nothing in common: each is a document of its own.
    """
    return packed_streams(model, tokens, positions, segments, remat=remat, kept=False)[0]


def packed_streams(
    model: Llama,
    tokens: Int[Array, "batch seq"],
    positions: Int[Array, "batch seq"],
    segments: Int[Array, "batch seq"],
    *,
    remat: Remat = "none",
    kept: bool = True,
    shared: bool = True,
) -> tuple[Float[Array, "batch seq embed"], Float[Array, "layers batch seq embed"] | None]:
    """Return the normalised last hidden states of packed rows, and if `kept` the residual stream behind each layer.

    Args:
        shared: whether rows may have a segment 0; False where each segment is known to be a document of its own.
    """
    head_dim, constants = model.segments[0].attention.output.shape[-2], model.constants
    sight = packed_sight(positions, segments, head_dim, constants, shared=shared)
    x, streams = model.embedded(tokens), []
    for segment, apart in zip(model.segments, apart_of(constants, segment_bounds(model.segments)), strict=True):

        def layer(x: Array, inputs: tuple[DecoderLayer, Any]) -> tuple[Array, Any]:
            behind, _ = decode(inputs[0], x, None, sight.of(inputs[1]), constants)
            return behind, behind if kept else None

        x, each = jax.lax.scan(rematerialised(layer, remat), x, (segment, apart))
        streams.append(each)
    return model.final(x), jnp.concatenate(streams) if kept else None


def log_likelihoods_of(
    model: Llama,
    hidden: Float[Array, "positions embed"],
    source: Int[Array, "targets"],
    target: Int[Array, "targets"],
    count: Int[Array, ""],
) -> tuple[Float[Array, "targets"], Bool[Array, "targets"]]:
    """Return log p(target | hidden[source]) in nats, and whether the target is the likeliest token, for the first
    `count` targets; the others are whatever.

    Only hidden states that predict a target are projected on the vocabulary, `TARGETS` at once, and log Σ_v exp(z_v) is
    gathered over chunks of it, as in `resume.summed_losses`. The number of targets has to be a multiple of `TARGETS`.
    """
    wide = at_least_float32(hidden.dtype)

    def some(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        start = index * TARGETS
        rows = hidden[jax.lax.dynamic_slice_in_dim(source, start, TARGETS)]
        values = _gather(model, rows, jax.lax.dynamic_slice_in_dim(target, start, TARGETS))
        own, every = (jax.lax.dynamic_update_slice_in_dim(c, v, start, 0) for c, v in zip(carry, values, strict=True))
        return own, every

    nothing = (jnp.zeros(target.shape, wide), jnp.zeros(target.shape, bool))
    return jax.lax.fori_loop(0, (count + TARGETS - 1) // TARGETS, some, nothing)


def _gather(
    model: Llama, hidden: Float[Array, "some embed"], target: Int[Array, "some"]
) -> tuple[Float[Array, "some"], Bool[Array, "some"]]:
    tied, dtype = model.unembedding is None, at_least_float32(hidden.dtype)
    table = model.embedding[...] if model.unembedding is None else model.unembedding[...]
    axis, product = (0, "td,vd->tv") if tied else (1, "td,dv->tv")
    vocab, chunk = table.shape[axis], min(VOCAB_CHUNK, table.shape[axis])

    def gather(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        highest, total, own = carry
        start = jnp.minimum(index * chunk, vocab - chunk)  # the last chunk overlaps the one before
        piece = jax.lax.dynamic_slice_in_dim(table, start, chunk, axis)
        z = jnp.einsum(product, hidden, piece, preferred_element_type=dtype)
        place = target - start
        here = jnp.take_along_axis(z, jnp.clip(place, 0, chunk - 1)[:, None], axis=1)[:, 0]
        own = jnp.where((target >= index * chunk) & (place < chunk), here, own)
        z = jnp.where((start + jnp.arange(chunk) >= index * chunk)[None], z, -jnp.inf)
        higher = jnp.maximum(highest, jnp.max(z, axis=-1))
        return higher, total * jnp.exp(highest - higher) + jnp.sum(jnp.exp(z - higher[:, None]), axis=-1), own

    nothing = (jnp.full(target.shape, -jnp.inf, dtype), *(jnp.zeros(target.shape, dtype) for _ in range(2)))
    highest, total, own = jax.lax.fori_loop(0, -(-vocab // chunk), gather, nothing)
    return own - highest - jnp.log(total), own >= highest
