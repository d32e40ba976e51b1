"""Channels of the residual stream first, then everything else: how a share of a budget comes from the model's width.

    observe and score the channels -> keep the highest -> cut: a model of a smaller `embed`
    -> the usual search on that model, for what is left of the budget

A channel is one unit of the whole model: a column of the embedding and of every matrix that writes into the stream, a
row of every matrix that reads it. All attention and MLP matrices shrink by the same share, and so does the embedding,
which no other structure touches. Norms average over the channels: without some of them the mean is another one.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from saap_jax.config.method import ResidualConfig
from saap_jax.data import Windows, pairs
from saap_jax.estimation.base import Batch
from saap_jax.llama import Llama
from saap_jax.llama.loss import next_token_losses, predicted_tokens
from saap_jax.llama.narrow import with_scaled_norms
from saap_jax.llama.segments import existing_units, ones_gates
from saap_jax.runtime.progress import Track, quiet
from saap_jax.selection.search import Selection
from saap_jax.surgery.cut import cut
from saap_jax.types import RESIDUAL, Remat


class Channels(NamedTuple):
    """What a pass over the calibration text tells of the channels of the residual stream."""

    scores: dict[str, Float[np.ndarray, "embed"]]
    """`gate_taylor` and `gate_fisher` (method of the same names), and `activation`: the mean square of what the norms
    hand on of a channel, summed over the norms."""
    energy: list[dict[str, Float[np.ndarray, "layers embed"]]]
    """Mean share of each channel in the square of the stream that enters a norm, of each run; each row sums to 1."""
    last: Float[np.ndarray, "embed"]
    """The same of the norm after the last layer."""


class ResidualStage(NamedTuple):
    """What went of the stream, and what is left to remove."""

    model: Llama
    """The narrower model; its attention units and MLP channels are those of the given one."""
    keep: Bool[np.ndarray, "1 embed"]
    """Which channels stay."""
    rest: float
    """Share of the prunable parameters of `model` that is still to be removed."""


def remove_channels(
    model: Llama,
    scenarios: Mapping[str, Windows],
    ratio: float,
    options: ResidualConfig,
    *,
    batch_size: int = 8,
    remat: Remat = "dots",
    track: Track = quiet,
) -> ResidualStage:
    """Remove channels of the residual stream that make up `options.share` of what `ratio` asks for.

    Raises:
        ValueError: the share cannot be met, since too few channels would be left.
    """
    kept = kept_channels(model.spec.embed, ratio, options)
    batches = [batch for windows in scenarios.values() for batch in pairs(windows, batch_size)]

    def progress(batches: Iterable[Batch]) -> Iterator[Batch]:
        listed = list(batches)
        return track("observe the residual stream", listed, len(listed))

    seen = observe_channels(model, batches, remat=remat, progress=progress)
    keep = highest(seen.scores[options.estimator], kept)
    left = kept / model.spec.embed
    narrow = narrow_model(model, keep, seen, options.norm_scale)
    return ResidualStage(narrow, keep[None], max(ratio - (1 - left), 0.0) / left)


def kept_channels(embed: int, ratio: float, options: ResidualConfig) -> int:
    """Return how many channels stay: a multiple of `multiple_of`, the nearest to what the share asks for.

    Raises:
        ValueError: none would stay, or none would go.
    """
    asked = embed * (1 - options.share * ratio)
    kept = round(asked / options.multiple_of) * options.multiple_of
    if not 0 < kept < embed:
        raise ValueError(
            f"residual.share: {options.share:g} of ratio {ratio:g} asks to keep {asked:.0f} of {embed} channels "
            f"of the residual stream, {kept} as a multiple of {options.multiple_of}; expected more than none and fewer "
            f"than {embed}: change the share or residual.multiple_of"
        )
    return kept


def highest(scores: Float[np.ndarray, "embed"], count: int) -> Bool[np.ndarray, "embed"]:
    """Return which channels have the `count` highest scores; equal ones: the lower index goes first."""
    keep = np.ones(len(scores), bool)
    keep[np.argsort(scores, kind="stable")[: len(scores) - count]] = False
    return keep


def narrow_model(model: Llama, keep: Bool[np.ndarray, "embed"], seen: Channels, norm_scale: str) -> Llama:
    """Return the model without the removed channels, its norms rescaled.

    `masked`: as if the removed channels were zero, so that what stays is divided by a smaller root mean square than it
    was. `mean`: the scales as they were; the mean is over the channels that stay. `dense`: what stays is handed on as
    large as in the given model, on average over the calibration text.
    """
    narrow = cut(model, {**existing_units(model.runs), RESIDUAL: keep[None]})
    if norm_scale == "masked":
        return narrow

    def factor(energy: Float[np.ndarray, "*layers embed"]) -> Array:
        share = keep.mean() if norm_scale == "mean" else energy[..., keep].sum(-1)
        return jnp.asarray(np.broadcast_to(share, energy.shape[:-1]) ** 0.5)

    factors = [{name: factor(energy) for name, energy in run.items()} for run in seen.energy]
    return with_scaled_norms(narrow, factors, float(factor(seen.last)))


def together(first: ResidualStage, rest: Selection, ratio: float, prunable: int) -> Selection:
    """Return both steps as one, of the model before the first; `prunable` are its prunable parameters."""
    left = prunable * int(first.keep.sum()) // first.keep.size
    removed = prunable - left + rest.removed
    return Selection(rest.keep | {RESIDUAL: first.keep}, ratio, removed / prunable, removed)


# --- what is observed ----------------------------------------------------------------------------


def observe_channels(
    model: Llama,
    batches: Iterable[Batch],
    *,
    remat: Remat = "dots",
    progress: Callable[[Iterable[Batch]], Iterator[Batch]] = iter,
) -> Channels:
    """Run one pass over (tokens, mask) microbatches of one shape and return what it tells of the channels."""
    gradients, energy, last, tokens = [], None, np.zeros(model.spec.embed), 0
    for each, mask in progress(batches):
        gradient, seen = _observe_step(model, jnp.asarray(each), jnp.asarray(mask), remat=remat)
        gradients.append(np.asarray(gradient, np.float64)[mask.any(axis=1)])
        runs, end = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), seen)
        energy = runs if energy is None else jax.tree.map(np.add, energy, runs)
        last, tokens = last + end, tokens + int(mask.sum())
    if energy is None:
        raise ValueError("calibration: expected at least one batch, got none")
    slopes = np.concatenate(gradients)
    shares = jax.tree.map(lambda leaf: leaf / (tokens * leaf.shape[-1]), energy)
    last = last / (tokens * model.spec.embed)
    handed_on = np.square(np.asarray(model.norm[...], np.float64)) * last
    for run, each in zip(model.runs, shares, strict=True):
        for name, share in each.items():
            handed_on = handed_on + (np.square(np.asarray(getattr(run, name)[...], np.float64)) * share).sum(0)
    scores = {
        "gate_taylor": np.abs(slopes).mean(0),
        "gate_fisher": np.square(slopes).mean(0),
        "activation": handed_on * model.spec.embed,
    }
    return Channels(scores, shares, last)


@functools.partial(jax.jit, static_argnames=("remat",))
def _observe_step(
    model: Llama, tokens: Int[Array, "batch seq"], mask: Bool[Array, "batch seq"], *, remat: Remat
) -> tuple[Float[Array, "batch embed"], Any]:
    """Return ∂ℒ_n/∂g of each example, and sums over tokens of x² / mean x² of what enters the norms."""
    counts = jnp.maximum(predicted_tokens(mask), 1).astype(jnp.float32)
    ones = ones_gates(model.runs)

    def normalised(x: Array) -> Array:
        power = jnp.square(jax.lax.stop_gradient(x).astype(jnp.float32))
        return jnp.einsum("bt,bte->e", mask.astype(jnp.float32), power / power.mean(-1, keepdims=True))

    def observe(point: str, activation: Array) -> Array | None:
        return normalised(activation) if point in ("attention_in", "mlp_in", "mlp_out") else None

    def summed(gates: Float[Array, "batch one embed"]) -> tuple[Array, Any]:
        losses, seen = next_token_losses(model, tokens, mask, {**ones, RESIDUAL: gates}, observe=observe, remat=remat)
        return losses.sum(), seen

    gates = jnp.ones((len(tokens), 1, model.embedding.shape[1]), jnp.float32)
    slopes, seen = jax.grad(summed, has_aux=True)(gates)
    runs = [{"attention_norm": run["attention_in"], "mlp_norm": run["mlp_in"]} for run in seen]
    return slopes[:, 0] / counts[:, None], (runs, seen[-1]["mlp_out"][-1])
