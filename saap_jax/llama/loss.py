"""The next-token loss: what estimation differentiates and what evaluation exponentiates."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from saap_jax.llama.attention import at_least_float32
from saap_jax.llama.model import Llama, Observe, projected
from saap_jax.runtime.constraints import batch_shards, vocab_shards
from saap_jax.types import Gates, Remat

LOGITS = 2**28
"""Bytes of logits that a device has in memory at once; see `over_positions`."""

VOCAB_CHUNK = 1024
TARGETS = 64
"""Words, and tokens, whose logits `summed_losses` and `log_likelihoods_of` have in memory at once: they stay in the
cache, and large vocabularies fit."""

LOGITS_ONCE = 2**26
"""The same where no logits are made twice, so that chunks cost little."""

ROWS_ONCE = 256
"""Tokens of a chunk, at least, there: each chunk reads all the words, which takes its time where they are many."""


def next_token_losses(
    model: Llama,
    tokens: Int[Array, "batch seq"],
    mask: Bool[Array, "batch seq"],
    gates: Gates | None = None,
    *,
    observe: Observe | None = None,
    remat: Remat = "none",
    once: bool = False,
) -> tuple[Float[Array, "batch"], list]:
    """Return each example's summed next-token loss in nats, float32 (at least), and what `observe` made of segments.

    Position t predicts token t + 1; it counts where that token is real (`mask`). Divide by `predicted_tokens` for the
    mean. Padding on the right changes neither the loss nor any gradient.

    Args:
        once: make the gradient by the hidden states beside the losses, a few positions at a time: logits are made once
            and never all in memory. For first derivatives; the words' own gradient, if it is used, makes them again.
    """
    hidden, observed = model.hidden(tokens, gates, observe=observe, remat=remat)
    before = hidden[:, :-1]
    target = tokens[:, 1:]
    losses: Array
    if once:
        losses = _losses_once(model.embedding.shape[0], model.unembedding is None, before, target, model.words())
    else:
        losses = over_positions(
            lambda hidden, own: token_losses(model.logits(hidden), own), before, target, logits=[model]
        )
    return jnp.sum(jnp.where(mask[:, 1:], losses, 0), axis=-1), observed


def token_losses(logits: Float[Array, "batch seq vocab"], target: Int[Array, "batch seq"]) -> Float[Array, "batch seq"]:
    """Return -log p(target) in nats."""
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]


def over_positions(
    function: Callable[..., Any], *arrays: Shaped[Array, "batch seq ..."], logits: Sequence[Llama]
) -> Any:
    """Return `function(*arrays)`, whose results are `[batch, seq, ...]` too, in chunks of positions.

    Where the logits of all positions would take more than `LOGITS` bytes on a device, as with a vocabulary of 262,144
    words, the function sees some positions at a time, and a backward pass computes it again chunk by chunk: one more
    product with the vocabulary, and never all logits in memory. Else it is called once, and nothing is done twice.

    Args:
        logits: the models whose logits the function has in memory at once.
    """
    words = [model.embedding for model in logits]
    each = sum(_bytes_of_logits(len(arrays[0]), each.shape[0], each.dtype) for each in words)
    count = _chunks(arrays[0], each, LOGITS)
    if count == 1:
        return function(*arrays)
    return _mapped(jax.checkpoint(lambda inputs: function(*inputs), prevent_cse=False), arrays, count)


def _chunks(array: Shaped[Array, "batch seq ..."], each: int, most: int) -> int:
    """Count the chunks of positions that need no more than `most` bytes, with `each` for a position."""
    return max(1, min(array.shape[1], -(-array.shape[1] * each // most)))


def _mapped(function: Callable[[Any], Any], arrays: Sequence[Shaped[Array, "batch seq ..."]], count: int) -> Any:
    """Map a function over `count` chunks of positions of a tuple of arrays `[batch, seq, ...]`, and join."""
    batch, length = arrays[0].shape[:2]
    each = -(-length // count)
    count = -(-length // each)

    def split(array: Array) -> Array:
        padded = jnp.pad(array, [(0, 0), (0, count * each - length)] + [(0, 0)] * (array.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, count, each, *array.shape[2:]), 1, 0)

    def joined(array: Array) -> Array:
        return jnp.moveaxis(array, 0, 1).reshape(batch, count * each, *array.shape[3:])[:, :length]

    return jax.tree.map(joined, jax.lax.map(function, tuple(split(array) for array in arrays)))


def _bytes_of_logits(batch: int, vocab: int, dtype: Any) -> int:
    """Count the bytes of the logits of one position of each example on a device."""
    rows = batch // batch_shards(batch)
    words = vocab // vocab_shards(vocab)
    return rows * words * jnp.dtype(at_least_float32(dtype)).itemsize


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _losses_once(vocab: int, tied: bool, hidden: Array, target: Array, words: Array) -> Float[Array, "batch seq"]:
    """Return the losses of `token_losses`, in chunks of positions."""
    return _in_chunks(vocab, hidden, target, lambda some, own: token_losses(projected(some, words, tied), own))


def _in_chunks(vocab: int, hidden: Array, target: Array, function: Callable[[Array, Array], Any]) -> Any:
    each = _bytes_of_logits(len(hidden), vocab, hidden.dtype)
    rows = len(hidden) // batch_shards(len(hidden))
    most = max(LOGITS_ONCE, -(-ROWS_ONCE // rows) * each)
    return _mapped(lambda inputs: function(*inputs), (hidden, target), _chunks(hidden, each, most))


def _losses_and_gradient(vocab: int, tied: bool, hidden: Array, target: Array, words: Array) -> tuple[Array, Any]:
    def both(some: Array, own: Array) -> tuple[Array, Array]:
        losses, pull = jax.vjp(lambda some: token_losses(projected(some, words, tied), own), some)
        return losses, pull(jnp.ones_like(losses))[0]  # positions do not mix: each row is that of its own loss

    losses, gradient = _in_chunks(vocab, hidden, target, both)
    return losses, (gradient, hidden, target, words)


def _pulled(vocab: int, tied: bool, kept: Any, cotangent: Array) -> tuple[Array, None, Array]:
    gradient, hidden, target, words = kept

    def of_words(words: Array) -> Array:
        some = jax.checkpoint(lambda some, own: token_losses(projected(some, words, tied), own), prevent_cse=False)
        return jnp.sum(_in_chunks(vocab, hidden, target, some) * cotangent)

    return gradient * cotangent[..., None].astype(gradient.dtype), None, jax.grad(of_words)(words)


_losses_once.defvjp(_losses_and_gradient, _pulled)


def predicted_tokens(mask: Bool[Array, "batch seq"]) -> Int[Array, "batch"]:
    """Count the tokens of each example that enter its loss: all real ones but the first."""
    return jnp.sum(mask[:, 1:], axis=-1)


# --- without all logits ----------------------------------------------------------------------------


def summed_losses(
    model: Llama,
    hidden: Float[Array, "units batch seq embed"],
    tokens: Int[Array, "batch seq"],
    mask: Bool[Array, "batch seq"],
) -> Float[Array, "units batch"]:
    """Return each example's summed next-token loss, as `next_token_losses` does, from normalised last hidden states.

    Logits are never in memory at once.
    """
    hidden, target, dtype = hidden[:, :, :-1], tokens[:, 1:], at_least_float32(hidden.dtype)
    highest, total, _ = _over_words(model, hidden)
    if model.unembedding is None:
        rows = model.embedding[target]
    else:
        rows = jnp.moveaxis(model.unembedding[:, target], 0, -1)
    losses = highest + jnp.log(total) - jnp.einsum("ubtd,btd->ubt", hidden, rows, preferred_element_type=dtype)
    return jnp.sum(jnp.where(mask[None, :, 1:], losses, 0), axis=-1)


def log_likelihoods_of(
    model: Llama,
    hidden: Float[Array, "positions embed"],
    source: Int[Array, "targets"],
    target: Int[Array, "targets"],
    count: Int[Array, ""],
) -> tuple[Float[Array, "targets"], Bool[Array, "targets"]]:
    """Return log p(target | hidden[source]) in nats, and whether the target is the likeliest token, for the first
    `count` targets; the others are whatever.

    Only hidden states that predict a target are projected on the vocabulary, `TARGETS` at once. The number of targets
    has to be a multiple of `TARGETS`.
    """

    def some(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        start = index * TARGETS
        rows = hidden[jax.lax.dynamic_slice_in_dim(source, start, TARGETS)]
        highest, total, own = _over_words(model, rows, jax.lax.dynamic_slice_in_dim(target, start, TARGETS))
        values = own - highest - jnp.log(total), own >= highest
        own, every = (jax.lax.dynamic_update_slice_in_dim(c, v, start, 0) for c, v in zip(carry, values, strict=True))
        return own, every

    nothing = (jnp.zeros(target.shape, at_least_float32(hidden.dtype)), jnp.zeros(target.shape, bool))
    return jax.lax.fori_loop(0, (count + TARGETS - 1) // TARGETS, some, nothing)


def _over_words(
    model: Llama, hidden: Float[Array, "*rows embed"], target: Int[Array, "*rows"] | None = None
) -> tuple[Array, Array, Any]:
    """Return the highest logit z of each row, Σ_v exp(z_v - highest), and the target's, by chunks of the vocabulary."""
    tied = model.unembedding is None
    dtype = at_least_float32(hidden.dtype)
    if model.unembedding is None:
        table = model.embedding[...]
    else:
        table = model.unembedding[...]
    axis, product = (0, "...d,vd->...v") if tied else (1, "...d,dv->...v")
    vocab = table.shape[axis]
    chunk = min(VOCAB_CHUNK, table.shape[axis])

    def gather(index: Array, carry: tuple[Array, Array, Any]) -> tuple[Array, Array, Any]:
        highest, total, own = carry
        start = jnp.minimum(index * chunk, vocab - chunk)  # the last chunk overlaps the one before
        z = jnp.einsum(
            product, hidden, jax.lax.dynamic_slice_in_dim(table, start, chunk, axis), preferred_element_type=dtype
        )
        if target is not None:
            place = target - start
            here = jnp.take_along_axis(z, jnp.clip(place, 0, chunk - 1)[..., None], axis=-1)[..., 0]
            own = jnp.where((target >= index * chunk) & (place < chunk), here, own)
        new = start + jnp.arange(chunk) >= index * chunk
        z = jnp.where(new[(None,) * (z.ndim - 1)], z, -jnp.inf)
        higher = jnp.maximum(highest, jnp.max(z, axis=-1))
        return higher, total * jnp.exp(highest - higher) + jnp.sum(jnp.exp(z - higher[..., None]), axis=-1), own

    rows = hidden.shape[:-1]
    nothing = (jnp.full(rows, -jnp.inf, dtype), jnp.zeros(rows, dtype))
    own = None if target is None else jnp.zeros(rows, dtype)
    return jax.lax.fori_loop(0, -(-vocab // chunk), gather, (*nothing, own))
