"""How far a masked model is from the unpruned one: KL(p_unpruned ‖ p_masked), as a function of gates of units.

Where it is asked for, a multiple of the next-token loss is lowered with it. Text comes in microbatches, every
`HELD_OUT`-th of which is held out: its divergence alone judges what was learnt from the others.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from saap_jax.estimation.base import Batch
from saap_jax.llama.loss import over_positions
from saap_jax.llama.model import Llama, param
from saap_jax.llama.segments import segment_bounds
from saap_jax.runtime.constraints import on_mesh_of
from saap_jax.runtime.gather import fetched
from saap_jax.runtime.mesh import mesh_of, settled, shard
from saap_jax.surgery.corrections import HELD_OUT, check_microbatches
from saap_jax.types import STRUCTURES, Gates, Keep, Remat, Scores


class Microbatch(NamedTuple):
    """A microbatch on the devices, with what the unpruned model makes of it."""

    tokens: Int[Array, "batch seq"]
    mask: Bool[Array, "batch seq"]
    hidden: Float[Array, "batch seq embed"]
    """The unpruned model's last hidden states, of which its logits are made anew whenever they are needed."""


class Divergence:
    """The divergence of a model with masked units from the unpruned one, on a text.

    Keeps last hidden states of the text on the devices.
    """

    def __init__(
        self, model: Llama, batches: Sequence[Batch], language_loss: float = 0.0, teacher: Llama | None = None
    ) -> None:
        """Take a model, and the unpruned one where that is another: where something was repaired."""
        check_microbatches("divergence", len(batches))
        self._model, self._teacher, self._language_loss = model, model if teacher is None else teacher, language_loss
        texts = [self._text(batch) for batch in batches]
        self._held = texts[HELD_OUT - 1 :: HELD_OUT]
        self._rest = [text for number, text in enumerate(texts) if number % HELD_OUT != HELD_OUT - 1]
        self.parts = len(self._rest)

    def gradient(self, gates: Scores, part: int) -> tuple[float, Scores]:
        """Compute the objective, a mean over the tokens of a part, and its derivative by each gate."""
        with on_mesh_of(self._model):
            value, gradient = gradient_step(
                self._model, self._teacher, self._gates(gates), self._rest[part], language_loss=self._language_loss
            )
        return float(fetched(value)), {name: fetched(each).astype(np.float64) for name, each in gradient.items()}

    def value(self, gates: Keep | Scores, part: int) -> float:
        """Return the mean divergence over the tokens of a part."""
        return self._judged(gates, self._rest[part : part + 1])

    def judge(self, gates: Keep | Scores) -> float:
        """Compute the mean divergence over the held-out tokens."""
        return self._judged(gates, self._held)

    def _judged(self, gates: Keep | Scores, texts: Sequence[Microbatch]) -> float:
        given = self._gates(gates)
        with on_mesh_of(self._model):
            sums = [fetched(divergence_step(self._model, self._teacher, given, text)) for text in texts]
        return float(sum(float(total) for total, _ in sums) / max(sum(int(count) for _, count in sums), 1))

    def _gates(self, given: Keep | Scores) -> Gates:
        return settled({name: jnp.asarray(each, jnp.float32) for name, each in given.items()}, mesh_of(self._model))

    def _text(self, batch: Batch) -> Microbatch:
        tokens, mask = (shard(each, self._teacher) for each in batch)
        with on_mesh_of(self._teacher):
            return Microbatch(tokens, mask, hidden_step(self._teacher, tokens))


@jax.jit
def hidden_step(model: Llama, tokens: Int[Array, "batch seq"]) -> Float[Array, "batch seq embed"]:
    """Return the last hidden states of a model."""
    return model.hidden(tokens)[0]


def divergence(
    model: Llama, teacher: Llama, gates: Gates, text: Microbatch, language_loss: float = 0.0, remat: Remat = "none"
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Return KL(p_unpruned ‖ p_pruned) in nats, summed over the real tokens of a microbatch, and their number.

    Args:
        language_loss: how much of -log p_pruned of the next real token is added, for each token that has one.
    """
    hidden, _ = model.hidden(text.tokens, gates, remat=remat)

    def of_tokens(own: Array, other: Array, following: Array, real: Array) -> Array:
        student, known = (jax.nn.log_softmax(each, axis=-1) for each in (model.logits(own), teacher.logits(other)))
        each = jnp.sum(jnp.exp(known) * (known - student), axis=-1)
        if not language_loss:
            return each
        surprise = -jnp.take_along_axis(student, following[..., None], axis=-1)[..., 0]
        return each + language_loss * jnp.where(real, surprise, 0)

    following, real = (jnp.pad(each[:, 1:], ((0, 0), (0, 1))) for each in (text.tokens, text.mask))
    each = over_positions(of_tokens, hidden, text.hidden, following, real, logits=[model, teacher])
    return jnp.sum(jnp.where(text.mask, each, 0)), jnp.sum(text.mask)


divergence_step = jax.jit(divergence)


@functools.partial(jax.jit, static_argnames=("language_loss",))
def gradient_step(
    model: Llama, teacher: Llama, gates: Gates, text: Microbatch, *, language_loss: float = 0.0
) -> tuple[Float[Array, ""], Gates]:
    """Return the mean divergence over the tokens of a microbatch, and its derivative by each gate, closed ones too.

    But for closed experts, to which no token is routed: theirs is 0.
    """

    def mean(gates: Gates) -> Float[Array, ""]:
        total, count = divergence(model, teacher, gates, text, language_loss, "dots")
        return total / jnp.maximum(count, 1).astype(total.dtype)

    return jax.value_and_grad(mean)(gates)


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
