"""One step of training: gradients of the trainable parameters over microbatches, clipped, and Adam.

    ḡ = Σ_m ∂(total of microbatch m) / Σ_m tokens of m        (the mean over tokens, whatever the microbatches)
    ĝ = ḡ · min(1, clip / ‖ḡ‖)
    θ ← θ - η(step) · (Adam of ĝ)

A step whose loss or gradient is not finite changes nothing, so that what is saved afterwards is the state before it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from saap_jax.llama.model import Llama, at_least_float32
from saap_jax.recovery.objective import LossSums, Objective, Packed, sums_of, total_of
from saap_jax.recovery.packing import FIELDS
from saap_jax.runtime.mesh import Places, held, mesh_of, settled, shard

Parameters = Any
"""An `nnx.State`; not named as such, because its own annotations warn when they are checked."""


class Schedule(NamedTuple):
    """How the trainable parameters move, as static values."""

    learning_rate: float = 1e-4
    warmup: int = 100
    """Steps in which the learning rate rises from 0."""
    steps: int = 1000
    """Steps in all; after the warm-up the learning rate falls to 0 along half a cosine."""
    clip: float = 1.0
    """The largest norm of the gradient, all parameters together; 0: any."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=("parameters", "teacher"), meta_fields=("graph",))
@dataclasses.dataclass(frozen=True)
class Frozen:
    """What does not change: the model's structure, its other parameters, and the unpruned model to learn from."""

    graph: Any
    parameters: Parameters
    teacher: Llama | None = None


class TrainingState(NamedTuple):
    """What changes: a pytree, donated from step to step."""

    trained: Parameters
    optimizer: Any
    step: Int[Array, ""]


class StepMeasured(NamedTuple):
    """What one step tells; means over the tokens that were predicted."""

    loss: Float[Array, ""]
    divergence: Float[Array, ""]
    distance: Float[Array, ""]
    """Of the residual streams, where it has a weight."""
    tokens: Int[Array, ""]
    norm: Float[Array, ""]
    """Of the gradient, before it was clipped."""
    finite: Bool[Array, ""]
    """False where loss or gradient was not: then nothing has changed."""


def split(model: Llama, trainable: type[nnx.Variable], teacher: Llama | None = None) -> tuple[Parameters, Frozen]:
    """Split a model into its trainable parameters and all the rest.

    Raises:
        ValueError: the model has no trainable parameter.
    """
    graph, trained, rest = nnx.split(model, trainable, ...)
    if not jax.tree.leaves(trained):
        raise ValueError(f"recovery: expected parameters of type {trainable.__name__} to train, the model has none")
    return trained, Frozen(graph, rest, teacher)


def join(trained: Parameters, frozen: Frozen) -> Llama:
    """Put the model together again."""
    return nnx.merge(frozen.graph, trained, frozen.parameters)


def start(trained: Parameters, schedule: Schedule) -> TrainingState:
    """Make the state before the first step.

    The parameters are copied, because a step takes its state's memory, and raised to float32 where they are narrower:
    most updates are smaller than what bfloat16 tells apart. The optimiser's state lies where the parameters do.
    """
    copied = jax.tree.map(lambda x: jnp.array(x, at_least_float32(x.dtype)), trained)
    state = TrainingState(copied, optimizer_of(schedule).init(copied), jnp.zeros((), jnp.int32))
    return settled(state, mesh_of(copied))


@functools.cache
def learning_rate_of(schedule: Schedule) -> Callable[[Any], Any]:
    """Make the learning rate as a function of the step, from 0."""
    return optax.warmup_cosine_decay_schedule(0.0, schedule.learning_rate, schedule.warmup, schedule.steps)


@functools.cache
def optimizer_of(schedule: Schedule) -> optax.GradientTransformation:
    """Make Adam after clipping."""
    if schedule.clip:
        clip = optax.clip_by_global_norm(schedule.clip)
    else:
        clip = optax.identity()
    return optax.chain(clip, optax.adam(learning_rate_of(schedule)))


@functools.partial(jax.jit, static_argnames=("objective", "schedule", "places"), donate_argnames="state")
def train_step(
    state: TrainingState, frozen: Frozen, rows: Packed, *, objective: Objective, schedule: Schedule, places: Places = ()
) -> tuple[TrainingState, StepMeasured]:
    """Take one step on rows `[microbatches, batch, seq]`; the state's memory is taken over.

    Args:
        places: where the state lies, see `saap_jax.runtime.mesh.held`.
    """

    def total(trained: Parameters, some: Packed) -> tuple[Float[Array, ""], LossSums]:
        sums = sums_of(join(trained, frozen), frozen.teacher, some, objective)
        return total_of(sums, objective), sums

    def accumulate(carry: tuple[Any, LossSums], some: Packed) -> tuple[tuple[Any, LossSums], None]:
        (_, sums), gradient = jax.value_and_grad(total, has_aux=True)(state.trained, some)
        return jax.tree.map(jnp.add, carry, (gradient, sums)), None

    wide = at_least_float32(jax.tree.leaves(state.trained)[0].dtype)
    zero = jnp.zeros((), wide)
    nothing = LossSums(zero, zero, zero, jnp.zeros((), jnp.int32))
    (gradient, sums), _ = jax.lax.scan(accumulate, (jax.tree.map(jnp.zeros_like, state.trained), nothing), rows)
    count = jnp.maximum(sums.tokens, 1).astype(wide)
    gradient = jax.tree.map(lambda g: g / count.astype(g.dtype), gradient)
    norm = optax.tree.norm(gradient)
    means = (sums.loss / count, sums.divergence / count, sums.distance / count)
    finite = jnp.isfinite(jnp.stack([norm.astype(wide), *means])).all()
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the power of its integer count
        updates, optimizer = optimizer_of(schedule).update(gradient, state.optimizer, state.trained)
        trained: Any = optax.apply_updates(state.trained, updates)
        moved = TrainingState(trained, optimizer, state.step + 1)
    state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, state)
    return held(state, places), StepMeasured(*means, sums.tokens, norm, finite)


@functools.partial(jax.jit, static_argnames=("objective",))
def held_out_step(
    trained: Parameters, frozen: Frozen, rows: Packed, *, objective: Objective
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Sum the loss of rows `[batch, seq]` in nats, and count the tokens that it predicts."""
    sums = sums_of(join(trained, frozen), None, rows, objective._replace(distillation=0.0, hidden=0.0))
    return sums.loss, sums.tokens


def microbatches(batch: dict[str, np.ndarray], size: int, like: Any = None) -> Packed:
    """Lay out the rows of a batch as `[microbatches, size, seq]`, where the devices that hold `like` want them."""

    def parts(array: np.ndarray) -> Array:
        return shard(array.reshape(-1, size, *array.shape[1:]), like, axis=1)

    return Packed(*(parts(batch[name]) for name in FIELDS))
