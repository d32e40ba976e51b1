"""Estimators on weights: random, by magnitude, and by Taylor expansions of the loss of first and second order.

Removing a unit's weights w changes the loss by ∂wᵀw - ½ wᵀHw up to sign and O(‖w‖³). First order (LLM-Pruner,
arXiv:2305.11627, equations 3 to 5) takes ∂wᵀw alone; second order (its equation 5, element-wise) replaces H by the
diagonal of the empirical Fisher information, F_k = (1/N) Σ_n (∂_n w_k)² with ∂_n the gradient of example n's mean loss.
Deviations: ∂w is the gradient of the mean loss over all tokens, which LLM-Pruner takes over one batch of equally long
examples (the same, then); units are scored from all calibration examples, LLM-Pruner from 10.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from saap_jax.checks import Seed
from saap_jax.estimation.base import (
    Estimator,
    Reduction,
    Statistic,
    Statistics,
    like_matrices,
    matrices_of,
    mean_over,
    only_units,
    score_matrices,
    wide,
)
from saap_jax.estimation.squares import SQUARED_WEIGHT_GRADIENT
from saap_jax.llama.model import Llama
from saap_jax.llama.segments import join_segments
from saap_jax.structures.discovery import discover, parameters_by_path, unit_view
from saap_jax.structures.weights import Weights
from saap_jax.types import Objective, Scores

WEIGHT_GRADIENT = Statistic(
    name="weight_gradient",
    init=like_matrices,
    source="weights",
    contribute=matrices_of,
    accumulation=mean_over("tokens"),
    axes=lambda path: (),
)
"""Gradient of the mean loss over all tokens: a tree like the model's, of the matrices of its layers; each other
parameter has a single 0. A statistic of your own whose source is `weights` is shown the gradient of all parameters."""


def random(*, seed: Seed = 0) -> Estimator:
    """Score each unit uniformly in [0, 1), independent of model and data: the floor of every comparison."""

    def score(statistics: Statistics, params: Weights) -> Scores:
        root = jax.random.key(seed)
        draws = {
            name: jax.random.uniform(jax.random.fold_in(root, index), exists.shape)
            for index, (name, exists) in enumerate(params.units.items())
        }
        return only_units(params, draws)

    return Estimator(frozenset(), score)


def magnitude(*, reduction: Reduction = "sum") -> Estimator:
    """Score a unit by ‖w‖₂ = √(reduction over its matrices M of ‖w_M‖²).

    Source: LLM-Pruner (arXiv:2305.11627), `l2`, which leaves out the root; the ranking is the same.
    """

    def score(statistics: Statistics, params: Weights) -> Scores:
        squares = score_matrices(lambda w: jnp.sum(jnp.square(w), axis=-1), params, reduction=reduction)
        return {name: jnp.sqrt(square) for name, square in squares.items()}

    return Estimator(frozenset(), score)


def taylor_vector(
    *,
    reduction: Reduction = "sum",
    within: Literal["matrix", "channel"] = "matrix",
    objective: Objective = "loss",
) -> Estimator:
    """Score a unit by the reduction over its matrices M of |Σ_{k∈M} w_k ∂w_k|, equation 3.

    `within="channel"` takes the absolute value of each channel of the unit's part of a matrix (a row of query, key or
    value, a column of output, each over the residual stream) and adds these up, which is LLM-Pruner's code,
    `vectorize`. An MLP channel is one channel in each matrix, so only attention differs. ∂w is the gradient of the mean
    loss, or of another objective (`estimation.objectives`).
    """
    channels = within == "channel"  # [layers, units, channels, embed], else [layers, units, rest]

    def formula(w: Array, d: Array) -> Float[Array, "layers units"]:
        sums = jnp.abs(jnp.sum(w * d, axis=-1))
        if channels:
            return jnp.sum(sums, axis=-1)
        return sums

    return _on_weights(formula, reduction, objective, WEIGHT_GRADIENT, channels=channels)


def taylor_element(
    *,
    reduction: Reduction = "sum",
    within: Literal["unit", "layer", "block"] = "unit",
    objective: Objective = "loss",
) -> Estimator:
    """Score a unit by the reduction over its matrices M of Σ_{k∈M} |w_k ∂w_k|.

    `within="layer"` gives all units of a layer the sum over all of them, attention and MLP together: whole layers, as
    Shortened LLaMA's Taylor criterion ranks them (arXiv:2402.02834). `within="block"` divides the sum by sizes of the
    sub-block as GISP's code does (arXiv:2510.18030), so that heads and channels are ranked together: a channel by its
    matrices times the channels of the layer, a head by four times its coordinates times the width of the stream. Key
    and value count where no other query head reads them. ∂w is as in `taylor_vector`.
    """
    each = _on_weights(lambda w, d: jnp.sum(jnp.abs(w * d), axis=-1), reduction, objective, WEIGHT_GRADIENT)
    if within == "unit":
        return each
    if within == "block" and reduction != "sum":
        raise ValueError(f"taylor_element: expected reduction 'sum' beside within 'block', got {reduction!r}")

    def score(statistics: Statistics, params: Weights) -> Scores:
        if params.model is None:
            raise ValueError(
                f"taylor_element: expected within 'unit' for a traced model, which has no layers, got {within!r}"
            )
        if within == "block":
            return _of_blocks(params.model, statistics.of(WEIGHT_GRADIENT.of_objective(objective)))
        scores = each.score(statistics, params)
        total = jnp.sum(jnp.stack([jnp.nansum(one, axis=1) for one in scores.values()]), axis=0)
        return {name: jnp.where(jnp.isnan(one), jnp.nan, total[:, None]) for name, one in scores.items()}

    return each._replace(score=score)


def _of_blocks(model: Llama, gradient: Llama) -> Scores:
    """Divide Σ |w ∂w| of each unit by the size that GISP's code gives its sub-block."""
    scores: Scores = {}
    for name, structure in discover(model).items():
        pieces = []
        for weights, slopes in zip(model.segments, gradient.segments, strict=True):
            sums = {}
            sizes = {}
            for member in structure.members:
                if "embed" not in parameters_by_path(weights)[member.path].axes:
                    continue  # biases do not count there
                product = wide(unit_view(weights, member)) * wide(unit_view(slopes, member))
                sums[member.path] = jnp.sum(jnp.abs(product), axis=-1)
                sizes[member.path] = product.shape[-1]
            if name == "attention":
                # a matrix of fewer weights than query is shared by query heads: key and value
                own = [path for path in sums if sizes[path] == max(sizes.values())]
                divisor = 4 * max(sizes.values())
            else:
                own = [*sums]
                divisor = len(sums) * max(next(iter(sums.values())).shape[1], 1)
            pieces.append(sum(sums[path] for path in own) / divisor)
        scores[name] = join_segments(pieces, fill=jnp.nan)
    return scores


