"""The next-token loss: what estimation differentiates and what evaluation exponentiates."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from saap_jax.llama.model import Llama, Observe, at_least_float32
from saap_jax.runtime.constraints import batch_shards, vocab_shards
from saap_jax.types import Gates, Remat

LOGITS = 2**28
"""Bytes of logits that a device has in memory at once; see `over_positions`."""


def next_token_losses(
    model: Llama,
    tokens: Int[Array, "batch seq"],
    mask: Bool[Array, "batch seq"],
    gates: Gates | None = None,
    *,
    observe: Observe | None = None,
    remat: Remat = "none",
) -> tuple[Float[Array, "batch"], list]:
    """Return each example's summed next-token loss in nats, float32 (at least), and what `observe` made of segments.

    Position t predicts token t + 1; it counts where that token is real (`mask`). Divide by `predicted_tokens` for the
    mean. Padding on the right changes neither the loss nor any gradient.
    """
    hidden, observed = model.hidden(tokens, gates, observe=observe, remat=remat)
    losses = over_positions(functools.partial(token_losses, model), hidden[:, :-1], tokens[:, 1:], logits=[model])
    return jnp.sum(jnp.where(mask[:, 1:], losses, 0), axis=-1), observed


def token_losses(
    model: Llama, hidden: Float[Array, "batch seq embed"], target: Int[Array, "batch seq"]
) -> Float[Array, "batch seq"]:
    """Return -log p(target) in nats of the distributions that last hidden states make."""
    logits = model.logits(hidden)
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
    batch, length = arrays[0].shape[:2]
    count = min(length, -(-length * sum(_bytes_of_logits(model, batch) for model in logits) // LOGITS))
    if count <= 1:
        return function(*arrays)
    each = -(-length // count)
    count = -(-length // each)

    def split(array: Array) -> Array:
        padded = jnp.pad(array, [(0, 0), (0, count * each - length)] + [(0, 0)] * (array.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, count, each, *array.shape[2:]), 1, 0)

    def joined(array: Array) -> Array:
        return jnp.moveaxis(array, 0, 1).reshape(batch, count * each, *array.shape[3:])[:, :length]

    some = jax.checkpoint(lambda inputs: function(*inputs), prevent_cse=False)
    return jax.tree.map(joined, jax.lax.map(some, tuple(split(array) for array in arrays)))


def _bytes_of_logits(model: Llama, batch: int) -> int:
    """Return how much the logits of one position of each example take on a device."""
    vocab = model.embedding.shape[0]
    return (
        batch
        // batch_shards(batch)
        * vocab
        // vocab_shards(vocab)
        * jnp.dtype(at_least_float32(model.embedding.dtype)).itemsize
    )


def predicted_tokens(mask: Bool[Array, "batch seq"]) -> Int[Array, "batch"]:
    """Count the tokens of each example that enter its loss: all real ones but the first."""
    return jnp.sum(mask[:, 1:], axis=-1)
