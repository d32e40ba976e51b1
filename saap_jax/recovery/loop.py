"""Training from the first step, or from a checkpoint, to the last: steps, checks, when to stop, what to do when a loss
is not finite.

All of what a step depends on is in a checkpoint or follows from the configuration, so that a training that is killed
and goes on ends with the same parameters, bit for bit.
"""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from saap_jax.config.recover import TrainingConfig
from saap_jax.recovery.checkpoints import Checkpoints
from saap_jax.recovery.objective import Objective
from saap_jax.recovery.packing import Feed, Rows, padded_rows
from saap_jax.recovery.train import (
    Frozen,
    Parameters,
    Schedule,
    TrainingState,
    held_out_step,
    join,
    learning_rate_of,
    microbatches,
    start,
    train_step,
)
from saap_jax.runtime.constraints import on_mesh_of
from saap_jax.runtime.gather import first_not_finite
from saap_jax.runtime.mesh import places_of
from saap_jax.runtime.words import some


class Told(NamedTuple):
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
    plan: TrainingConfig
    """How to train, beside objective and schedule: batches, epochs, checks, patience and seed."""
    about: dict[str, Any]
    """What identifies the training, for its checkpoints: plain values, equal ones in a training that goes on."""


def train(training: Training, checkpoints: Checkpoints, *, done: Callable[[Told], None] = lambda step: None) -> Outcome:
    """Train from the newest checkpoint, or from the beginning, to the end; find the best parameters.

    Args:
        done: is told of each step.

    Raises:
        NotFiniteError: a loss or gradient is not finite.
        ValueError: a checkpoint of another training.
    """
    plan = training.plan
    schedule = training.schedule
    frozen = training.frozen
    state = start(training.initial, schedule)
    batches = Feed(training.rows, batch_size=plan.batch_size, epochs=plan.epochs, seed=plan.seed)
    progress: dict[str, Any] = {"best_step": None, "best_loss": None, "waited": 0, **training.about}
    if (latest := checkpoints.latest) is not None:
        progress = checkpoints.progress(latest)
        differing = [f"{k} {progress.get(k)} -> {v}" for k, v in training.about.items() if progress.get(k) != v]
        if differing:
            raise ValueError(
                f"checkpoint {latest} is of another training: {some(differing, 3)}; start anew with --overwrite, or "
                "choose another --name"
            )
        state = checkpoints.read(latest, state)
        batches.set_state(progress["iterator"])
    step = int(state.step)
    places = places_of(state)
    while step < schedule.steps and not (plan.patience and progress["waited"] >= plan.patience):
        began = time.perf_counter()
        place = batches.get_state()
        batch = next(batches)
        rows = microbatches(batch, plan.microbatch, state)
        with on_mesh_of(state):
            options: dict[str, Any] = {"objective": training.objective, "schedule": schedule, "places": places}
            state, measured = train_step(state, frozen, rows, **options)
        if not bool(measured.finite):
            if checkpoints.latest != step:
                checkpoints.save(state, progress | {"iterator": place})
            checkpoints.wait()
            raise _not_finite(training, state, batch, "gradient" if math.isfinite(float(measured.loss)) else "loss")
        told = Told(
            step + 1, float(measured.loss), float(measured.divergence), float(measured.distance), float(measured.norm),
            float(learning_rate_of(schedule)(step)), int((batch["segments"] > 0).sum()), time.perf_counter() - began,
        )  # fmt: skip
        step += 1
        check = step % plan.check_every == 0 or step == schedule.steps
        loss = None
        if check:
            loss = held_out_loss(state.trained, training)
        done(told._replace(held_out=loss))  # before the checkpoint, so that a kill leaves no step untold
        if check:
            finite = loss is not None and math.isfinite(loss)
            best = progress["best_loss"]
            if finite and (best is None or loss < best):
                progress |= {"best_step": step, "best_loss": loss, "waited": 0}
            elif loss is not None:
                progress |= {"waited": progress["waited"] + 1}
            progress |= {"iterator": batches.get_state()}
            checkpoints.save(state, progress)
    best = progress["best_step"]
    trained = state.trained
    if best is not None and best != step:
        checkpoints.wait()
        trained = checkpoints.read(best, state).trained
    return Outcome(trained, step, best, progress["best_loss"], step < schedule.steps)


def held_out_loss(trained: Parameters, training: Training) -> float | None:
    """Measure the mean loss of the held-out rows in nats; None where there are none."""
    if training.held_out is None:
        return None
    total = 0.0
    count = 0
    size = training.plan.microbatch
    arrays = training.held_out.arrays()
    for first in range(0, len(training.held_out.tokens), size):
        batch = padded_rows({name: value[first : first + size] for name, value in arrays.items()}, size)
        rows = jax.tree.map(lambda x: x[0], microbatches(batch, size, trained))
        with on_mesh_of(trained):
            loss, tokens = held_out_step(trained, training.frozen, rows, objective=training.objective)
        total = total + float(loss)
        count = count + int(tokens)
    return total / count


def _not_finite(training: Training, state: TrainingState, batch: dict[str, np.ndarray], what: str) -> NotFiniteError:
    """Make what is to be said of a step that could not be made; `state` is the one before it."""
    step = int(state.step) + 1
    rows = [int(row) for row in batch["row"] if row >= 0]
    names = [name for row in rows for name in training.rows.names[row]]
    cause = "its activations or its gradient overflow; lower training.learning_rate" + (
        "" if training.objective.compute == "float32" else ", or pass --training.compute float32"
    )
    model = join(state.trained, training.frozen)
    for whose, tree in (("the model", model), ("the dense model", training.frozen.teacher)):
        if (place := first_not_finite(tree)) is not None:
            cause = f"{whose} has numbers that are not finite, in {place}; load, or prune, another model"
            break
    return NotFiniteError(
        f"training: the {what} of step {step} is not finite, on the rows {some([*map(str, rows)], 8)} "
        f"({some(names, 3)}); the state before it is saved as checkpoint {step - 1}. Likely cause: {cause}"
    )