def taylor_element_second(*, reduction: Reduction = "sum", objective: Objective = "loss") -> Estimator:
    """Score a unit by the reduction over its matrices M of Σ_{k∈M} |w_k ∂w_k - ½ w_k² F_k|.

    Source: LLM-Pruner, `param_mix`. Gradients are of the loss, or of another objective (`estimation.objectives`).
    """

    def formula(w: Array, d: Array, fisher: Array) -> Float[Array, "layers units"]:
        return jnp.sum(jnp.abs(w * d - 0.5 * jnp.square(w) * fisher), axis=-1)

    return _on_weights(formula, reduction, objective, WEIGHT_GRADIENT, SQUARED_WEIGHT_GRADIENT)


def fisher(*, reduction: Reduction = "sum", objective: Objective = "loss") -> Estimator:
    """Score a unit by the reduction over its matrices M of Σ_{k∈M} w_k² F_k.

    Source: LLM-Pruner, `param_second`. With `objective="sampled"` F is the Fisher information itself, estimated by one
    draw a token (`estimation.objectives`).
    """
    return _on_weights(
        lambda w, fisher: jnp.sum(jnp.square(w) * fisher, axis=-1), reduction, objective, SQUARED_WEIGHT_GRADIENT
    )


def _on_weights(
    formula: Callable[..., Array],
    reduction: Reduction,
    objective: Objective,
    *of_loss: Statistic,
    channels: bool = False,
) -> Estimator:
    needs = [each.of_objective(objective) for each in of_loss]

    def score(statistics: Statistics, params: Weights) -> Scores:
        trees = map(statistics.of, needs)
        return score_matrices(formula, params, *trees, reduction=reduction, channels=channels)

    return Estimator(frozenset(needs), score)
