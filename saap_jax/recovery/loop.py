"""Training from the first step, or from a checkpoint, to the last: steps, checks, when to stop, what to do when a loss
is not finite.

All of what a step depends on is in a checkpoint or follows from the configuration, so that a training that is killed
and goes on ends with the same parameters, bit for bit.
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from saap_jax.data.packing import Rows, count_batches, feed, padded_rows
from saap_jax.recovery.checkpoints import Checkpoints
from saap_jax.recovery.not_finite import likely_cause
from saap_jax.recovery.objective import Objective
from saap_jax.recovery.top_k import Kept
from saap_jax.recovery.train import (
    Frozen,
    Measured,
    Parameters,
    Schedule,
    State,
    held_out_step,
    microbatches,
    rate_at,
    start,
    train_step,
)
from saap_jax.runtime.constraints import on_mesh_of
from saap_jax.runtime.mesh import places_of


class Plan(NamedTuple):
    """How to train, beside objective and schedule."""

    batch_size: int
    microbatch: int
    epochs: int
    check_every: int
    patience: int
    seed: int


class Step(NamedTuple):
    """What one step told."""

    step: int
    """From 1."""
    loss: float
    """Mean over the tokens predicted, in nats."""
    divergence: float
    distance: float
    """Of the residual streams from the dense model's, where `training.hidden` gives it a weight."""
    norm: float
    learning_rate: float
    tokens: int
    """Tokens read, padding left out."""
    seconds: float
    held_out: float | None = None
    """Mean loss on held-out text after the step, where it was measured."""


class Outcome(NamedTuple):
    """What training ended with."""

    trained: Parameters
    steps: int
    best_step: int | None
    """The step whose parameters these are, the lowest held-out loss; None where no text is held out."""
    best_loss: float | None
    stopped: bool
    """True where patience ended it."""


class NotFiniteError(ValueError):
    """A loss or a gradient is not finite; the state before the step is saved."""


class Training(NamedTuple):
    """Everything that a training is made of."""

    initial: Parameters
    frozen: Frozen
    rows: Rows
    held_out: Rows | None
    objective: Objective
    schedule: Schedule
    plan: Plan
    about: dict[str, Any]
    """What identifies the training, for its checkpoints: plain values, equal ones in a training that goes on."""
    top: Kept | None = None
    """The teacher's likeliest tokens on disk, which stand for a teacher."""


def steps_of(rows: Rows, *, batch_size: int, epochs: int, most: int) -> int:
    """Return how many steps a training takes; `most` 0 stands for no bound."""
    steps = count_batches(rows, batch_size=batch_size, epochs=epochs)
    return min(steps, most) if most else steps


def train(training: Training, checkpoints: Checkpoints, *, done: Callable[[Step], None] = lambda step: None) -> Outcome:
    """Train from the newest checkpoint, or from the beginning, to the end, and return the best parameters.

    Args:
        done: is told of each step.

    Raises:
        NotFiniteError: a loss or gradient is not finite.
        ValueError: a checkpoint of another training.
    """
    plan, schedule, frozen = training.plan, training.schedule, training.frozen
    state = start(training.initial, schedule)
    batches = feed(training.rows, batch_size=plan.batch_size, epochs=plan.epochs, seed=plan.seed)
    progress: dict[str, Any] = {"best_step": None, "best_loss": None, "waited": 0, **training.about}
    if (latest := checkpoints.latest) is not None:
        _check_same(training.about, checkpoints.progress(latest), latest)
        state, progress = checkpoints.read(latest, state)
        batches.set_state(progress["iterator"])
    step, places = int(state.step), places_of(state)
    while step < schedule.steps and not _stops(progress, plan):
        began, place = time.perf_counter(), batches.get_state()
        batch = next(batches)
        top = None if training.top is None else training.top.of(batch["row"])
        rows = microbatches(batch, plan.microbatch, state, top)
        with on_mesh_of(state):
            state, measured = train_step(
                state, frozen.parameters, frozen.teacher, rows,
                graph=frozen.graph, objective=training.objective, schedule=schedule, places=places,
            )  # fmt: skip
        if not bool(measured.finite):
            raise _not_finite(training, checkpoints, state, batch, measured, progress | {"iterator": place})
        step += 1
        told = _told(step, measured, batch, schedule, time.perf_counter() - began)
        if step % plan.check_every == 0 or step == schedule.steps:
            loss = held_out_loss(state.trained, training)
            progress = _checked(progress, step, loss) | {"iterator": batches.get_state()}
            checkpoints.save(state, progress, loss if loss is None or math.isfinite(loss) else None)
            told = told._replace(held_out=loss)
        done(told)
    return _outcome(training, checkpoints, state, progress, step < schedule.steps)


