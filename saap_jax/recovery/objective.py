"""What recovery minimises: the loss of the tokens to predict, and how far the model is from the unpruned one."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from saap_jax.llama.loss import over_positions
from saap_jax.llama.model import Llama, at_least_float32
from saap_jax.llama.passes import packed_hidden
from saap_jax.types import Remat


class Packed(NamedTuple):
    """Packed rows on the device, see `recovery.packing`."""

    tokens: Int[Array, "*some seq"]
    segments: Int[Array, "*some seq"]
    positions: Int[Array, "*some seq"]
    targets: Bool[Array, "*some seq"]


class Objective(NamedTuple):
    """What is minimised, as static values: (1 - w) · loss + w · temperature² · divergence + hidden · distance."""

    compute: str = "float32"
    """Type in which the forward and the backward pass compute; parameters keep theirs."""
    remat: Remat = "none"
    distillation: float = 0.0
    """The weight of the divergence from the unpruned model."""
    temperature: float = 1.0
    hidden: float = 0.0
    """The weight of the distance of the residual streams from the unpruned model's."""

    @property
    def taught(self) -> bool:
        """Whether it looks at the unpruned model."""
        return bool(self.distillation or self.hidden)


class LossSums(NamedTuple):
    """Over the tokens to predict of some rows."""

    loss: Float[Array, ""]
    """In nats."""
    divergence: Float[Array, ""]
    """KL(teacher ‖ student) at the temperature, in nats; 0 without a teacher."""
    distance: Float[Array, ""]
    """‖x - y‖² / ‖y‖² of the residual stream x behind a layer and the teacher's y, the mean of the layers; 0 where it
    has no weight."""
    tokens: Int[Array, ""]


def sums_of(model: Llama, teacher: Llama | None, rows: Packed, objective: Objective) -> LossSums:
    """Sum the losses of packed rows; position t predicts token t + 1 where that is a target.

    The first token of a piece is never a target, so no piece predicts another one.

    Source of the distance: the hidden-state loss of Minitron (arXiv:2407.14679, section 2.5), a mean squared error.
    Deviation: divided by the teacher's own size, without which the few tokens with massive activations decide it.
    """
    student = cast(model, objective.compute)
    hidden, streams = _states(student, rows, objective)
    models = [student]
    distance = jnp.zeros(rows.tokens.shape, at_least_float32(hidden.dtype))
    known = ()
    if teacher is not None and objective.taught:
        models.append(cast(teacher, objective.compute))
        states, goals = jax.lax.stop_gradient(_states(models[1], rows, objective))
        known = (states[:, :-1],)
        if streams is not None and goals is not None:
            distance = _distance(streams, goals)

    def of_tokens(target: Array, hidden: Array, *known: Array) -> tuple[Array, Array]:
        logits = student.logits(hidden)
        own = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), target[..., None], axis=-1)[..., 0]
        if not known:
            return -own, jnp.zeros_like(own)
        goal = jax.lax.stop_gradient(models[1].logits(known[0]))
        cooled = jax.nn.log_softmax(logits / objective.temperature, axis=-1)
        warm = jax.nn.log_softmax(goal / objective.temperature, axis=-1)
        return -own, jnp.sum(jnp.exp(warm) * (warm - cooled), axis=-1)

    each = over_positions(of_tokens, rows.tokens[:, 1:], hidden[:, :-1], *known, logits=models)
    targets = rows.targets[:, 1:]
    loss, divergence, distance = (jnp.sum(jnp.where(targets, of, 0)) for of in (*each, distance[:, :-1]))
    return LossSums(loss, divergence, distance, jnp.sum(targets))


def total_of(sums: LossSums, objective: Objective) -> Float[Array, ""]:
    """Sum what is minimised over the tokens; divide by their number for the mean.

    Source: Hinton et al. (arXiv:1503.02531), whose factor T² keeps the gradient's size as the temperature changes.
    """
    weight = objective.distillation
    taught = weight * objective.temperature**2 * sums.divergence + objective.hidden * sums.distance
    return (1 - weight) * sums.loss + taught


def _states(
    model: Llama, rows: Packed, objective: Objective
) -> tuple[Float[Array, "batch seq embed"], Float[Array, "layers batch seq embed"] | None]:
    options: Any = {"remat": objective.remat, "streams": bool(objective.hidden)}
    hidden, streams = packed_hidden(model, rows.tokens, rows.positions, rows.segments, **options)
    return hidden, jnp.concatenate(streams) if objective.hidden else None


def _distance(
    streams: Float[Array, "layers batch seq embed"], goals: Float[Array, "layers batch seq embed"]
) -> Float[Array, "batch seq"]:
    wide = at_least_float32(streams.dtype)
    own = streams.astype(wide)
    other = goals.astype(wide)
    size = jnp.maximum(jnp.sum(jnp.square(other), axis=-1), jnp.finfo(wide).tiny)
    return jnp.mean(jnp.sum(jnp.square(own - other), axis=-1) / size, axis=0)


def cast(model: Llama, dtype: Any) -> Llama:
    """Turn the parameters of a model into another type; "float32" keeps wider ones, and raises narrower ones.

    Variables that are no `nnx.Param`, such as those of quantised matrices and adapters, stay what they are: the
    products that they are part of convert them.
    """

    def convert(variable: Any) -> Any:
        if not isinstance(variable, nnx.Param):
            return variable
        wide = jnp.float64 if dtype == "float32" else dtype
        return jax.tree.map(lambda x: x.astype(wide if x.dtype == jnp.float64 else dtype), variable)

    return jax.tree.map(convert, model, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
