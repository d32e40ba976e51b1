"""How far a masked model is from the unpruned one: KL(p_unpruned ‖ p_masked), as a function of gates of units.

Where it is asked for, a multiple of the next-token loss is lowered with it. Text comes in microbatches, every
`HELD_OUT`-th of which is held out: its divergence alone judges what was learnt from the others.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from saap_jax.estimation.base import Batch
from saap_jax.llama.attention import apart_of, sight_of
from saap_jax.llama.loss import over_positions
from saap_jax.llama.model import DecoderLayer, Hidden, Llama, decode, param, rematerialised
from saap_jax.llama.passes import layer_of, run_layers
from saap_jax.llama.segments import segment_bounds, split_gates
from saap_jax.runtime.constraints import on_mesh_of
from saap_jax.runtime.decisions import finite
from saap_jax.runtime.gather import fetched
from saap_jax.runtime.mesh import mesh_of, settled, shard
from saap_jax.surgery.corrections import HELD_OUT, check_microbatches
from saap_jax.types import STRUCTURES, Gates, Keep, Scores


class Microbatch(NamedTuple):
    """A microbatch on the devices, with what the unpruned model makes of it."""

    tokens: Int[Array, "batch seq"]
    mask: Bool[Array, "batch seq"]
    hidden: Hidden
    """The unpruned model's last hidden states, of which its logits are made anew whenever they are needed."""
    stream: Hidden
    """The residual stream in front of the first layer that may lose units, which gates do not change."""


class Divergence:
    """The divergence of a model with masked units from the unpruned one, on a text.

    Keeps last hidden states of the text on the devices, and the stream behind layers in which nothing changes.
    """

    def __init__(
        self,
        model: Llama,
        batches: Sequence[Batch],
        language_loss: float = 0.0,
        teacher: Llama | None = None,
        first: int = 0,
    ) -> None:
        """Take a model, and the unpruned one where that is another: where something was repaired.

        Layers in front of `first` are whole, whatever gates say, and run once.
        """
        check_microbatches("divergence", len(batches))
        self._model = model
        self._teacher = model if teacher is None else teacher
        self._language_loss = language_loss
        self.first = first
        texts = [self._text(batch) for batch in batches]
        self._held = texts[HELD_OUT - 1 :: HELD_OUT]
        self._rest = [text for number, text in enumerate(texts) if number % HELD_OUT != HELD_OUT - 1]
        self.parts = len(self._rest)
        if not any(np.asarray(mask).any() for _, mask in batches[HELD_OUT - 1 :: HELD_OUT]):
            raise ValueError(
                f"divergence: expected real tokens in every {HELD_OUT}th microbatch, which are held out, got padding; "
                "give more text, or a smaller calibration.batch_size"
            )

    def gradient(self, gates: Scores, part: int) -> tuple[float, Scores]:
        """Compute the objective, a mean over a part's tokens, and its derivative by each gate, 0 before `first`.

        Raises ValueError where one of them is not finite.
        """
        given = self._gates(gates)
        options = {"first": self.first, "language_loss": self._language_loss}
        with on_mesh_of(self._model):
            value, gradient = gradient_step(self._model, self._teacher, given, self._rest[part], **options)
        slopes: Scores = {name: fetched(each).astype(np.float64) for name, each in gradient.items()}
        return finite("divergences, and derivatives of them by gates, to train by", (float(fetched(value)), slopes))

    def value(self, gates: Keep | Scores, part: int) -> float:
        """Compute the mean divergence over the tokens of a part."""
        return self._judged(gates, self._rest[part : part + 1])

    def judge(self, gates: Keep | Scores) -> float:
        """Compute the mean divergence over the held-out tokens."""
        return self._judged(gates, self._held)

    def _judged(self, gates: Keep | Scores, texts: Sequence[Microbatch]) -> float:
        given = self._gates(gates)
        with on_mesh_of(self._model):
            sums = [fetched(divergence_step(self._model, self._teacher, given, text, self.first)) for text in texts]
        divergence = sum(float(total) for total, _ in sums)
        tokens = sum(int(count) for _, count in sums)
        return float(divergence / max(tokens, 1))

    def _gates(self, given: Keep | Scores) -> Gates:
        return settled({name: jnp.asarray(each, jnp.float32) for name, each in given.items()}, mesh_of(self._model))

    def _text(self, batch: Batch) -> Microbatch:
        tokens, mask = (shard(each, self._teacher) for each in batch)
        with on_mesh_of(self._teacher):
            return Microbatch(tokens, mask, *streams_step(self._model, self._teacher, tokens, self.first))


def row_divergences(model: Llama, keep: Keep, batches: Sequence[Batch], teacher: Llama) -> Float[np.ndarray, "rows"]:
    """Compute the mean divergence of each row of a text over its real tokens, in nats; NaN where there are none."""
    gates = settled({name: jnp.asarray(each, jnp.float32) for name, each in keep.items()}, mesh_of(model))
    found = []
    for batch in batches:
        tokens, mask = (shard(each, teacher) for each in batch)
        with on_mesh_of(teacher):
            found.append(fetched(row_step(model, teacher, gates, tokens, mask)))
    return np.concatenate(found).astype(np.float64)


@jax.jit
def row_step(
    model: Llama, teacher: Llama, gates: Gates, tokens: Int[Array, "batch seq"], mask: Bool[Array, "batch seq"]
) -> Float[Array, "batch"]:
    """Compute the mean divergence of each row of a microbatch."""
    text = Microbatch(tokens, mask, *streams_step(model, teacher, tokens, 0))
    behind = run_layers(model, text.stream, 0, len(model.spec.layers), gates)
    each, _ = by_tokens(model, teacher, model.final(behind), text)
    return jnp.sum(jnp.where(mask, each, 0), axis=1) / jnp.sum(mask, axis=1).astype(each.dtype)


