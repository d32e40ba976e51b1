"""The one calibration pass: observe, batch by batch, the union of what all estimators need; and score by it.

Gates get a batch axis, so one backward pass yields each example's gate gradients together with the summed weight
gradients, and activations are summed on the way forward. Squared weight gradients, which need every example's own, come
from the same backward pass (`squares`).
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from saap_jax.estimation.base import (
    Batch,
    Curvature,
    Estimator,
    Plan,
    Point,
    Statistic,
    Statistics,
    statistics_dtype,
    wide,
)
from saap_jax.estimation.objectives import OBJECTIVES, summed_objective
from saap_jax.estimation.registry import STATISTICS
from saap_jax.estimation.squares import flattened, watched
from saap_jax.llama.loss import predicted_tokens
from saap_jax.llama.model import Llama, Observe
from saap_jax.llama.product import check_plain
from saap_jax.llama.segments import join_segments, ones_gates, segment_bounds
from saap_jax.runtime.constraints import on_mesh_of
from saap_jax.runtime.gather import fetched, first_not_finite, leaves_by_path
from saap_jax.runtime.mesh import Places, held, mesh_of, places_of, settled, shard
from saap_jax.structures.weights import Weights, weights_of
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
    """Observe the statistics that `needs` names in one pass over microbatches of one shape.

    Args:
        batches: (tokens, mask) pairs, all of one shape; padding tokens on the right, padding rows at the very end.
        gates: where the model is observed, `[layers, units]` a structure: at masks, it is a pruned model; None: all 1.
        curvature: how the gate Hessian is observed, if it is needed; see `curvature_of`.
        remat: what the backward pass recomputes, see `saap_jax.llama.model.Remat`.
        progress: wraps the batches, to show progress.

    Raises:
        ValueError: no example, misplaced padding, or a loss, gradient or activation that is not finite (with the
            statistic, the parameter or structure, the layer and, of what is kept of each, the example); a model whose
            matrices are not plain floats; two statistics of one name.
    """
    check_plain(model, "observing")
    batches = list(batches)
    curvature = curvature or Curvature()
    _check_batches(batches)
    known = dict(STATISTICS)
    for need in sorted(needs):
        if known.setdefault(need.name, need) != need:
            raise ValueError(f"needs: expected statistics of different names, got {need.name!r} twice; rename yours")
    size = len(batches[0][0])
    plan = Plan(size * len(batches), curvature)
    state = {need: need.init(model, plan) for need in sorted(needs)}
    losses = jnp.zeros(plan.examples, statistics_dtype(model))
    at = ones_gates(model.segments) if gates is None else gates
    state, losses, at = settled((state, losses, at), mesh_of(model))
    apart = {need: state.pop(need) for need in sorted(needs) if need.step}
    places = places_of((state, losses))  # once: jax spells those of a result otherwise
    places_apart = {need: places_of(total) for need, total in apart.items()}
    before = losses
    for index, (tokens, mask) in enumerate(progress(batches) if needs else ()):
        batch = shard(tokens, model), shard(mask, model)
        with on_mesh_of(model):
            place = (*batch, jnp.asarray(index * size, jnp.int32))
            state, losses = observe_step(model, state, losses, place, at, remat=remat, places=places)
            for need, total in apart.items():
                options = {"curvature": curvature, "remat": remat, "places": places_apart[need]}
                apart[need] = need.step(model, total, batch, at, **options) if need.step else total
        jax.block_until_ready(before)  # one step behind: this one runs while the host gets the next one ready
        before = losses
    state |= apart
    masks = np.concatenate([mask for _, mask in batches])
    examples = int(masks.any(axis=1).sum())
    tokens = int(masks[:, 1:].sum())
    counts = Statistics(jnp.asarray(examples), jnp.asarray(tokens), losses[:examples], {}, gates and at)
    for need in sorted(needs):
        finish = need.accumulation.finish
        counts.values[need] = jax.tree.map(lambda total, finish=finish: finish(total, counts), state.pop(need))
    refuse_not_finite(counts, model)
    return counts


def _check_batches(batches: list[Batch]) -> None:
    if not batches or not any(mask[:, 1:].any() for _, mask in batches):
        raise ValueError("calibration: expected at least one example with two tokens, got none")
    masks = np.concatenate([mask for _, mask in batches])
    if (masks[:, 1:] & ~masks[:, :-1]).any() or (masks[1:, 0] & ~masks[:-1, 0]).any():
        raise ValueError("calibration: expected padding tokens on the right and padding rows at the end; sort them so")


@functools.partial(jax.jit, static_argnames=("remat", "places"), donate_argnames=("state",))
def observe_step(
    model: Llama,
    state: dict[Statistic, Any],
    losses: Float[Array, "examples"],
    batch: tuple[Int[Array, "batch seq"], Bool[Array, "batch seq"], Int[Array, ""]],
    gates: Gates,
    *,
    remat: Remat,
    places: Places = (),
) -> tuple[dict[Statistic, Any], Float[Array, "examples"]]:
    """Add one microbatch (tokens, mask, index of its first example) to the accumulators, which stay at `places`."""
    state, means = grown(model, batch, gates, state, remat)
    return held((state, jax.lax.dynamic_update_slice_in_dim(losses, means, batch[2], axis=0)), places)


def grown(
    model: Llama,
    batch: tuple[Int[Array, "batch seq"], Bool[Array, "batch seq"], Int[Array, ""]],
    gates: Gates,
    state: dict[Statistic, Any],
    remat: Remat,
) -> tuple[dict[Statistic, Any], Float[Array, "batch"]]:
    """Add a microbatch to each statistic, those of squares in its backward pass; with the mean loss of its examples.

    Each objective that is differentiated takes a backward pass of its own.
    """
    tokens, mask, position = batch
    dtype = statistics_dtype(model)
    counts = jnp.maximum(predicted_tokens(mask), 1).astype(dtype)
    examples_gates = {n: jnp.broadcast_to(g.astype(dtype), (len(tokens), *g.shape)) for n, g in gates.items()}

    def one_pass(objective: Objective, needs: frozenset[Statistic]) -> tuple[dict[Statistic, Any], Array]:
        sources = {need.source for need in needs}
        on_weights = not sources.isdisjoint(("weights", "squares"))
        on_gates = "gates" in sources
        totals = {need: jax.tree.map(jax.new_ref, state[need]) for need in sorted(needs) if need.source == "squares"}

        def summed(model: Llama, gates: Gates) -> tuple[Array, tuple[Array, list]]:
            seen = observer(needs, mask)
            if on_weights:
                if totals:
                    model = watched(model, 1 / counts, [*totals.values()])
                else:
                    model = flattened(model)
            values, sums, observed = summed_objective(model, tokens, mask, gates, objective, observe=seen, remat=remat)
            return jnp.sum(values), (sums, observed)

        inputs = (model, examples_gates if on_gates else gates)
        argnums = (0,) * on_weights + (1,) * on_gates
        gradients: Any = ()
        if argnums:
            gradients, (sums, observed) = jax.grad(summed, argnums=argnums, has_aux=True)(*inputs)
        else:
            _, (sums, observed) = summed(*inputs)
        shown: dict[str, Any] = {}
        if on_weights:
            shown["weights"] = gradients[0]
        if on_gates:
            shown["gates"] = {name: gradients[-1][name] / counts[:, None, None] for name in STRUCTURES}
        activations = joined(observed)
        new = {need: jax.tree.map(jax.freeze, total) for need, total in totals.items()}
        for need in sorted(needs - totals.keys()):
            more = need.contribute(activations.get(need, shown.get(need.source)))
            add = need.accumulation.add
            new[need] = jax.tree.map(lambda total, more, add=add: add(total, more, position), state[need], more)
        return new, sums.astype(dtype) / counts

    by_objective: dict[Objective, frozenset[Statistic]]
    by_objective = {each: frozenset(need for need in state if need.objective == each) for each in OBJECTIVES}
    passes = [one_pass(each, own) for each, own in by_objective.items() if own or (not state and each == "loss")]
    means = passes[-1][1]  # the loss of all is the same
    return {need: value for new, _ in passes for need, value in new.items()}, means


@functools.partial(jax.jit, static_argnames=("formulas",))
def score_step(statistics: Statistics, weights: Weights, *, formulas: tuple[Callable, ...]) -> tuple[Scores, ...]:
    """Apply the formulas of several estimators to one set of statistics, in one program."""
    return tuple(formula(statistics, weights) for formula in formulas)


def score(estimators: dict[str, Estimator], statistics: Statistics, model: Any) -> dict[str, Scores]:
    """Score every unit by every estimator; `{estimator: {structure: [layers, units]}}` as numpy arrays.

    Raises:
        ValueError: scores of another shape, or one that is not finite, with the estimator, the layer and the unit.
    """
    weights = weights_of(model)
    values = score_step(statistics, weights, formulas=tuple(e.score for e in estimators.values()))
    scores = {name: jax.tree.map(fetched, value) for name, value in zip(estimators, values, strict=True)}
    there = {name: fetched(units) for name, units in statistics.there(weights).items()}
    for name, by_structure in scores.items():
        for structure, units in there.items():
            if (shape := getattr(by_structure.get(structure), "shape", None)) != units.shape:
                raise ValueError(
                    f"estimator {name}: expected scores of {structure} of shape {units.shape}, got {shape or 'none'}"
                )
            wrong = np.argwhere(units & ~np.isfinite(by_structure[structure]))
            if len(wrong):
                layer, unit = wrong[0]
                raise ValueError(
                    f"estimator {name}: {len(wrong)} scores of structure {structure} are not finite, the first at "
                    f"layer {layer}, unit {unit}; check the model's weights and the calibration text"
                )
    return scores


def union_of_needs(estimators: Iterable[Estimator]) -> frozenset[Statistic]:
    """Join the statistics that estimators need."""
    return frozenset[Statistic]().union(*(estimator.needs for estimator in estimators))


def observer(needs: frozenset[Statistic], mask: Bool[Array, "batch seq"]) -> Observe | None:
    """Sum activations over the real tokens of a microbatch, `{statistic: {key: sums}}` a point.

    None where no activation is needed. Nothing of it is differentiated.
    """
    of_activations = sorted(need for need in needs if need.source == "activations")
    layer: dict[str, Array] = {}  # the points of a layer come one after the other in the same trace, gates first

    def observe(point: str, activation: Array) -> dict[Statistic, Mapping[str, Any]]:
        layer[point] = wide(jax.lax.stop_gradient(activation))
        if point.endswith("_gates"):
            return {}
        return {need: need.observe(Point(point, layer, mask)) for need in of_activations}

    return observe if of_activations else None


def joined(observed: list[dict[str, dict[Statistic, Mapping[str, Any]]]]) -> dict[Statistic, Any]:
    """Join what was observed at the points of the layers of each segment into trees of the whole model."""
    segments = []
    for points in observed:
        segment: dict[Statistic, dict[str, Any]] = {}
        for point in points.values():
            for statistic, sums in point.items():
                segment.setdefault(statistic, {}).update(sums)
        segments.append(segment)
    whole: dict[Statistic, Any] = join_segments(segments)
    for need, sums in whole.items():
        if need.kind is not None:
            fields = zip(*sums.values(), strict=True)
            whole[need] = need.kind(*(dict(zip(sums, field, strict=True)) for field in fields))
    return whole


def refuse_not_finite(statistics: Statistics, model: Llama) -> None:
    """Raise ValueError where a loss or a statistic is not finite, with its place in the model."""
    wrong = np.flatnonzero(~np.isfinite(fetched(statistics.losses)))
    if len(wrong):
        place = first_not_finite(model)
        raise ValueError(
            f"calibration: the loss of {len(wrong)} examples is not finite, the first is example {wrong[0]}; "
            + (f"expected finite weights, got others in {place}" if place else f"its activations overflow: {ADVICE}")
        )
    for statistic, value in statistics.values.items():
        if (path := first_not_finite(value)) is None:
            continue
        index = [int(i) for i in np.argwhere(~np.isfinite(fetched(leaves_by_path(value)[path])))[0]]
        axes = dict(zip(statistic.axes(path), index, strict=False))
        place = path.rpartition("/")[2] + "".join(f" {axis.removesuffix('s')} {at}" for axis, at in axes.items())
        if in_segment := re.fullmatch(r"segments/(\d+)/(.+)", path):
            first = segment_bounds(model.segments)[int(in_segment[1])].start
            place = f"{in_segment[2]} layer {first + index[0]}"
        raise ValueError(f"calibration: the {statistic.name.replace('_', ' ')} of {place} is not finite; {ADVICE}")


ADVICE = "check the model's weights and its dtype"
