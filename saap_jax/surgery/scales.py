"""Stage 2d, scales: one factor for each kept unit, trained towards what the unpruned model predicts; weights stay.

    minimise over s   mean over tokens of KL(p_unpruned ‖ p_pruned(s)),     activations of unit u times s_u,

by Adam from s = 1, at a rate that falls to 0 as a cosine. A unit's factor is folded into its rows of the output
matrix, so that the pruned model has the parameters that it had. Every `HELD_OUT`-th microbatch is held out: it judges
after each round over the others, and the best factors count, 1 among them, so that text that was not trained on never
says that they did harm.

Sources: one scale a unit with weights frozen and folded afterwards as GRASPrune's last step (ACL 2026) and the gates of
DDP (ICML 2026), here behind any correction of the output matrices, and with the divergence alone as the loss.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from saap_jax.llama.model import Llama, param
from saap_jax.llama.segments import masks, segment_bounds
from saap_jax.runtime.constraints import on_mesh_of
from saap_jax.runtime.gather import fetched
from saap_jax.runtime.mesh import mesh_of, settled
from saap_jax.surgery.compensation import Batch
from saap_jax.surgery.corrections import check_microbatches
from saap_jax.surgery.cut import check_keep
from saap_jax.surgery.divergence import Text, divergence, judged, split, text_of
from saap_jax.types import STRUCTURES, Gates, Keep


class Scaled(NamedTuple):
    """What training factors of units did."""

    scales: dict[str, np.ndarray]
    """`[layers, units]` a structure, 1 where nothing was learnt."""
    divergences: tuple[float, ...]
    """Mean KL to the unpruned model in nats a token on held-out text: before, and after each round."""

    @property
    def best(self) -> int:
        """After how many rounds the factors were best."""
        return min(range(len(self.divergences)), key=self.divergences.__getitem__)  # NaN is never the lowest


def scaled(
    model: Llama,
    teacher: Llama,
    keep: Keep,
    batches: Sequence[Batch],
    steps: int,
    rate: float,
    *,
    progress: Callable[[Sequence[int]], Iterator[int]] = iter,
) -> tuple[Llama, Scaled]:
    """Train one factor for each kept unit of a masked model, and fold it into the output matrices.

    Costs about three forward passes over a microbatch for each step, one pass of the unpruned model over
    the text, and one of the pruned model over a quarter of it for each round. In memory: last hidden states of the
    text.

    Args:
        model: of the shapes of the unpruned one, perhaps with other weights; as a pruned model, it wants the masks.
        teacher: the unpruned model.
        keep: `[layers, units]` a structure.
        batches: (tokens, mask) pairs of one shape, padding on the right.
        steps: of Adam.
        rate: learning rate of the first step.
        progress: wraps the steps, to show progress.

    Raises:
        ValueError: a keep-set of another model, or too few microbatches to hold some out.
    """
    check_keep(keep, model.segments)
    check_microbatches("scales", len(batches))
    mesh = mesh_of(model)
    fixed, scales = settled((masks(keep), {n: jnp.ones(keep[n].shape, jnp.float32) for n in STRUCTURES}), mesh)
    state = settled(_optimiser(steps, rate).init(scales), mesh)
    rest, held = split([text_of(teacher, *batch) for batch in batches])
    found = [(scales, judged(model, teacher, scales, fixed, held))]
    random, left = np.random.default_rng(0), iter(progress(range(steps)))
    while some := list(zip(random.permutation(len(rest)), left, strict=False)):
        for number, _ in some:
            with on_mesh_of(model):
                scales, state = scale_step(model, teacher, scales, state, fixed, rest[number], steps=steps, rate=rate)
        found.append((scales, judged(model, teacher, scales, fixed, held)))
    best = {name: fetched(value) for name, value in min(found, key=lambda each: each[1])[0].items()}
    return folded(model, best), Scaled(best, tuple(judged for _, judged in found))


def _optimiser(steps: int, rate: float) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(rate, steps))


@functools.partial(jax.jit, static_argnames=("steps", "rate"), donate_argnames=("state",))
def scale_step(
    model: Llama, teacher: Llama, scales: Gates, state: Any, fixed: Gates, text: Text, *, steps: int, rate: float
) -> tuple[Gates, Any]:
    """Take a step of Adam on a microbatch; units that are gone have no gradient."""

    def mean(scales: Gates) -> Float[Array, ""]:
        total, count = divergence(model, teacher, scales, fixed, text, remat="dots")
        return total / jnp.maximum(count, 1).astype(total.dtype)

    updates: Any
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the power of its integer count
        updates, state = _optimiser(steps, rate).update(jax.grad(mean)(scales), state)
    return {name: scales[name] + updates[name] for name in scales}, state


def folded(model: Llama, scales: dict[str, Float[np.ndarray, "_ _"]]) -> Llama:
    """Multiply the rows of output matrices by their units' factors, `[layers, units]` a structure, in a copy."""
    new = jax.tree.map(lambda x: x, model)
    for segment, at in zip(new.segments, segment_bounds(model.segments), strict=True):
        attention, mlp = (scales[name][at.start : at.stop, : at.units[name]] for name in STRUCTURES)
        segment.attention.output = _times(segment.attention.output, attention[..., None, None, None])
        segment.mlp.down = _times(segment.mlp.down, mlp.reshape(*mlp.shape, *(1,) * (segment.mlp.down.ndim - 2)))
    return new


def _times(parameter: Any, factors: np.ndarray) -> Any:
    value = parameter[...]
    return param(parameter.axes, value * jnp.asarray(factors, value.dtype))
