"""The one calibration pass: observe, batch by batch, the union of what all estimators need.

Gates get a batch axis, so one backward pass yields each example's gate gradients together with the summed weight
gradients, and activations are summed on the way forward. Squared weight gradients, which need every example's own, come
from the same backward pass (`squares`).
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from saap_jax.discovery.weights import Weights, units_of
from saap_jax.estimation.accumulate import ACCUMULATORS, Plan, add, finish, statistics_dtype
from saap_jax.estimation.activations import MULTIPLES, used
from saap_jax.estimation.base import Batch, Curvature, Estimator, Moments, Statistic, Statistics, wide
from saap_jax.estimation.blocks import turn
from saap_jax.estimation.gram import Gram, gram_sums, token_weights
from saap_jax.estimation.hessian import hessian_step, joint_curvature
from saap_jax.estimation.not_finite import refuse_not_finite
from saap_jax.estimation.squares import parts, watched
from saap_jax.llama.loss import next_token_losses, predicted_tokens
from saap_jax.llama.model import Llama, Observe
from saap_jax.llama.product import check_plain
from saap_jax.llama.segments import join_runs, ones_gates
from saap_jax.runtime.constraints import on_mesh_of
from saap_jax.runtime.gather import fetched
from saap_jax.runtime.mesh import Places, held, mesh_of, places_of, settled, shard
from saap_jax.types import STRUCTURES, Gates, Remat, Scores

__all__ = ["ACCUMULATORS", "Batch", "curvature_of", "observe", "observe_step", "score", "score_step", "union_of_needs"]


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
            matrices are not plain floats.
    """
    check_plain(model, "observing")
    batches = list(batches)
    _check_batches(batches)
    statistics = _observe(model, batches, needs, gates, curvature or Curvature(), remat, progress)

    def alone(example: int, statistic: Statistic) -> Any:
        batch, row = divmod(example, len(batches[0][0]))
        tokens, mask = batches[batch]
        one = (tokens[row : row + 1], mask[row : row + 1])
        return _observe(model, [one], frozenset({statistic}), gates, Curvature(probes=1), remat, iter).values[statistic]

    refuse_not_finite(statistics, model, batches, alone)
    return statistics


def _check_batches(batches: list[Batch]) -> None:
    if not batches or not any(mask[:, 1:].any() for _, mask in batches):
        raise ValueError("calibration: expected at least one example with two tokens, got none")
    masks = np.concatenate([mask for _, mask in batches])
    if (masks[:, 1:] & ~masks[:, :-1]).any() or (masks[1:, 0] & ~masks[:-1, 0]).any():
        raise ValueError("calibration: expected padding tokens on the right and padding rows at the end; sort them so")


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
    gates = ones_gates(model.runs) if gates is None else gates
    plan = Plan(size * len(batches), curvature)
    state = {need: ACCUMULATORS[need].init(model, plan) for need in sorted(needs)}
    hessian = state.pop(Statistic.GATE_HESSIAN, None)
    losses = jnp.zeros(plan.examples, statistics_dtype(model))
    state, hessian, losses, gates = settled((state, hessian, losses, gates), mesh_of(model))
    places = places_of((state, losses)), places_of(hessian)  # once: jax spells those of a result otherwise
    for index, (tokens, mask) in enumerate(progress(batches) if needs else ()):
        tokens, mask, position = shard(tokens, model), shard(mask, model), jnp.asarray(index * size, jnp.int32)
        with on_mesh_of(model):
            state, losses = observe_step(
                model, state, losses, tokens, mask, position, gates,
                needs=frozenset(state), remat=remat, places=places[0],
            )  # fmt: skip
            if hessian is not None:
                hessian = hessian_step(
                    model, hessian, tokens, mask, gates, curvature=curvature, remat=remat, places=places[1]
                )
        jax.block_until_ready((losses, hessian))  # so that progress tells the truth
    masks = np.concatenate([mask for _, mask in batches])
    if hessian is not None:
        state[Statistic.GATE_HESSIAN] = hessian
    counts = Statistics(
        examples=jnp.asarray(int(masks.any(axis=1).sum())),
        tokens=jnp.asarray(int(masks[:, 1:].sum())),
        losses=losses[: int(masks.any(axis=1).sum())],
        values={},
    )
    return counts._replace(values={need: finish(need, state.pop(need), counts) for need in sorted(needs)})


@functools.partial(jax.jit, static_argnames=("needs", "remat", "places"), donate_argnames=("state", "losses"))
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
    state = {need: add(need, state[need], new[need], position, len(tokens)) for need in sorted(needs)}
    return held((state, jax.lax.dynamic_update_slice_in_dim(losses, means, position, axis=0)), places)


