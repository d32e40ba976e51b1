"""Stage 2d, compensation: the rest of a layer stands in for what was removed, in closed form, without training.

A sub-block writes a W into the residual stream, with a its gated activations and W its output matrix. When units R go
and K stay, W[K] (or a bias) is chosen so that what is written stays close to a target T on the calibration text:

    bias            b = mean(T - â W)                                    with W[R] = 0
    least_squares   W'[K] = W[K] + (G_KK + δ D)⁻¹ (C_K - G_KK W[K]),     G = Σ â âᵀ,  C = Σ â Tᵀ,
                                                                         D = diag(G_KK), or I times its mean

`propagate` says on which model. `dense`: every sub-block for itself, on the activations of the unpruned model, with
T = a W. Then C_K - G_KK W[K] = G_KR W[R]: the formula as usually written. `pruned`: from the first layer to the last,
on the activations â of the model as pruned and corrected so far, with T chosen by the repair between a W, a of the
pruned stream, and (unpruned residual stream behind the sub-block) - (pruned stream in front of it): with the latter
each sub-block also makes up for what those before it got wrong. Where a norm stands between a sub-block and the stream
(`Family.post_norms`), no W reaches such a target; there T = a W.
Sources and deviations are said by the steps, `saap_jax.steps.repair`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from saap_jax.estimation.base import Batch, wide
from saap_jax.estimation.reconstruction import gram_sums, token_weights
from saap_jax.llama.attention import apart_of, sight_of
from saap_jax.llama.model import Hidden, Llama, attend, feed, param, post_normed, rms_norm
from saap_jax.llama.passes import layer_of
from saap_jax.llama.segments import segment_bounds
from saap_jax.surgery.corrections import Correction, Normal, Repair, Walk, corrected, kept_rows, rows_of, together
from saap_jax.surgery.cut import check_keep
from saap_jax.types import HELD_OUT, STRUCTURES, Keep


class Stream(NamedTuple):
    """The residual stream of a microbatch in front of a sub-block, in the unpruned model and in the pruned one."""

    dense: Hidden
    pruned: Hidden


class Compensated(NamedTuple):
    """A model whose kept units stand in for the removed ones, and what was done where."""

    model: Llama
    """Of the shapes of the given one, rows of removed units 0; as a pruned model, it wants the masks all the same."""
    corrections: list[Correction]


def compensate(
    model: Llama,
    keep: Keep,
    batches: Sequence[Batch],
    repair: Repair,
    *,
    dense: Llama | None = None,
    progress: Callable[[Sequence[int]], Iterator[int]] = iter,
) -> Compensated:
    """Correct the output matrices (or add biases) of a model that keeps only some units, on calibration text.

    Costs about one forward pass of the unpruned model and two of the pruned one, whose channels that go are not
    computed; in memory, the residual streams of all windows and the sums of one sub-block. What lies in front of the
    first pruned unit is left as it is.

    Args:
        model: of the shapes of the unpruned one, perhaps repaired before.
        keep: `[layers, units]` a structure.
        batches: (tokens, mask) pairs of one shape, padding on the right; every `HELD_OUT`-th is held out first.
        repair: how, such as `steps.repair.output.LeastSquares`.
        dense: the unpruned model, that is to be come close to; the same where nothing was repaired before.
        progress: wraps the layers, to show progress.

    Raises:
        ValueError: a keep-set of another model.
    """
    check_keep(keep, model.segments)
    walk = Walk(repair, repair.propagate == "pruned", repair.tokens == "equal")
    return gathered(model, corrected_in_turn(model, keep, batches, walk, dense=dense, progress=progress), repair)


def gathered(
    model: Llama, turns: Iterator[tuple["SubBlock", "OutputMatrix", Correction | None]], repair: Repair
) -> Compensated:
    """Put what `corrected_in_turn` yields into a model."""
    made: dict[str, list[OutputMatrix]] = {name: [] for name in STRUCTURES}
    corrections = []
    for at, new, correction in turns:
        made[at.structure].append(new)
        if correction is not None:
            corrections.append(correction)
    return Compensated(rewritten(model, made, repair.biases), corrections)


Choose = Callable[["SubBlock", Normal], Bool[np.ndarray, "_"]]
"""(what of a sub-block is to be kept, sums over all of the text) -> which coordinates are kept instead."""


def corrected_in_turn(
    model: Llama,
    keep: Keep,
    batches: Sequence[Batch],
    walk: Walk,
    *,
    dense: Llama | None = None,
    choose: Choose | None = None,
    progress: Callable[[Sequence[int]], Iterator[int]] = iter,
) -> Iterator[tuple["SubBlock", "OutputMatrix", Correction | None]]:
    """Yield each sub-block, in the order of the forward pass, what writes from now on, and what that helped.

    Args:
        choose: chooses again what is kept of a sub-block, on the activations that it is corrected on.
    """
    masks = [jnp.asarray(mask) for _, mask in batches]
    (repair, through, _) = walk
    streams = []
    for tokens, _ in batches:
        embedded = model.embedded(jnp.asarray(tokens))
        streams.append(Stream(embedded, embedded))
    # Nothing has been pruned yet: the two streams are one, and stay so as far as sub-blocks keep all.
    same = True
    for at in sub_blocks(model, keep, progress):
        whole = at.old
        if dense is not None:
            whole = writer_of(dense, at.place)
        keeps_all = bool(at.kept.all())
        same = keeps_all and (same or not through)
        idle = repair is not None and repair.alone and keeps_all
        advance = functools.partial(advance_step, model, at.place)

        # Leave the sub-block as it is. Experts are never corrected: see `LlamaSubject.unrepaired`.
        if same or idle or at.routed is not None:
            pruned = after = [advance(whole, stream.dense) for stream in streams]
            # A model that was repaired before writes something else than the unpruned one, even if it keeps all.
            if through and not (same and dense is None):
                pruned = [advance(at.masked(), stream.pruned, gates=at.routed) for stream in streams]
            streams = [Stream(*each) for each in zip(after, pruned, strict=True)]
            yield at, at.old, None
            continue

        # Add up over the text: all coordinates where they are chosen from the sums, else those that are kept.
        choosing = choose is not None and not keeps_all
        coordinates = np.arange(len(at.kept))
        if not choosing:
            coordinates, _ = kept_rows(at.kept)
        rows = jnp.asarray(coordinates)
        step = functools.partial(normal_step, model, at.place, whole, rows, walk=walk)
        sums, after = summed(step, streams, masks)

        # Choose anew what is kept, and go on with the sums of that alone.
        if choose is not None and choosing:
            at = at._replace(kept=choose(at, together(*sums)))
            rows = jnp.asarray(kept_rows(at.kept)[0])
            sums = rows_of(sums[0], rows), sums[1] and rows_of(sums[1], rows)

        # Solve for the output matrix.
        if repair is None:
            new = at.masked()
            correction = None
        else:
            start = at.old.weight
            if repair.from_dense:
                start = whole.weight
            new, correction = at.corrected(sums, repair, start)

        # Run both streams on; the pruned one by the new matrix, of whose rows only the kept ones are not 0.
        some = new._replace(weight=new.weight[rows], rows=rows)
        pruned = after
        if through:
            pruned = [advance(some, stream.pruned) for stream in streams]
        streams = [Stream(*each) for each in zip(after, pruned, strict=True)]
        yield at, new, correction


Rows = Int[Array, "coordinates"] | None
"""Some coordinates of a sub-block; None: all."""


class OutputMatrix(NamedTuple):
    """What carries a sub-block's activations into the residual stream."""

    weight: Float[Array, "coordinates embed"]
    bias: Float[Array, "embed"]
    """Zeros where the model has none."""
    rows: Rows = None
    """What the rows of the matrix are."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=("index",), meta_fields=("segment", "structure"))
@dataclasses.dataclass(frozen=True)
class Site:
    """Where a sub-block is: its layer within a segment is an input of programs, so that one serves all layers."""

    index: Int[Array, ""]
    segment: int
    structure: str


class SubBlock(NamedTuple):
    """Attention or MLP of one layer, and what of it is kept."""

    structure: str
    layer: int
    place: Site
    old: OutputMatrix
    kept: Bool[np.ndarray, "coordinates"]
    routed: Float[Array, "experts"] | None = None
    """Of a mixture: 1 for an expert that stays, 0 for one that goes."""

    def masked(self) -> OutputMatrix:
        """Zero the rows of removed units."""
        return self.old._replace(weight=jnp.where(jnp.asarray(self.kept)[:, None], self.old.weight, 0))

    def corrected(
        self, sums: tuple[Normal, Normal | None], repair: Repair, start: Float[Array, "coordinates embed"]
    ) -> tuple[OutputMatrix, Correction]:
        """Correct the rows of kept units of a matrix, and measure the gain; see `corrected`."""
        weight, bias, damping, errors = corrected(sums, start, self.kept, repair)
        new = OutputMatrix(weight.astype(self.old.weight.dtype), self.old.bias + bias.astype(self.old.bias.dtype))
        return new, Correction(self.structure, self.layer, damping, *errors)


def sub_blocks(
    model: Llama, keep: Keep, progress: Callable[[Sequence[int]], Iterator[int]] = iter
) -> Iterator[SubBlock]:
    """Yield attention and MLP of each layer, in the order of the forward pass."""
    places = []
    for number, each in enumerate(model.segments):
        places += [(number, jnp.asarray(place)) for place in range(each.length)]
    for layer in progress(range(len(places))):
        segment, index = places[layer]
        for structure in STRUCTURES:
            place = Site(index, segment, structure)
            old = writer_of(model, place)
            widths = model.segments[segment].widths
            if structure == "attention":
                units = widths.kv_heads
            else:
                units = widths.mlp
            own = keep[structure][layer, :units]
            # A unit is several rows of the output matrix: the coordinates of its heads, or one of a channel.
            kept = np.repeat(own, len(old.weight) // max(units, 1))
            # Experts that go are closed by their gates: a row of 0 would leave tokens routed to them.
            routed = None
            if structure == "mlp" and model.segments[segment].mlp.router is not None:
                routed = jnp.asarray(own, old.weight.dtype)
            yield SubBlock(structure, layer, place, old, kept, routed)


@jax.jit
def writer_of(model: Llama, at: Site) -> OutputMatrix:
    """Read the output matrix and the bias of a sub-block."""
    layer = layer_of(model.segments[at.segment], at.index)
    if at.structure == "attention":
        weight = layer.attention.output[...]
        bias = layer.attention.output_bias
    else:
        weight = layer.mlp.down[...]
        bias = layer.mlp.down_bias
    weight = weight.reshape(-1, weight.shape[-1])
    if bias is None:
        return OutputMatrix(weight, jnp.zeros(weight.shape[-1], weight.dtype))
    return OutputMatrix(weight, bias[...])


@functools.partial(jax.jit, static_argnames=("walk",))
def normal_step(
    model: Llama,
    at: Site,
    whole: OutputMatrix,
    rows: Int[Array, "some"],
    stream: Stream,
    mask: Bool[Array, "batch seq"],
    *,
    walk: Walk,
) -> tuple[Normal, Hidden]:
    """Make what a microbatch adds to the sums of a sub-block, and the unpruned stream behind it.

    Args:
        whole: what writes in the unpruned model.
        rows: the coordinates that the sums are of.
    """
    # On the unpruned stream: what the sub-block writes, W a + b, and the stream behind it.
    active = activations(model, at, stream.dense)
    bias = whole.bias[None, None]
    written = active @ whole.weight + bias
    post = post_norm_of(model, at)
    after = stream.dense + post_normed(written, post, model.constants)
    active = active[..., rows]
    if walk.through:
        # On the pruned stream â takes the place of a, and the target is what this stream lacks behind the sub-block.
        active = activations(model, at, stream.pruned, rows=rows)
        if post is None:
            written = after - stream.pruned
        if walk.repair is not None:
            own = activations(model, at, stream.pruned) @ whole.weight + bias  # compiled only if a target looks at it
            # No matrix in front of a norm reaches what the stream lacks.
            lacking = own
            if post is None:
                lacking = written
            written = walk.repair.target(own, lacking)
    # The bias, perhaps of a repair before, stays: what is left is what the matrix is to write.
    written = written - writer_of(model, at).bias[None, None]
    a = wide(active)
    target = wide(written)
    behind = wide(after)
    if walk.equal:
        weights = mask.astype(behind.dtype)
    else:
        weights = token_weights(behind, mask, model.constants.norm_eps)
    product, mean, weight = gram_sums(a, weights)
    # C = Σ w â Tᵀ, with the tokens of all windows in one axis.
    weighted = a * weights[..., None]
    targets = target.reshape(-1, target.shape[-1])
    cross = weighted.reshape(len(targets), -1).T @ targets
    return Normal(
        gram=product,
        cross=cross,
        mean=mean,
        target=jnp.einsum("bt,btd->d", weights, target),
        square=jnp.einsum("bt,btd->", weights, jnp.square(target)),
        weight=weight,
        tokens=jnp.sum(mask).astype(weight.dtype),
    ), after


@jax.jit
def advance_step(
    model: Llama, at: Site, new: OutputMatrix, pruned: Hidden, gates: Float[Array, "experts"] | None = None
) -> Hidden:
    """Compute the pruned stream behind a sub-block; rows of its removed units are 0 in `new`, or have `gates` of 0."""
    written = activations(model, at, pruned, gates, new.rows) @ new.weight + new.bias[None, None]
    return pruned + post_normed(written, post_norm_of(model, at), model.constants)


def post_norm_of(model: Llama, at: Site) -> nnx.Param | None:
    """Read the scale of the norm behind a sub-block; None where there is none."""
    layer = layer_of(model.segments[at.segment], at.index)
    if at.structure == "attention":
        return layer.attention_post_norm
    return layer.mlp_post_norm


def activations(
    model: Llama, at: Site, x: Hidden, gates: Float[Array, "experts"] | None = None, rows: Rows = None
) -> Float[Array, "batch seq coordinates"]:
    """Compute what enters the output matrix of a sub-block, or some rows of it, from the residual stream before it."""
    layer = layer_of(model.segments[at.segment], at.index)
    constants = model.constants
    if at.structure == "mlp":
        # Channels that go are not computed.
        if rows is not None:
            layer.mlp.gate, layer.mlp.up = (param(w.axes, w[...][:, rows]) for w in (layer.mlp.gate, layer.mlp.up))
        active = feed(layer.mlp, rms_norm(x, layer.mlp_norm[...], constants), constants, gates)
        return active.reshape(*active.shape[:2], -1)
    apart = apart_of(constants, segment_bounds(model.segments))[at.segment]
    sight = sight_of(x.shape[1], layer.attention.output.shape[-2], constants)
    if apart is not None:
        apart = layer_of(apart, at.index)
    sight = sight.of(apart)
    middle = attend(layer.attention, rms_norm(x, layer.attention_norm[...], constants), sight, constants)
    flat = middle.reshape(*middle.shape[:2], -1)
    if rows is None:
        return flat
    return flat[..., rows]


def summed(
    step: Callable[..., tuple[Normal, Array]], streams: Sequence[Stream], masks: Sequence[Array]
) -> tuple[tuple[Normal, Normal | None], list[Array]]:
    """Return the sums over the text, those of what is held out apart, and the unpruned streams behind the sub-block."""
    sums: list[Normal | None] = [None, None]
    after = []
    for number, (stream, mask) in enumerate(zip(streams, masks, strict=True)):
        new, behind = step(stream, mask)
        after.append(behind)
        # 1 for what is held out: the last of every `HELD_OUT` microbatches.
        slot = int(number % HELD_OUT == HELD_OUT - 1)
        before = sums[slot]
        if before is not None:
            new = jax.tree.map(jnp.add, before, new)
        sums[slot] = new
    fit, held = sums
    assert fit is not None
    return (fit, held), after


def rewritten(model: Llama, made: dict[str, list[OutputMatrix]], biases: bool) -> Llama:
    """Return a copy of a model with other output matrices, and other biases if it has or gets them."""
    new = jax.tree.map(lambda x: x, model)
    bounds = segment_bounds(model.segments)
    for segment, at in zip(new.segments, bounds, strict=True):
        for part, name, structure in ((segment.attention, "output", "attention"), (segment.mlp, "down", "mlp")):
            own = made[structure][at.start : at.stop]
            parameter = getattr(part, name)
            weight = jnp.stack([each.weight for each in own]).reshape(parameter.shape)
            setattr(part, name, param(parameter.axes, weight))
            if biases or getattr(part, f"{name}_bias") is not None:
                bias = param(("layers", "embed"), jnp.stack([each.bias for each in own]))
                setattr(part, f"{name}_bias", nnx.data(bias))
    return new
