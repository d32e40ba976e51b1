"""Estimators by what least squares cannot put back: how much of a sub-block's output goes with a unit once the rest of
its output matrix has been chosen anew.

A sub-block writes a W with a its gated activations (row vectors) and W its output matrix. With H = mean aᵀa + λ I over
the tokens, removing the coordinates S and fitting the others again costs ½ tr(W_Sᵀ [(H⁻¹)_SS]⁻¹ W_S), the least that
½ ‖a W - a W'‖² (with the ridge) can be for a W' that is 0 in the rows S; it is reached by
W ← W - (H⁻¹)_:S [(H⁻¹)_SS]⁻¹ W_S. Source: the optimal brain surgeon for structures, ZipLM (arXiv:2302.04089) equations
2 to 4, SlimGPT (arXiv:2412.18110), OSSCAR (arXiv:2403.12983), which then swaps units while the cost falls (`swapped`).
"""

import math
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve
from jaxtyping import Array, Bool, Float

from saap_jax.checks import Positive, check_positive
from saap_jax.estimation.base import (
    Estimator,
    Plan,
    Point,
    Statistic,
    Statistics,
    mean_over,
    statistics_dtype,
    wide,
)
from saap_jax.llama.model import Llama
from saap_jax.llama.segments import join_segments
from saap_jax.structures.weights import Weights
from saap_jax.types import STRUCTURES, Scores

Damping = Annotated[float, check_positive]

FEWEST_SWAPS = 16
"""Of `swapped`, that are allowed however few units there are."""


def gram_sums(
    active: Float[Array, "batch seq coordinates"], weights: Float[Array, "batch seq"]
) -> tuple[Float[Array, "coordinates coordinates"], Float[Array, "coordinates"], Float[Array, ""]]:
    """Sum w a aᵀ, w a and w over the tokens of a microbatch, each with a weight w."""
    rows = active.reshape(math.prod(active.shape[:2]), active.shape[2])
    weighted = rows * weights.reshape(-1, 1)
    return weighted.T @ rows, jnp.sum(weighted, axis=0), jnp.sum(weights)


def token_weights(
    behind: Float[Array, "batch seq embed"], mask: Bool[Array, "batch seq"], norm_eps: float
) -> Float[Array, "batch seq"]:
    """Weigh each token by w = 1/(mean x² + ε), 0 of padding: whatever reads the stream divides it by its RMS."""
    return mask.astype(behind.dtype) / (jnp.mean(jnp.square(behind), axis=-1) + norm_eps)


def _zeros(model: Llama, plan: Plan) -> dict[str, Array]:
    layers = sum(segment.length for segment in model.segments)
    dtype = statistics_dtype(model)
    widest = {
        "attention": max(math.prod(segment.attention.output.shape[1:4]) for segment in model.segments),
        "mlp": max(segment.widths.mlp_channels for segment in model.segments),
    }
    return {name: jnp.zeros((layers, width, width), dtype) for name, width in widest.items()}


def _products(point: Point) -> dict[str, Float[Array, "coordinates coordinates"]]:
    """Sum aᵀa over the real tokens, each alike; the coordinates of a unit in a row."""
    if point.name not in STRUCTURES:
        return {}
    units = point.units(point.name)
    active = units.reshape(*units.shape[:2], math.prod(units.shape[2:]))
    return {point.name: gram_sums(active, point.mask.astype(active.dtype))[0]}


SECOND_MOMENT = Statistic(
    name="second_moment",
    init=_zeros,
    source="activations",
    observe=_products,
    accumulation=mean_over("seen"),
    axes=lambda path: ("layers",),
)
"""Mean of aᵀa over all tokens, {structure: [layers, coordinates, coordinates]}; coordinates of a unit in a row."""


