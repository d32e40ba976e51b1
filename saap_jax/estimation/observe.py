"""The one calibration pass: observe, batch by batch, the union of what all estimators need.

Gates get a batch axis, so one backward pass yields each example's gate gradients together with the summed weight
gradients. Accumulators are float32 sums with counts; the last step turns them into means (`Statistics`).
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from saap_jax.estimation.base import Estimator, Moments, Statistic, Statistics, wide
from saap_jax.llama.loss import next_token_losses, predicted_tokens
from saap_jax.llama.model import Llama
from saap_jax.llama.runs import existing_units, join_runs, ones_gates
from saap_jax.types import STRUCTURES, Gates, Remat, Scores

Batch = tuple[Int[Array | np.ndarray, "batch seq"], Bool[Array | np.ndarray, "batch seq"]]
"""Tokens and which of them are real; a row without real tokens is padding and counts for nothing."""


class Observation(NamedTuple):
    """What one microbatch shows; None where no estimator needs it."""

    weight_gradient: Llama | None
    """Gradient of the summed loss."""
    gate_gradient: Gates | None
    """Gradient of each example's mean loss, [batch, layers, units]."""
    activation_sums: Moments | None
    """Sums of a and a² over the real tokens."""
    position: Int[Array, ""]
    """Index of the microbatch's first example in the pass."""


class Accumulator(NamedTuple):
    """How a statistic is kept during a pass: allocated, updated by a microbatch, and turned into means at the end."""

    init: Callable[[Llama, int], Any]
    """(model, examples) -> zeros, from shapes alone."""
    update: Callable[[Any, Observation], Any]
    finish: Callable[[Any, "Totals"], Any]


class Totals(NamedTuple):
    """Counts of a whole pass, as Python numbers."""

    examples: int
    predicted: int
    """Tokens that enter the loss."""
    seen: int
    """Real tokens, each with one activation a unit."""


def _float32_zeros(model: Llama, examples: int) -> Llama:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, _wide_dtype(x)), model)


def _example_rows(model: Llama, examples: int) -> Gates:
    dtype = _wide_dtype(model.embedding[...])
    return {name: jnp.zeros((examples, *units.shape), dtype) for name, units in existing_units(model.runs).items()}


def _moment_zeros(model: Llama, examples: int) -> Moments:
    q_per_kv, head_dim = (max(run.attention.query.shape[axis] for run in model.runs) for axis in (3, 4))
    coordinates = {"attention": q_per_kv * head_dim, "mlp": 1}
    dtype = _wide_dtype(model.embedding[...])
    units = existing_units(model.runs)
    return Moments(*({n: jnp.zeros((*u.shape, coordinates[n]), dtype) for n, u in units.items()} for _ in range(2)))


def _write_rows(rows: Gates, observation: Observation) -> Gates:
    def write(row: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(row, wide(new), observation.position, axis=0)

    return jax.tree.map(write, rows, observation.gate_gradient)


def _add(total: Any, new: Any) -> Any:
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, new)


def _divide(total: Any, count: int) -> Any:
    return jax.tree.map(lambda x: x / count, total)


ACCUMULATORS: dict[Statistic, Accumulator] = {
    Statistic.WEIGHT_GRADIENT: Accumulator(
        init=_float32_zeros,
        update=lambda total, seen: _add(total, seen.weight_gradient),
        finish=lambda total, counts: _divide(total, counts.predicted),
    ),
    Statistic.GATE_GRADIENT: Accumulator(
        init=_example_rows,
        update=_write_rows,
        finish=lambda rows, counts: {name: row[: counts.examples] for name, row in rows.items()},
    ),
    Statistic.ACTIVATION_MOMENTS: Accumulator(
        init=_moment_zeros,
        update=lambda total, seen: _add(total, seen.activation_sums),
        finish=lambda total, counts: _divide(total, counts.seen),
    ),
}


def observe(
    model: Llama,
    batches: Iterable[Batch],
    needs: frozenset[Statistic],
    *,
    remat: Remat = "dots",
    progress: Callable[[Iterable[Batch]], Iterator[Batch]] = iter,
) -> Statistics:
    """Run one pass over microbatches of one shape and return the statistics that `needs` names.

    Args:
        batches: (tokens, mask) pairs, all of one shape; padding rows only at the end of the last one.
        remat: what the backward pass recomputes, see `saap_jax.llama.model.Remat`.
        progress: wraps the batches, to show progress.

    Raises:
        ValueError: no example, or a loss or gradient that is not finite (with the example and the layer).
    """
    batches = list(batches)
    if not batches or not any(mask.any() for _, mask in batches):
        raise ValueError("calibration: expected at least one example with two tokens, got none")
    size = batches[0][0].shape[0]
    state = {need: ACCUMULATORS[need].init(model, size * len(batches)) for need in sorted(needs)}
    losses = jnp.zeros(size * len(batches), _wide_dtype(model.embedding[...]))
    if needs:
        for index, (tokens, mask) in enumerate(progress(batches)):
            position = jnp.asarray(index * size, jnp.int32)
            state, losses = observe_step(
                model, state, losses, jnp.asarray(tokens), jnp.asarray(mask), position, needs=needs, remat=remat
            )
            jax.block_until_ready(losses)  # so that progress tells the truth
    masks = np.concatenate([mask for _, mask in batches])
    totals = Totals(int(masks.any(axis=1).sum()), int(masks[:, 1:].sum()), int(masks.sum()))
    statistics = Statistics(
        examples=jnp.asarray(totals.examples),
        tokens=jnp.asarray(totals.predicted),
        losses=losses[: totals.examples],
        values={need: ACCUMULATORS[need].finish(state.pop(need), totals) for need in sorted(needs)},
    )
    _refuse_not_finite(statistics)
    return statistics


