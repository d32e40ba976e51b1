"""The oracle: the exact change of a problem's loss when one unit goes, by gates that are 0 for one unit each."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from saap_jax.estimation.ablation import Unit
from saap_jax.subjects.base import Progress, silent
from saap_jax.trace.problem import Examples, count_examples
from saap_jax.trace.subject.problem import TracedProblem, batches, loss_of_one
from saap_jax.types import Gates

AT_ONCE = 8
"""Units that are removed, each by itself, in one batch."""


def ablate(
    subject: TracedProblem,
    examples: Examples,
    units: Sequence[Unit],
    *,
    batch_size: int = 8,
    done: Mapping[Unit, float] | None = None,
    save: Callable[[list[tuple[Unit, float]]], None] | None = None,
    progress: Progress = silent,
) -> dict[Unit, float]:
    """Return L(g_u = 0) - L(g = 1) of each unit, with L the mean loss over the examples. Positive: the unit helps.

    Args:
        units: `layer` of a `Unit` is the copy.
        done: results of an earlier call; these units are not computed again.
        save: gets the results of each batch of units as soon as they are there.

    Raises:
        ValueError: a loss that is not finite.
    """
    known = dict(done or {})
    todo = [unit for unit in dict.fromkeys(units) if unit not in known]
    size = min(AT_ONCE, len(todo))
    groups = [todo[start : start + size] for start in range(0, len(todo), size)] if todo else []
    params, count = subject.problem.params, count_examples(examples)

    def make() -> Callable[..., Float[Array, "candidates"]]:
        one = jax.vmap(loss_of_one(subject), (None, None, 0, 0))

        def step(gates: Gates, params: object, inputs: object, targets: object, weights: Array) -> Array:
            return jax.vmap(lambda gates: jnp.sum(one(gates, params, inputs, targets) * weights))(gates)

        return jax.jit(step)

    step = subject.program("ablate", make)

    def losses_of(group: Sequence[Unit | None]) -> np.ndarray:
        gates = {name: np.ones((size, *gate.shape), np.float32) for name, gate in subject.ones.items()}
        for index, unit in enumerate(group):
            if unit is not None:
                gates[unit.structure][index, unit.layer, unit.number] = 0
        total = np.zeros(size)
        for batch, weights in batches(examples, batch_size, subject.layout):
            total += np.asarray(step(gates, params, *batch, jnp.asarray(weights)), np.float64)
        if not np.isfinite(total).all():
            raise ValueError(
                "ablation: expected finite losses, got others; check the parameters, the examples and the loss"
            )
        return total / count

    dense = float(losses_of([None])[0]) if groups else 0.0
    for group in progress(groups):
        new = list(zip(group, (losses_of(group)[: len(group)] - dense).tolist(), strict=True))
        known.update(new)
        if save is not None:
            save(new)
    return {unit: known[unit] for unit in dict.fromkeys(units)}