def obs(*, greedy: bool = True, block: Positive = 16, damping: Damping = 0.01) -> Estimator:
    """Score a unit by ½ tr(W_Sᵀ [(H⁻¹)_SS]⁻¹ W_S), with H = mean aᵀa + λ I and λ = `damping` · mean of the diagonal.

    `greedy` takes units out one after another, the cheapest first: after each `block` of coordinates (one unit at
    least) the output matrix is fitted again and H⁻¹ downdated, so that what stands in for what has gone gets dearer.
    The score is then the unit's part of what its block costs when it goes; scores keep the order in which units go, and
    those of a sub-block add up to the cost of removing all of it.

    Sources: ZipLM, SlimGPT and OSSCAR, see above. Deviation: H is that of the unpruned model in every layer, where
    these prune layer by layer and look at each through the ones that were pruned before it.
    """

    def formula(weight: Array, moment: Array, ridge: Array, gone: Array) -> Float[Array, "units"]:
        if greedy:
            return greedy_costs(weight, moment, ridge, gone, block)
        return single_costs(weight, moment, ridge)

    return _by_layer(formula, damping)


def leverage(*, damping: Damping = 0.01) -> Estimator:
    """Score a unit by Σ_c [G (G + λ I)⁻¹]_cc over its coordinates, with G = mean aᵀa, λ = `damping` · mean diagonal.

    The ridge leverage of a coordinate says how badly the others stand in for it, whatever reads it.

    Source: MoDeGPT (arXiv:2408.09632), algorithm 1, for the MLP. Deviation: λ is relative to the diagonal.
    """
    return _by_layer(lambda weight, moment, ridge, _: leverages(weight, moment, ridge), damping)


def _by_layer(formula: Callable[..., Array], damping: float) -> Estimator:
    """Score each sub-block of each layer by `formula(weight [units, coordinates, embed], G, λ, gone) -> [units]`.

    Units that have gone count for no part of λ. A traced model, whose second moments are not observed, is refused.
    """

    def of_layer(layer: tuple[Array, Array, Array]) -> Array:
        matrix, product, gone = layer
        left = jnp.maximum(jnp.sum(~gone), 1).astype(product.dtype)
        with jax.default_matmul_precision("highest"):
            ridge = damping * jnp.mean(jnp.diag(product)) * (len(gone) / left)
            scores = formula(matrix.astype(product.dtype), product, ridge, gone)
        return jnp.where(ridge == 0, 0, scores)  # nobody misses what is never active

    def score(statistics: Statistics, params: Weights) -> Scores:
        if params.model is None:
            raise ValueError("estimator: expected a model of ours, whose second moments are observed, got a traced one")
        moments = statistics.of(SECOND_MOMENT)
        there = statistics.there(params)
        scores = {}
        for name in params.units:
            pieces = []
            for place, matrix in params.writing(name):
                weight = wide(matrix)
                layers, units, coordinates, _ = weight.shape
                count = units * coordinates
                own = moments[name][place, :count, :count]
                gone = ~jnp.asarray(there[name])[place, :units]
                zeros = jnp.zeros((layers, 0), own.dtype)
                pieces.append(jax.lax.map(of_layer, (weight, own, gone)) if count else zeros)
            scores[name] = join_segments(pieces, fill=jnp.nan)
        return scores

    return Estimator(frozenset({SECOND_MOMENT}), score)


def leverages(
    weight: Float[Array, "units coordinates embed"], moment: Float[Array, "all all"], ridge: Float[Array, ""]
) -> Float[Array, "units"]:
    """Σ_c [G (G + λ I)⁻¹]_cc = Σ_c (1 - λ [(G + λ I)⁻¹]_cc), of which rounding may leave less than 0 of what is 0."""
    each = jnp.maximum(1 - ridge * jnp.diag(_inverse(moment, ridge)), 0)
    return jnp.sum(each.reshape(weight.shape[:2]), axis=1)


def single_costs(
    weight: Float[Array, "units coordinates embed"], moment: Float[Array, "all all"], ridge: Float[Array, ""]
) -> Float[Array, "units"]:
    """½ tr(W_Sᵀ [(H⁻¹)_SS]⁻¹ W_S) of each unit by itself."""
    return _costs(weight, _inverse(moment, ridge), jnp.zeros(len(weight), bool))