@jax.jit
def streams_step(
    model: Llama, teacher: Llama, tokens: Int[Array, "batch seq"], first: Int[Array, ""]
) -> tuple[Hidden, Hidden]:
    """Compute the last hidden states of the unpruned model, and the stream in front of a layer of a model."""
    return teacher.hidden(tokens)[0], run_layers(model, model.embedded(tokens), 0, first)


@jax.jit
def divergence_step(
    model: Llama, teacher: Llama, gates: Gates, text: Microbatch, first: Int[Array, ""]
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Sum up the divergence in nats over the real tokens of a microbatch, and count them."""
    behind = run_layers(model, text.stream, first, len(model.spec.layers), gates)
    each, _ = by_tokens(model, teacher, model.final(behind), text)
    return jnp.sum(jnp.where(text.mask, each, 0)), jnp.sum(text.mask)


@functools.partial(jax.jit, static_argnames=("first", "language_loss"))
def gradient_step(
    model: Llama, teacher: Llama, gates: Gates, text: Microbatch, *, first: int = 0, language_loss: float = 0.0
) -> tuple[Float[Array, ""], Gates]:
    """Compute the mean divergence over the tokens of a microbatch, and its derivative by each gate, closed ones too.

    But for closed experts, to which no token is routed: theirs is 0.
    """
    # Two derivatives in a row: of the divergence by hidden states, token by token, then of these by the gates.
    hidden, pull = jax.vjp(lambda gates: hidden_behind(model, text.stream, first, gates), gates)
    each, slopes = by_tokens(model, teacher, hidden, text, language_loss)
    count = jnp.maximum(jnp.sum(text.mask), 1).astype(each.dtype)
    by_hidden = jnp.where(text.mask[..., None], slopes.astype(each.dtype) / count, 0).astype(slopes.dtype)
    return jnp.sum(jnp.where(text.mask, each, 0)) / count, pull(by_hidden)[0]


def by_tokens(
    model: Llama, teacher: Llama, hidden: Hidden, text: Microbatch, language_loss: float = 0.0
) -> tuple[Float[Array, "batch seq"], Hidden]:
    """Compute KL(p_unpruned ‖ p_pruned) of each token in nats, and its derivative by the last hidden states.

    Logits are made once for both; a derivative that nobody uses is not compiled.

    Args:
        language_loss: how much of -log p_pruned of the next real token is added, for each token that has one.
    """

    def of_tokens(own: Array, other: Array, following: Array, real: Array) -> Array:
        student, known = (jax.nn.log_softmax(each, axis=-1) for each in (model.logits(own), teacher.logits(other)))
        each = jnp.sum(jnp.exp(known) * (known - student), axis=-1)
        if not language_loss:
            return each
        surprise = -jnp.take_along_axis(student, following[..., None], axis=-1)[..., 0]
        return each + language_loss * jnp.where(real, surprise, 0)

    def both(own: Array, *others: Array) -> tuple[Array, Array]:
        each, pull = jax.vjp(lambda own: of_tokens(own, *others), own)
        return each, pull(jnp.ones_like(each))[0]  # positions do not mix: each row is that of its own token

    following, real = (jnp.pad(each[:, 1:], ((0, 0), (0, 1))) for each in (text.tokens, text.mask))
    return over_positions(both, hidden, text.hidden, following, real, logits=[model, teacher])


def hidden_behind(model: Llama, stream: Hidden, first: int, gates: Gates) -> Hidden:
    """Compute the last hidden states from the residual stream in front of a layer, to be differentiated by gates.

    As `Llama.hidden`, but for the layers before; weights are no inputs of the loop, so that none is copied.
    """
    sight = sight_of(stream.shape[1], model.head_dim, model.constants)
    bounds = segment_bounds(model.segments)
    parts = model.segments, split_gates(gates, bounds), apart_of(model.constants, bounds), bounds
    for segment, own_gates, own_apart, place in zip(*parts, strict=True):

        def layer(x: Array, inputs: Any, segment: DecoderLayer = segment) -> tuple[Array, None]:
            index, own, apart = inputs
            return decode(layer_of(segment, index), x, own, sight.of(apart), model.constants)[0], None

        # The stream stands in front of layer `first`: of its segment only the layers from there on run.
        left = slice(max(first - place.start, 0), None)
        inputs = (jnp.arange(segment.length), own_gates, own_apart)
        inputs = jax.tree.map(lambda each, left=left: each[left], inputs)
        stream, _ = jax.lax.scan(rematerialised(layer, "dots"), stream, inputs)
    return model.final(stream)


def folded(model: Llama, scales: dict[str, Float[np.ndarray, "_ _"]]) -> Llama:
    """Multiply the rows of output matrices by their units' factors, `[layers, units]` a structure, in a copy."""
    new = jax.tree.map(lambda x: x, model)

    def times(parameter: nnx.Param, factors: np.ndarray) -> nnx.Param:
        value = parameter[...]
        return param(parameter.axes, value * jnp.asarray(factors, value.dtype))

    for segment, at in zip(new.segments, segment_bounds(model.segments), strict=True):
        attention, mlp = (scales[name][at.start : at.stop, : at.units[name]] for name in STRUCTURES)
        segment.attention.output = times(segment.attention.output, attention[..., None, None, None])
        segment.mlp.down = times(segment.mlp.down, mlp.reshape(*mlp.shape, *(1,) * (segment.mlp.down.ndim - 2)))
    return new
