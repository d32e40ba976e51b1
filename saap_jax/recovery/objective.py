"""What recovery minimises: the loss of the tokens to predict, and how far the model is from the unpruned one."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from saap_jax.llama.loss import over_positions
from saap_jax.llama.model import Llama
from saap_jax.llama.packed import packed_hidden
from saap_jax.types import Remat


class Packed(NamedTuple):
    """Packed rows on the device, see `data.packing`."""

    tokens: Int[Array, "*some seq"]
    segments: Int[Array, "*some seq"]
    positions: Int[Array, "*some seq"]
    targets: Bool[Array, "*some seq"]


class Objective(NamedTuple):
    """What is minimised, as static values: (1 - weight) · loss + weight · temperature² · divergence."""

    compute: str = "float32"
    """Type in which the forward and the backward pass compute; parameters keep theirs."""
    remat: Remat = "none"
    distillation: float = 0.0
    """The weight of the divergence from the unpruned model."""
    temperature: float = 1.0


class Sums(NamedTuple):
    """Over the tokens to predict of some rows."""

    loss: Float[Array, ""]
    """In nats."""
    divergence: Float[Array, ""]
    """KL(teacher ‖ student) at the temperature, in nats; 0 without a teacher."""
    tokens: Int[Array, ""]


def sums_of(model: Llama, teacher: Llama | None, rows: Packed, objective: Objective) -> Sums:
    """Return the summed losses of packed rows; position t predicts token t + 1 where that is a target.

    The first token of a piece is never a target, so no piece predicts another one.
    """
    wanted = teacher if objective.distillation else None
    student = cast(model, objective.compute)
    seen = [(student, _hidden(student, rows, objective))]
    if wanted is not None:
        other = cast(wanted, objective.compute)
        seen.append((other, jax.lax.stop_gradient(_hidden(other, rows, objective))))
    models = [model for model, _ in seen]

    def of_tokens(target: Array, *hidden: Array) -> tuple[Array, Array]:
        logits = [model.logits(states) for model, states in zip(models, hidden, strict=True)]
        own = jnp.take_along_axis(jax.nn.log_softmax(logits[0], axis=-1), target[..., None], axis=-1)[..., 0]
        if wanted is None:
            return -own, jnp.zeros_like(own)
        cooled = jax.nn.log_softmax(logits[0] / objective.temperature, axis=-1)
        warm = jax.nn.log_softmax(jax.lax.stop_gradient(logits[1]) / objective.temperature, axis=-1)
        return -own, jnp.sum(jnp.exp(warm) * (warm - cooled), axis=-1)

    each = over_positions(of_tokens, rows.tokens[:, 1:], *(hidden[:, :-1] for _, hidden in seen), logits=models)
    targets = rows.targets[:, 1:]
    loss, divergence = (jnp.sum(jnp.where(targets, of_token, 0)) for of_token in each)
    return Sums(loss, divergence, jnp.sum(targets))


def total_of(sums: Sums, objective: Objective) -> Float[Array, ""]:
    """Return what is minimised, summed over the tokens; divide by their number for the mean.

    Source: Hinton et al. (arXiv:1503.02531), whose factor T² keeps the gradient's size as the temperature changes.
    """
    weight = objective.distillation
    return (1 - weight) * sums.loss + weight * objective.temperature**2 * sums.divergence


def _hidden(model: Llama, rows: Packed, objective: Objective) -> Float[Array, "batch seq embed"]:
    return packed_hidden(model, rows.tokens, rows.positions, rows.segments, remat=objective.remat)


def cast(model: Llama, dtype: Any) -> Llama:
    """Return the model with its parameters in another type; "float32" keeps wider ones, and raises narrower ones.

    Variables that are no `nnx.Param`, such as those of quantised matrices and adapters, stay what they are: the
    products that they are part of convert them.
    """

    def convert(variable: Any) -> Any:
        if not isinstance(variable, nnx.Param):
            return variable
        return jax.tree.map(lambda x: x.astype(_type(x, dtype)), variable)

    return jax.tree.map(convert, model, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _type(x: Array, dtype: Any) -> Any:
    return x.dtype if x.dtype == jnp.float64 and dtype == "float32" else dtype