def greedy_costs(
    weight: Float[Array, "units coordinates embed"],
    moment: Float[Array, "all all"],
    ridge: Float[Array, ""],
    gone: Bool[Array, "units"] | None = None,
    block: int = 1,
) -> Float[Array, "units"]:
    """Share out what removing units costs, those of the lowest costs first, `block` coordinates at a time.

    Units that have `gone` before, of which `moment` knows nothing, have no part in it.

    Units that go at once share what they cost together, as what each would cost alone is to the others. Neighbours that
    would descend have their mean, so that scores keep the order, and add up to the cost of removing all.
    """
    units, coordinates, embed = weight.shape
    at_once = min(max(block // coordinates, 1), units)

    def remove(state: tuple[Array, Array, Array], _: None) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
        matrix, inverse, gone = state
        costs = jnp.where(gone, jnp.inf, _costs(matrix, inverse, gone))
        chosen = jnp.argsort(costs)[:at_once]
        new = ~gone[chosen]
        rows = (chosen[:, None] * coordinates + jnp.arange(coordinates)[None]).reshape(-1)
        real = jnp.repeat(new, coordinates)
        inner = jnp.where(real[:, None] & real[None], inverse[rows][:, rows], jnp.eye(len(rows), dtype=inverse.dtype))
        outer = inverse[:, rows]
        flat = matrix.reshape(-1, embed)
        both = jnp.linalg.solve(inner, jnp.concatenate([flat[rows], outer.T], axis=1))
        alone = jnp.where(new, costs[chosen], 0)
        together = 0.5 * jnp.sum(flat[rows] * both[:, :embed])
        shared = together * alone / jnp.maximum(jnp.sum(alone), jnp.finfo(alone.dtype).tiny)
        flat = flat - outer @ both[:, :embed]
        inverse = inverse - outer @ both[:, embed:]
        inverse = inverse.at[rows].set(0).at[:, rows].set(0)
        matrix = flat.at[rows].set(0).reshape(weight.shape)
        return (matrix, inverse, gone.at[chosen].set(True)), (chosen, jnp.where(new, shared, jnp.inf), new)

    gone = jnp.zeros(units, bool) if gone is None else gone
    rows = jnp.repeat(gone, coordinates)
    inverse = jnp.where(rows[:, None] | rows[None], 0, _inverse(moment, ridge))
    start = (jnp.where(gone[:, None, None], 0, weight), inverse, gone)
    _, made = jax.lax.scan(remove, start, length=-(-units // at_once))
    order, shared, new = (each.reshape(-1)[:units] for each in made)  # what was gone comes last
    hair = 1 + jnp.finfo(weight.dtype).eps * jnp.arange(units, dtype=weight.dtype)
    costs = jnp.zeros(units, weight.dtype)
    return costs.at[jnp.where(new, order, units)].set(_ascending(shared) * hair, mode="drop")


def _ascending(values: Float[Array, "values"]) -> Float[Array, "values"]:
    """Give neighbours that descend their mean: max over i ≤ k of min over j ≥ k of the mean from i to j (isotonic
    regression)."""
    ends = jnp.arange(1, len(values) + 1)
    total = jnp.concatenate([jnp.zeros(1, values.dtype), jnp.cumsum(values)])
    count = (ends[None] - ends[:, None] + 1).astype(values.dtype)
    mean = jnp.where(count > 0, (total[None, 1:] - total[:-1, None]) / count, jnp.inf)  # from i to j
    return jnp.diag(jax.lax.cummax(jax.lax.cummin(mean, axis=1, reverse=True), axis=0))


def swapped(
    weight: Float[Array, "units coordinates embed"],
    moment: Float[Array, "all all"],
    ridge: Float[Array, ""],
    kept: Bool[Array, "units"],
) -> Bool[Array, "units"]:
    """Choose as many units as are kept, by swaps while ½ tr((W - W')ᵀ H (W - W')) falls, W' fitted to those kept.

    A swap takes out the unit whose going costs least, and then puts in the one that wins most of those that were out;
    the last one, which wins no more than it costs, is not made. There are an eighth as many swaps as units at most (16
    where units are few).

    With S the kept coordinates and C the others, all costs and gains are read from H and H W *swept* over S:

        M = [[-V, V H_SC], [H_CS V, H_CC - H_CS V H_SC]],   B = [[V (H W)_S], [(H W)_C - H_CS V (H W)_S]],   V = H_SS⁻¹

    where both are ½ tr(B_uᵀ (± M_uu)⁻¹ B_u), with - for a unit of S. Putting one in or taking it out sweeps it alone.
    """
    units, coordinates, embed = weight.shape
    size = len(moment)
    each = jnp.arange(units)
    # the scale of a layer that is never active does not matter, but that its system can be solved
    system = moment + jnp.where(ridge > 0, ridge, 1) * jnp.eye(size, dtype=moment.dtype)
    rows = jnp.repeat(kept, coordinates)
    square = rows[:, None] & rows[None]
    both = jnp.concatenate([system, system @ weight.reshape(-1, embed)], axis=1)
    inner = cho_factor(jnp.where(square, system, jnp.eye(size, dtype=system.dtype)))
    solved = cho_solve(inner, jnp.where(rows[:, None], both, 0))  # V H and V H W in the rows of S
    start = jnp.where(rows[:, None], solved, both - jnp.where(rows[None], system, 0) @ solved)
    inverse = cho_solve(inner, jnp.diag(rows.astype(system.dtype)))
    left = jnp.where(square, -inverse, jnp.where(rows[None], solved[:, :size].T, start[:, :size]))
    start = start.at[:, :size].set(left)

    def prices(swept: Array, kept: Array) -> Array:
        pivots = swept[:, :size].reshape(units, coordinates, units, coordinates)[each, :, each, :]
        pivots = jnp.where(kept[:, None, None], -pivots, pivots)
        parts = swept[:, size:].reshape(units, coordinates, embed)
        return 0.5 * jnp.sum(parts * jnp.linalg.solve(pivots, parts), axis=(1, 2))

    def sweep(swept: Array, unit: Array, sign: int) -> Array:
        at = unit * coordinates + jnp.arange(coordinates)
        pivot = swept[at][:, at]
        rows = jnp.linalg.solve(pivot, swept[at])
        new = (swept - swept[:, at] @ rows).at[at].set(sign * rows).at[:, at].set(sign * rows[:, :size].T)
        return new.at[at[:, None], at].set(-jnp.linalg.solve(pivot, jnp.eye(coordinates, dtype=swept.dtype)))

    def swap(state: tuple[Array, ...]) -> tuple[Array, ...]:
        swept, kept, _, count = state
        costs = jnp.where(kept, prices(swept, kept), jnp.inf)
        out = jnp.argmin(costs)
        without = sweep(swept, out, -1)
        left = kept.at[out].set(False)
        gains = jnp.where(kept, -jnp.inf, prices(without, left))
        into = jnp.argmax(gains)
        better = gains[into] > costs[out] * (1 + 1e-4)  # no further than numbers of 32 bits tell apart
        swept = jax.lax.cond(better, lambda: sweep(without, into, 1), lambda: swept)
        return swept, jnp.where(better, left.at[into].set(True), kept), better, count + 1

    state = (start, kept, jnp.any(kept) & ~jnp.all(kept), jnp.zeros((), jnp.int32))
    most = max(FEWEST_SWAPS, units // 8)
    return jax.lax.while_loop(lambda state: state[2] & (state[3] < most), swap, state)[1]


def _inverse(moment: Float[Array, "all all"], ridge: Float[Array, ""]) -> Float[Array, "all all"]:
    """Compute (G + λ I)⁻¹; a layer that is never active has the identity."""
    eye = jnp.eye(len(moment), dtype=moment.dtype)
    return cho_solve(cho_factor(moment + jnp.where(ridge > 0, ridge, 1) * eye), eye)


def _costs(
    weight: Float[Array, "units coordinates embed"], inverse: Float[Array, "all all"], gone: Bool[Array, "units"]
) -> Float[Array, "units"]:
    """½ tr(W_Sᵀ [(H⁻¹)_SS]⁻¹ W_S) of each unit that is still there."""
    units, coordinates, _ = weight.shape
    each = jnp.arange(units)
    inner = inverse.reshape(units, coordinates, units, coordinates)[each, :, each, :]
    inner = jnp.where(gone[:, None, None], jnp.eye(coordinates, dtype=inverse.dtype)[None], inner)
    return 0.5 * jnp.sum(weight * jnp.linalg.solve(inner, weight), axis=(1, 2))