def held_out_loss(trained: Parameters, training: Training) -> float | None:
    """Return the mean loss of the held-out rows in nats; None where there are none."""
    if training.held_out is None:
        return None
    frozen, total, count = training.frozen, 0.0, 0
    for batch in _batches(training.held_out, training.plan.microbatch):
        rows = jax.tree.map(lambda x: x[0], microbatches(batch, training.plan.microbatch, trained))
        with on_mesh_of(trained):
            loss, tokens = held_out_step(
                trained, frozen.parameters, rows, graph=frozen.graph, objective=training.objective
            )
        total, count = total + float(loss), count + int(tokens)
    return total / count


def _batches(rows: Rows, size: int) -> Iterator[dict[str, np.ndarray]]:
    for first in range(0, len(rows.tokens), size):
        yield padded_rows({name: value[first : first + size] for name, value in rows.arrays().items()}, size)


def _told(step: int, measured: Measured, batch: dict[str, np.ndarray], schedule: Schedule, seconds: float) -> Step:
    return Step(
        step,
        float(measured.loss),
        float(measured.divergence),
        float(measured.distance),
        float(measured.norm),
        rate_at(schedule, step - 1),
        int((batch["segments"] > 0).sum()),
        seconds,
    )


def _checked(progress: dict[str, Any], step: int, loss: float | None) -> dict[str, Any]:
    """Return the progress after a check."""
    if loss is None:
        return progress
    best = progress["best_loss"]
    if math.isfinite(loss) and (best is None or loss < best):
        return progress | {"best_step": step, "best_loss": loss, "waited": 0}
    return progress | {"waited": progress["waited"] + 1}


def _check_same(about: dict[str, Any], saved: dict[str, Any], step: int, at_most: int = 3) -> None:
    """Raise ValueError where a checkpoint is of another training, with what differs."""
    differing = [f"{key} {saved.get(key)} -> {value}" for key, value in about.items() if saved.get(key) != value]
    if differing:
        more = f" and {len(differing) - at_most} more" if len(differing) > at_most else ""
        raise ValueError(
            f"checkpoint {step} is of another training: {', '.join(differing[:at_most])}{more}; start anew with "
            "--overwrite, or choose another --name"
        )


def _stops(progress: dict[str, Any], plan: Plan) -> bool:
    return bool(plan.patience) and progress["waited"] >= plan.patience


def _outcome(
    training: Training, checkpoints: Checkpoints, state: State, progress: dict[str, Any], stopped: bool
) -> Outcome:
    best, steps, trained = progress["best_step"], int(state.step), state.trained
    if best is not None and best != steps:
        checkpoints.wait()
        trained = checkpoints.read(best, state).state.trained
    return Outcome(trained, steps, best, progress["best_loss"], stopped)


def _not_finite(
    training: Training,
    checkpoints: Checkpoints,
    state: State,
    batch: dict[str, np.ndarray],
    measured: Measured,
    progress: dict[str, Any],
) -> NotFiniteError:
    """Save the state before the step, and return what is to be said."""
    step, place = int(state.step) + 1, [int(row) for row in batch["row"] if row >= 0]
    if checkpoints.latest != int(state.step):
        checkpoints.save(state, progress, None)
    checkpoints.wait()
    names = [name for row in place for name in training.rows.names[row]]
    what = "loss" if not math.isfinite(float(measured.loss)) else "gradient"
    return NotFiniteError(
        f"training: the {what} of step {step} is not finite, on the rows {_listed(list(map(str, place)), 8)} "
        f"({_listed(names, 3)}); the state before it is saved as checkpoint {step - 1}. Likely cause: "
        f"{likely_cause(state, training.frozen, batch, training.objective, training.plan.microbatch)}"
    )


def _listed(words: list[str], most: int) -> str:
    return ", ".join(words[:most]) + (", …" if len(words) > most else "")
