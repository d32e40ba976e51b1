"""The one calibration pass: observe, batch by batch, the union of what all estimators need.

Gates get a batch axis, so one backward pass yields each example's gate gradients together with the summed weight
gradients, and activations are summed on the way forward. Squared weight gradients, which need every example's own, come
from the same backward pass (`squares`).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from saap_jax.estimation.accumulate import statistics_dtype
from saap_jax.estimation.base import Batch, Curvature, Estimator, Plan, Point, Statistic, Statistics, wide
from saap_jax.estimation.hessian import joint_curvature
from saap_jax.estimation.not_finite import refuse_not_finite
from saap_jax.estimation.objectives import OBJECTIVES, summed_objective
from saap_jax.estimation.squares import flattened, parts, watched
from saap_jax.estimation.statistics import STATISTICS
from saap_jax.llama.loss import predicted_tokens
from saap_jax.llama.model import Llama, Observe
from saap_jax.llama.product import check_plain
from saap_jax.llama.segments import join_segments, ones_gates
from saap_jax.runtime.constraints import on_mesh_of
from saap_jax.runtime.gather import fetched
from saap_jax.runtime.mesh import Places, held, mesh_of, places_of, settled, shard
from saap_jax.structures.weights import Weights, units_of
from saap_jax.types import STRUCTURES, Gates, Objective, Remat, Scores


def observe(
    model: Llama,
    batches: Iterable[Batch],
    needs: frozenset[Statistic],
    *,
    gates: Gates | None = None,
    curvature: Curvature | None = None,
    remat: Remat = "dots",
    progress: Callable[[Sequence[Batch]], Iterator[Batch]] = iter,
) -> Statistics:
    """Run one pass over microbatches of one shape and return the statistics that `needs` names.

    Args:
        batches: (tokens, mask) pairs, all of one shape; padding tokens on the right, padding rows at the very end.
        gates: where the model is observed, `[layers, units]` a structure: at masks, it is a pruned model; None: all 1.
        curvature: how the gate Hessian is observed, if it is needed; see `curvature_of`.
        remat: what the backward pass recomputes, see `saap_jax.llama.model.Remat`.
        progress: wraps the batches, to show progress.

    Raises:
        ValueError: no example, misplaced padding, or a loss, gradient or activation that is not finite (with the
            statistic, the parameter or structure, the layer and, where it can be told, the example); a model whose
            matrices are not plain floats; two statistics of one name.
    """
    check_plain(model, "observing")
    batches = list(batches)
    _check_batches(batches)
    _check_names(needs)
    statistics = _observe(model, batches, needs, gates, curvature or Curvature(), remat, progress)

    def alone(example: int, statistic: Statistic) -> Any:
        batch, row = divmod(example, len(batches[0][0]))
        tokens, mask = batches[batch]
        one = (tokens[row : row + 1], mask[row : row + 1])
        probe = dataclasses.replace(curvature or Curvature(), probes=1)
        return _observe(model, [one], frozenset({statistic}), gates, probe, remat, iter).values[statistic]

    refuse_not_finite(statistics, model, batches, alone)
    return statistics


def _check_batches(batches: list[Batch]) -> None:
    if not batches or not any(mask[:, 1:].any() for _, mask in batches):
        raise ValueError("calibration: expected at least one example with two tokens, got none")
    masks = np.concatenate([mask for _, mask in batches])
    if (masks[:, 1:] & ~masks[:, :-1]).any() or (masks[1:, 0] & ~masks[:-1, 0]).any():
        raise ValueError("calibration: expected padding tokens on the right and padding rows at the end; sort them so")


def _check_names(needs: frozenset[Statistic]) -> None:
    known = dict(STATISTICS)
    for need in sorted(needs):
        if known.setdefault(need.name, need) != need:
            raise ValueError(f"needs: expected statistics of different names, got {need.name!r} twice; rename yours")


def _observe(
    model: Llama,
    batches: list[Batch],
    needs: frozenset[Statistic],
    gates: Gates | None,
    curvature: Curvature,
    remat: Remat,
    progress: Callable[[Sequence[Batch]], Iterator[Batch]],
) -> Statistics:
    size = len(batches[0][0])
    gates = ones_gates(model.segments) if gates is None else gates
    plan = Plan(size * len(batches), curvature)
    state = {need: need.init(model, plan) for need in sorted(needs)}
    losses = jnp.zeros(plan.examples, statistics_dtype(model))
    state, losses, gates = settled((state, losses, gates), mesh_of(model))
    apart = {need: state.pop(need) for need in sorted(needs) if need.step}
    places = places_of((state, losses))  # once: jax spells those of a result otherwise
    places_apart = {need: places_of(total) for need, total in apart.items()}
    before = losses
    for index, (tokens, mask) in enumerate(progress(batches) if needs else ()):
        tokens, mask, position = shard(tokens, model), shard(mask, model), jnp.asarray(index * size, jnp.int32)
        with on_mesh_of(model):
            state, losses = observe_step(
                model, state, losses, tokens, mask, position, gates,
                needs=frozenset(state), remat=remat, places=places,
            )  # fmt: skip
            for need, total in apart.items():
                assert need.step is not None
                apart[need] = need.step(
                    model, total, tokens, mask, gates, curvature=curvature, remat=remat, places=places_apart[need]
                )
        jax.block_until_ready(before)  # one step behind: this one runs while the host gets the next one ready
        before = losses
    state |= apart
    masks = np.concatenate([mask for _, mask in batches])
    counts = Statistics(
        examples=jnp.asarray(int(masks.any(axis=1).sum())),
        tokens=jnp.asarray(int(masks[:, 1:].sum())),
        losses=losses[: int(masks.any(axis=1).sum())],
        values={},
    )
    return counts._replace(values={need: _finished(need, state.pop(need), counts) for need in sorted(needs)})


def _finished(statistic: Statistic, total: Any, counts: Statistics) -> Any:
    return jax.tree.map(lambda array: statistic.accumulation.finish(array, counts), total)


@functools.partial(jax.jit, static_argnames=("needs", "remat", "places"), donate_argnames=("state",))
def observe_step(
    model: Llama,
    state: dict[Statistic, Any],
    losses: Float[Array, "examples"],
    tokens: Int[Array, "batch seq"],
    mask: Bool[Array, "batch seq"],
    position: Int[Array, ""],
    gates: Gates,
    *,
    needs: frozenset[Statistic],
    remat: Remat,
    places: Places = (),
) -> tuple[dict[Statistic, Any], Float[Array, "examples"]]:
    """Add one microbatch, whose first example has index `position`, to the accumulators, which stay at `places`."""

    new, means = contributions(model, tokens, mask, gates, needs, remat)
    state = {
        need: jax.tree.map(
            lambda total, more, add=need.accumulation.add: add(total, more, position, len(tokens)),
            state[need],
            new[need],
        )
        for need in sorted(needs)
    }
    return held((state, jax.lax.dynamic_update_slice_in_dim(losses, means, position, axis=0)), places)


def contributions(
    model: Llama,
    tokens: Int[Array, "batch seq"],
    mask: Bool[Array, "batch seq"],
    gates: Gates,
    needs: frozenset[Statistic],
    remat: Remat,
) -> tuple[dict[Statistic, Any], Float[Array, "batch"]]:
    """Return what a microbatch adds to each statistic, and the mean loss of its examples.

    Each objective that is differentiated takes a backward pass of its own.
    """
    new: dict[Statistic, Any] = {}
    means: Float[Array, "batch"] | None = None
    asked: list[Objective] = [each for each in OBJECTIVES if needs_of(needs, each)] or ["loss"]
    for objective in asked:
        some, means = _contributions(model, tokens, mask, gates, needs_of(needs, objective), objective, remat)
        new |= some
    assert means is not None  # the loss of all is the same
    return new, means


def needs_of(needs: frozenset[Statistic], objective: Objective) -> frozenset[Statistic]:
    """Return the statistics of one objective."""
    return frozenset(need for need in needs if need.objective == objective)


def _contributions(
    model: Llama,
    tokens: Int[Array, "batch seq"],
    mask: Bool[Array, "batch seq"],
    gates: Gates,
    needs: frozenset[Statistic],
    objective: Objective,
    remat: Remat,
) -> tuple[dict[Statistic, Any], Float[Array, "batch"]]:
    """Return what a microbatch adds to the statistics of one objective, and the mean loss of its examples."""
    dtype = statistics_dtype(model)
    counts = jnp.maximum(predicted_tokens(mask), 1).astype(dtype)
    examples_gates = {n: jnp.broadcast_to(g.astype(dtype), (len(tokens), *g.shape)) for n, g in gates.items()}

    def summed_loss(model: Llama, gates: Gates) -> tuple[Array, tuple[Array, list]]:
        seen = observer(needs, mask, model.constants.norm_eps)
        values, sums, observed = summed_objective(model, tokens, mask, gates, objective, observe=seen, remat=remat)
        return jnp.sum(values), (sums, observed)

    sources = {need.source for need in needs}
    on_squares, on_gates = "squares" in sources, "gates" in sources
    on_weights = on_squares or "weights" in sources
    if on_weights:
        model = watched(model, 1 / counts) if on_squares else flattened(model)
    inputs = (model, examples_gates if on_gates else gates)
    argnums = (0,) * on_weights + (1,) * on_gates
    if argnums:
        gradients, (sums, observed) = jax.grad(summed_loss, argnums=argnums, has_aux=True)(*inputs)
    else:
        gradients, (_, (sums, observed)) = (), summed_loss(*inputs)
    by_argument: dict[int, Any] = dict(zip(argnums, gradients, strict=True))
    shown: dict[str, Any] = {}
    if on_weights:
        gradient, squares = parts(by_argument[0])
        shown |= {"weights": gradient, "squares": squares}
    if on_gates:
        shown["gates"] = {name: by_argument[1][name] / counts[:, None, None] for name in STRUCTURES}
    activations = joined(observed)
    new = {need: need.contribute(activations.get(need, shown.get(need.source))) for need in sorted(needs)}
    return new, sums.astype(dtype) / counts


@functools.partial(jax.jit, static_argnames=("formulas",))
def score_step(statistics: Statistics, model: Weights, *, formulas: tuple[Callable, ...]) -> tuple[Scores, ...]:
    """Apply the formulas of several estimators to one set of statistics, in one program."""
    return tuple(formula(statistics, model) for formula in formulas)


def score(estimators: dict[str, Estimator], statistics: Statistics, model: Weights) -> dict[str, Scores]:
    """Score every unit by every estimator; `{estimator: {structure: [layers, units]}}` as numpy arrays.

    Raises:
        ValueError: a score that is not finite, with the estimator, the layer and the unit.
    """
    values = score_step(statistics, model, formulas=tuple(e.score for e in estimators.values()))
    scores = {name: jax.tree.map(fetched, value) for name, value in zip(estimators, values, strict=True)}
    exists = units_of(model)
    for name, by_structure in scores.items():
        for structure, units in exists.items():
            wrong = np.argwhere(units & ~np.isfinite(by_structure[structure]))
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


def curvature_of(estimators: Iterable[Estimator]) -> Curvature:
    """Return how to observe the gate Hessian for all the estimators in one pass."""
    return joint_curvature({e.curvature for e in estimators if e.curvature is not None})


def observer(needs: frozenset[Statistic], mask: Bool[Array, "batch seq"], norm_eps: float) -> Observe | None:
    """Return what sums activations over the real tokens of a microbatch, `{statistic: {key: sums}}` a point.

    None where no activation is needed. Nothing of it is differentiated.
    """
    of_activations = sorted(need for need in needs if need.source == "activations")
    layer: dict[str, Array] = {}  # the points of a layer come one after the other in the same trace

    def observe(point: str, activation: Array) -> dict[Statistic, Mapping[str, Any]]:
        layer[point] = wide(jax.lax.stop_gradient(activation))
        return {need: need.observe(Point(point, layer, mask, norm_eps)) for need in of_activations}

    return observe if of_activations else None


def joined(observed: list[dict[str, dict[Statistic, Mapping[str, Any]]]]) -> dict[Statistic, dict[str, Any]]:
    """Join what was observed at the points of the layers of each segment into trees of the whole model."""
    segments = []
    for points in observed:
        segment: dict[Statistic, dict[str, Any]] = {}
        for point in points.values():
            for statistic, sums in point.items():
                segment.setdefault(statistic, {}).update(sums)
        segments.append(segment)
    return join_segments(segments)
