"""Scores of the channels of the residual stream, which no estimator of attention and MLP sees.

A channel is one unit of the whole model: a column of the embedding and of every matrix that writes into the stream, a
row of every matrix that reads it.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from saap_jax.estimation.base import Batch
from saap_jax.llama import Llama
from saap_jax.llama.loss import next_token_losses, predicted_tokens
from saap_jax.llama.segments import ones_gates
from saap_jax.types import RESIDUAL, Gates, Remat


class Channels(NamedTuple):
    """What a pass over the calibration text tells of the channels of the residual stream."""

    scores: dict[str, Float[np.ndarray, "embed"]]
    """`gate_taylor` and `gate_fisher` (method of the same names), and `activation`: the mean square of what the norms
    hand on of a channel, summed over the norms."""
    energy: list[dict[str, Float[np.ndarray, "layers embed"]]]
    """Mean share of each channel in the square of the stream that enters a norm, of each segment; rows sum to 1."""
    last: Float[np.ndarray, "embed"]
    """The same of the norm after the last layer."""


def observe_channels(
    model: Llama,
    batches: Sequence[Batch],
    *,
    gates: Gates | None = None,
    remat: Remat = "dots",
    progress: Callable[[Sequence[Batch]], Iterator[Batch]] = iter,
) -> Channels:
    """Run one pass over (tokens, mask) microbatches of one shape and return what it tells of the channels.

    Args:
        gates: where the model is observed, as masks of a pruned one; None: all 1.
        remat: what the backward pass recomputes.
        progress: wraps the batches, to show progress.

    Raises:
        ValueError: no batch at all.
    """
    gates = ones_gates(model.segments) if gates is None else gates
    gradients, energy, last, tokens = [], None, np.zeros(model.spec.embed), 0
    for batch, mask in progress(batches):
        gradient, seen = _observe_step(model, jnp.asarray(batch), jnp.asarray(mask), gates, remat=remat)
        gradients.append(np.asarray(gradient, np.float64)[mask.any(axis=1)])
        segments, end = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), seen)
        energy = segments if energy is None else jax.tree.map(np.add, energy, segments)
        last, tokens = last + end, tokens + int(mask.sum())
    if energy is None:
        raise ValueError("calibration: expected at least one batch, got none")
    slopes = np.concatenate(gradients)
    shares = jax.tree.map(lambda leaf: leaf / (tokens * leaf.shape[-1]), energy)
    last = last / (tokens * model.spec.embed)
    handed_on = np.square(np.asarray(model.norm[...], np.float64)) * last
    for segment, of_segment in zip(model.segments, shares, strict=True):
        for name, share in of_segment.items():
            handed_on = handed_on + (np.square(np.asarray(getattr(segment, name)[...], np.float64)) * share).sum(0)
    scores = {
        "gate_taylor": np.abs(slopes).mean(0),
        "gate_fisher": np.square(slopes).mean(0),
        "activation": handed_on * model.spec.embed,
    }
    return Channels(scores, shares, last)


@functools.partial(jax.jit, static_argnames=("remat",))
def _observe_step(
    model: Llama, tokens: Int[Array, "batch seq"], mask: Bool[Array, "batch seq"], gates: Gates, *, remat: Remat
) -> tuple[Float[Array, "batch embed"], Any]:
    """Return ∂ℒ_n/∂g of each example, and sums over tokens of x² / mean x² of what enters the norms."""
    counts = jnp.maximum(predicted_tokens(mask), 1).astype(jnp.float32)

    def normalised(x: Array) -> Array:
        power = jnp.square(jax.lax.stop_gradient(x).astype(jnp.float32))
        mean = power.mean(-1, keepdims=True)  # 0 of padding whose word has a row of zeros
        return jnp.einsum("bt,bte->e", mask.astype(jnp.float32), power / jnp.where(mean > 0, mean, 1))

    def observe(point: str, activation: Array) -> Array | None:
        return normalised(activation) if point in ("attention_in", "mlp_in", "mlp_out") else None

    def summed(stream: Float[Array, "batch one embed"]) -> tuple[Array, Any]:
        losses, seen = next_token_losses(model, tokens, mask, {**gates, RESIDUAL: stream}, observe=observe, remat=remat)
        return losses.sum(), seen

    stream = gates.get(RESIDUAL, jnp.ones((1, model.embedding.shape[1]), jnp.float32))
    slopes, seen = jax.grad(summed, has_aux=True)(jnp.broadcast_to(stream, (len(tokens), *stream.shape)))
    segments = [{"attention_norm": segment["attention_in"], "mlp_norm": segment["mlp_in"]} for segment in seen]
    return slopes[:, 0] / counts[:, None], (segments, seen[-1]["mlp_out"][-1])
