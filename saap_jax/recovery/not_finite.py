"""Why a loss or a gradient is not finite: the likeliest cause, found by trying."""

import jax
import numpy as np

from saap_jax.recovery.objective import Objective
from saap_jax.recovery.train import Frozen, State, held_out_step, join, microbatches
from saap_jax.runtime.finite import first_not_finite


def likely_cause(state: State, frozen: Frozen, batch: dict[str, np.ndarray], objective: Objective, size: int) -> str:
    """Return the likeliest cause, and what to do, in words.

    Args:
        state: the one before the step.
        batch: the rows of the step, of which `size` are computed at once.
    """
    for what, tree in (("the model", join(state.trained, frozen)), ("the dense model", frozen.teacher)):
        if (place := first_not_finite(tree)) is not None:
            return f"{what} has numbers that are not finite, in {place}; load, or prune, another model"
    if not _finite_loss(state, frozen, batch, objective, size):
        wide = objective._replace(compute="float32")
        if objective.compute != "float32" and _finite_loss(state, frozen, batch, wide, size):
            return (
                f"{objective.compute} is too narrow for this model, whose loss is finite in float32; pass "
                "--training.compute float32"
            )
        return "the model's activations overflow after the steps so far; lower training.learning_rate"
    return "the loss is finite and its gradient overflows; lower training.learning_rate, or training.clip"


def _finite_loss(state: State, frozen: Frozen, batch: dict[str, np.ndarray], objective: Objective, size: int) -> bool:
    parts = microbatches(batch, size, state.trained)
    losses = [
        held_out_step(
            state.trained,
            frozen.parameters,
            jax.tree.map(lambda x, place=place: x[place], parts),
            graph=frozen.graph,
            objective=objective,
        )[0]
        for place in range(len(parts.tokens))
    ]
    return bool(np.isfinite(losses).all())