@functools.partial(jax.jit, static_argnames=("needs", "remat"), donate_argnames=("state", "losses"))
def observe_step(
    model: Llama,
    state: dict[Statistic, Any],
    losses: Float[Array, "examples"],
    tokens: Int[Array, "batch seq"],
    mask: Bool[Array, "batch seq"],
    position: Int[Array, ""],
    *,
    needs: frozenset[Statistic],
    remat: Remat,
) -> tuple[dict[Statistic, Any], Float[Array, "examples"]]:
    """Add one microbatch, whose first example has index `position`, to the accumulators."""
    counts = jnp.maximum(predicted_tokens(mask), 1)
    wants = Statistic.ACTIVATION_MOMENTS in needs
    gates = {n: jnp.broadcast_to(g[None], (len(tokens), *g.shape)) for n, g in ones_gates(model.runs).items()}

    def summed_loss(model: Llama, gates: Gates | None) -> tuple[Array, tuple[Array, list]]:
        sums, observed = next_token_losses(
            model, tokens, mask, gates, observe=_moments_of(mask) if wants else None, remat=remat
        )
        return jnp.sum(sums), (sums, observed)

    wanted = {Statistic.WEIGHT_GRADIENT: 0, Statistic.GATE_GRADIENT: 1}
    argnums = tuple(number for statistic, number in wanted.items() if statistic in needs)
    inputs = (model, gates if Statistic.GATE_GRADIENT in needs else None)
    if argnums:
        gradients, (sums, observed) = jax.grad(summed_loss, argnums=argnums, has_aux=True)(*inputs)
    else:
        gradients, (_, (sums, observed)) = (), summed_loss(*inputs)
    by_argument = dict(zip(argnums, gradients, strict=True))
    observation = Observation(
        weight_gradient=by_argument.get(0),
        gate_gradient=jax.tree.map(lambda g: g / counts[:, None, None].astype(g.dtype), by_argument.get(1)),
        activation_sums=_join_moments(observed) if wants else None,
        position=position,
    )
    means = (sums / counts.astype(sums.dtype)).astype(losses.dtype)
    updated = {need: ACCUMULATORS[need].update(state[need], observation) for need in sorted(needs)}
    return updated, jax.lax.dynamic_update_slice_in_dim(losses, means, position, axis=0)


@functools.partial(jax.jit, static_argnames=("formulas",))
def score_step(statistics: Statistics, model: Llama, *, formulas: tuple[Callable, ...]) -> tuple[Scores, ...]:
    """Apply the formulas of several estimators to one set of statistics, in one program."""
    return tuple(formula(statistics, model) for formula in formulas)


def score(estimators: dict[str, Estimator], statistics: Statistics, model: Llama) -> dict[str, Scores]:
    """Score every unit by every estimator; `{estimator: {structure: [layers, units]}}` as numpy arrays.

    Raises:
        ValueError: a score that is not finite, with the estimator, the layer and the unit.
    """
    values = score_step(statistics, model, formulas=tuple(e.score for e in estimators.values()))
    scores = {name: jax.tree.map(np.asarray, value) for name, value in zip(estimators, values, strict=True)}
    exists = existing_units(model.runs)
    for name, by_structure in scores.items():
        for structure in STRUCTURES:
            wrong = np.argwhere(exists[structure] & ~np.isfinite(by_structure[structure]))
            if len(wrong):
                layer, unit = wrong[0]
                raise ValueError(
                    f"estimator {name}: {len(wrong)} scores of structure {structure} are not finite, the first at "
                    f"layer {layer}, unit {unit}; check the model's weights and the calibration text"
                )
    return scores


def union_of_needs(estimators: Iterable[Estimator]) -> frozenset[Statistic]:
    """Return every statistic that some estimator needs."""
    return frozenset[Statistic]().union(*(estimator.needs for estimator in estimators))


def _moments_of(mask: Bool[Array, "batch seq"]) -> Callable[[str, Array], Any]:
    """Return an observer that sums the gated activations and their squares over the real tokens."""

    def observe(point: str, activation: Array) -> tuple[Array, Array] | None:
        if point not in STRUCTURES:
            return None
        values = wide(activation)
        weights = mask.astype(values.dtype)
        return jnp.einsum("bt,bt...->...", weights, values), jnp.einsum("bt,bt...->...", weights, jnp.square(values))

    return observe


def _join_moments(observed: list) -> Moments:
    """Join the runs' sums, `[layers, units, ...]`, and flatten what follows the units into coordinates."""

    def join(name: str, which: int) -> Array:
        pieces = [run[name][which] for run in observed]
        return join_runs([piece.reshape(*piece.shape[:2], math.prod(piece.shape[2:])) for piece in pieces])

    return Moments(*({name: join(name, which) for name in STRUCTURES} for which in (0, 1)))


def _wide_dtype(array: Any) -> Any:
    return jnp.float64 if array.dtype == jnp.float64 else jnp.float32


def _refuse_not_finite(statistics: Statistics) -> None:
    """Raise where a loss or a gate gradient is not finite, naming the example and the layer."""
    wrong = np.flatnonzero(~np.isfinite(np.asarray(statistics.losses)))
    if len(wrong):
        raise ValueError(
            f"calibration: the loss of {len(wrong)} examples is not finite, the first is example {wrong[0]}; "
            "check the model's weights and its dtype"
        )
    for name, gradient in statistics.values.get(Statistic.GATE_GRADIENT, {}).items():
        bad = np.argwhere(~np.isfinite(np.asarray(gradient)))
        if len(bad):
            example, layer, unit = bad[0]
            raise ValueError(
                f"calibration: the gate gradient of {name} unit {unit} in layer {layer} is not finite "
                f"on example {example}; check the model's weights and its dtype"
            )