def contributions(
    model: Llama,
    tokens: Int[Array, "batch seq"],
    mask: Bool[Array, "batch seq"],
    gates: Gates,
    needs: frozenset[Statistic],
    remat: Remat,
) -> tuple[dict[Statistic, Any], Float[Array, "batch"]]:
    """Return what a microbatch adds to each statistic, and the mean loss of its examples."""
    dtype = statistics_dtype(model)
    counts = jnp.maximum(predicted_tokens(mask), 1).astype(dtype)
    examples_gates = {n: jnp.broadcast_to(g.astype(dtype), (len(tokens), *g.shape)) for n, g in gates.items()}

    def summed_loss(model: Llama, gates: Gates) -> tuple[Array, tuple[Array, list]]:
        sums, observed = next_token_losses(
            model, tokens, mask, gates, observe=observer(needs, mask, model.constants.norm_eps), remat=remat
        )
        return jnp.sum(sums), (sums, observed)

    on_squares = Statistic.SQUARED_WEIGHT_GRADIENT in needs
    on_weights = on_squares or Statistic.WEIGHT_GRADIENT in needs
    on_gates = Statistic.GATE_GRADIENT in needs
    inputs = (watched(model, 1 / counts) if on_squares else model, examples_gates if on_gates else gates)
    argnums = (0,) * on_weights + (1,) * on_gates
    if argnums:
        gradients, (sums, observed) = jax.grad(summed_loss, argnums=argnums, has_aux=True)(*inputs)
    else:
        gradients, (_, (sums, observed)) = (), summed_loss(*inputs)
    by_argument: dict[int, Any] = dict(zip(argnums, gradients, strict=True))
    new = _join(observed)
    if on_weights:
        gradient, squares = parts(by_argument[0]) if on_squares else (by_argument[0], None)
        new |= {Statistic.WEIGHT_GRADIENT: gradient, Statistic.SQUARED_WEIGHT_GRADIENT: squares}
    if on_gates:
        new[Statistic.GATE_GRADIENT] = {name: by_argument[1][name] / counts[:, None, None] for name in STRUCTURES}
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
    """Return what sums activations over the real tokens of a microbatch, `{statistic: {name: sums}}` a point.

    None where no activation is needed. Nothing of it is differentiated.
    """
    of_units = needs & {Statistic.ACTIVATION_MOMENTS, Statistic.ACTIVATION_USAGE}
    if not of_units and not needs & {Statistic.BLOCK_CHANGE, Statistic.GRAM}:
        return None
    before: dict[str, Array] = {}  # inputs of a layer's sub-blocks, whose outputs come later in the same trace
    active: dict[str, Array] = {}  # likewise what enters their output matrices

    def observe(point: str, activation: Array) -> dict[Statistic, dict[str, Any]]:
        values = wide(jax.lax.stop_gradient(activation))
        weights = mask.astype(values.dtype)
        if point in STRUCTURES:
            batch, seq, units, *rest = values.shape
            active[point] = values.reshape(batch, seq, units * math.prod(rest))
            return _unit_sums(point, values.reshape(batch, seq, units, math.prod(rest)), mask, needs)
        name, _, side = point.rpartition("_")
        if side == "in":
            before[name] = values
            return {}
        sums: dict[Statistic, dict[str, Any]] = {}
        if Statistic.BLOCK_CHANGE in needs:
            turns = {name: turn(before[name], values)}
            if name == "mlp":
                turns["layer"] = turn(before["attention"], values)
            sums[Statistic.BLOCK_CHANGE] = {n: jnp.sum(weights * each)[None] for n, each in turns.items()}
        if Statistic.GRAM in needs:
            product, mean, weight = gram_sums(active[name], token_weights(values, mask, norm_eps))
            sums[Statistic.GRAM] = {name: [product, mean, weight[None]]}
        return sums

    return observe


def _unit_sums(
    structure: str,
    values: Float[Array, "batch seq units coordinates"],
    mask: Bool[Array, "batch seq"],
    needs: frozenset[Statistic],
) -> dict[Statistic, dict[str, Any]]:
    sums: dict[Statistic, dict[str, Any]] = {}
    if Statistic.ACTIVATION_MOMENTS in needs:
        weights = mask.astype(values.dtype)
        powers = (values, jnp.square(values))
        sums[Statistic.ACTIVATION_MOMENTS] = {structure: [jnp.einsum("bt,btuc->uc", weights, p) for p in powers]}
    if Statistic.ACTIVATION_USAGE in needs:
        counts = [jnp.sum(used(values, multiple) & mask[..., None], axis=(0, 1)) for multiple in MULTIPLES]
        sums[Statistic.ACTIVATION_USAGE] = {structure: jnp.stack(counts, axis=-1)}
    return sums


def _join(observed: list[dict[str, dict[Statistic, dict[str, Any]]]]) -> dict[Statistic, Any]:
    """Join what was observed at the points of the layers of each run into trees of the whole model."""
    runs = []
    for points in observed:
        run: dict[Statistic, dict[str, Any]] = {}
        for point in points.values():
            for statistic, sums in point.items():
                run.setdefault(statistic, {}).update(sums)
        runs.append(run)
    joined = join_runs(runs)
    if Statistic.ACTIVATION_MOMENTS in joined:
        pairs = joined[Statistic.ACTIVATION_MOMENTS]
        joined[Statistic.ACTIVATION_MOMENTS] = Moments(*({n: pair[i] for n, pair in pairs.items()} for i in (0, 1)))
    if Statistic.GRAM in joined:
        sums = joined[Statistic.GRAM]
        product, mean, weight = ({name: each[i] for name, each in sums.items()} for i in range(3))
        joined[Statistic.GRAM] = Gram(product, mean, {name: each[:, 0] for name, each in weight.items()})
    if Statistic.BLOCK_CHANGE in joined:
        joined[Statistic.BLOCK_CHANGE] = jax.tree.map(lambda x: x[:, 0], joined[Statistic.BLOCK_CHANGE])
    return joined
