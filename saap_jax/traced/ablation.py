"""The oracle: the exact change of a problem's loss when one unit goes, by gates that are 0 for one unit each."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from saap_jax.discovery.tracing.problem import Examples
from saap_jax.discovery.weights import TracedWeights, units_of
from saap_jax.estimation.ablation import Unit, changes_to_scores
from saap_jax.runtime.progress import Track, quiet
from saap_jax.traced.subject import Subject, batches, loss_of_one
from saap_jax.types import Gates, Scores

AT_ONCE = 8
"""Units that are removed, each by itself, in one batch."""


def ablate(
    subject: Subject,
    *,
    examples: Examples | None = None,
    units: Sequence[Unit] | None = None,
    batch_size: int = 8,
    track: Track = quiet,
) -> Scores:
    """Return ℒ(g_u = 0) - ℒ(g = 1) of each unit, `[copies, units]` a structure, over the calibration examples.

    Positive: the unit helps. NaN for units that are not named; `layer` of a `Unit` is the copy.

    Raises:
        ValueError: a loss that is not finite.
    """
    problem, ones = subject.problem, subject.ones
    existing = units_of(TracedWeights(subject.structures, {}))
    if units is None:
        units = [Unit(name, *map(int, place)) for name, each in existing.items() for place in np.argwhere(each)]
    one = loss_of_one(subject)
    each = jax.vmap(one, (None, None, 0, 0))

    @jax.jit
    def step(gates: Gates, inputs: object, targets: object, weights: Array) -> Float[Array, "candidates"]:
        return jax.vmap(lambda gates: jnp.sum(each(gates, problem.params, inputs, targets) * weights))(gates)

    size = min(AT_ONCE, len(units) + 1)
    rows = [None, *units]
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    losses = []
    for group in track("remove single units", groups, len(groups)):
        gates = {name: np.ones((size, *gate.shape), np.float32) for name, gate in ones.items()}
        for index, unit in enumerate(group):
            if unit is not None:
                gates[unit.structure][index, unit.layer, unit.number] = 0
        total = np.zeros(size)
        for batch, weights in batches(examples or problem.calibration, batch_size):
            total += np.asarray(step(gates, *batch, jnp.asarray(weights)), np.float64)
        losses += total[: len(group)].tolist()
    if not np.isfinite(losses).all():
        raise ValueError(
            "ablation: expected finite losses, got others; check the parameters, the examples and the loss"
        )
    count = problem.count if examples is None else len(jax.tree.leaves(examples)[0])
    changes = {unit: (loss - losses[0]) / count for unit, loss in zip(units, losses[1:], strict=True)}
    return changes_to_scores(changes, existing)
