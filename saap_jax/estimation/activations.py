"""Estimators on activations: how large or variable what a unit adds to the residual stream is, how often it is used,
and how much its sub-block turns the stream."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from saap_jax.estimation.base import (
    Estimator,
    Plan,
    Point,
    Statistic,
    Statistics,
    estimator_of,
    like_units,
    mean_over,
    only_units,
    score_writers,
    statistics_dtype,
)
from saap_jax.llama.model import Llama
from saap_jax.structures.weights import Weights
from saap_jax.types import STRUCTURES, Scores

# --- what a pass observes --------------------------------------------------------------------------

UnitSums = Callable[[Float[Array, "batch seq units coordinates"], Bool[Array, "batch seq"]], Any]


def _of_units(sums: UnitSums) -> Callable[[Point], dict[str, Any]]:
    """Observe `sums(gated activations of a structure, mask)` where a sub-block's units act."""
    return lambda point: {point.name: sums(point.units(point.name), point.mask)} if point.name in STRUCTURES else {}


class Moments(NamedTuple):
    """Mean of a and of a² of each unit's coordinates: a channel has one, an expert its channels, an attention unit
    q_per_kv · head_dim."""

    mean: dict[str, Float[Array, "layers units coordinates"]]
    square: dict[str, Float[Array, "layers units coordinates"]]
    there: dict[str, Bool[Array, "layers units coordinates"]] | None = None
    """Of a masked model, which coordinates there were, if units of other structures took some with them."""


def _no_moments(model: Llama, plan: Plan) -> Moments:
    q_per_kv, head_dim = (max(segment.attention.output.shape[axis] for segment in model.segments) for axis in (2, 3))
    coordinates = {"attention": q_per_kv * head_dim, "mlp": max(each.widths.channels or 1 for each in model.segments)}
    return Moments(like_units(model, after=coordinates), like_units(model, after=coordinates))


def _powers(values: Array, mask: Array) -> list[Float[Array, "units coordinates"]]:
    weights = mask.astype(values.dtype)
    return [jnp.einsum("bt,btuc->uc", weights, power) for power in (values, jnp.square(values))]


ACTIVATION_MOMENTS = Statistic(
    name="activation_moments",
    init=_no_moments,
    source="activations",
    observe=_of_units(_powers),
    kind=Moments,
    accumulation=mean_over("seen"),
)
"""`Moments` of the gated activations over all tokens."""

MULTIPLES: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
"""Multiples of the layer's RMS at which usage is counted, so that each of them can be scored from one pass."""


def used(
    activation: Float[Array, "batch seq units coordinates"], multiple: float, gates: Float[Array, "*batch units"]
) -> Bool[Array, "batch seq units"]:
    """Say where r_u > multiple · √(mean_v r_v²), with r_u = √(mean_c a_{u,c}²) on one token, v those that are there.

    r_u is |a_u| for a channel, and the RMS of its coordinates for an attention unit; the right side is the RMS of the
    structure's whole activation in the layer on the same token. A token is compared with itself only, so neither the
    batch nor the rest of the text matters.
    """
    square = jnp.mean(jnp.square(activation), axis=-1)
    more = gates.shape[-1] / jnp.maximum(jnp.sum(gates != 0, axis=-1), 1).astype(square.dtype)
    return square > multiple**2 * (jnp.mean(square, axis=-1, keepdims=True) * more.reshape(-1, 1, 1))


def _usage(point: Point) -> dict[str, Int[Array, "units multiples"]]:
    if point.name not in STRUCTURES:
        return {}
    activation = point.units(point.name)
    gates = point.gates(point.name)
    each = (used(activation, multiple, gates) & point.mask[..., None] for multiple in MULTIPLES)
    return {point.name: jnp.stack([jnp.sum(one, axis=(0, 1)) for one in each], axis=-1)}


ACTIVATION_USAGE = Statistic(
    name="activation_usage",
    init=lambda model, plan: like_units(model, after=dict.fromkeys(STRUCTURES, len(MULTIPLES))),
    source="activations",
    observe=_usage,
    accumulation=mean_over("seen"),
)
"""Share of tokens on which a unit stands out, {structure: [layers, units, multiples]}: see `used`."""


class Norms(NamedTuple):
    """Means over examples of what the norms r_u of a unit's activation come to over the tokens of an example.

    r_u = √(Σ_c a_{u,c}²) on one token: |a_u| of a channel.
    """

    mean: dict[str, Float[Array, "layers units 2"]]
    """Of the mean of r_u over the tokens, and of its square."""
    l2: dict[str, Float[Array, "layers units 2"]]
    """Of the root of the sum of r_u², and of its square."""


def _norms(values: Array, mask: Array) -> list[Float[Array, "units 2"]]:
    squares = jnp.sum(jnp.square(values), axis=-1)
    mask = mask.astype(squares.dtype)
    tokens = jnp.maximum(jnp.sum(mask, axis=1), 1)[:, None]
    means = jnp.einsum("bt,btu->bu", mask, jnp.sqrt(squares)) / tokens
    roots = jnp.sqrt(jnp.einsum("bt,btu->bu", mask, squares))
    return [jnp.stack([norm.sum(0), jnp.square(norm).sum(0)], axis=-1) for norm in (means, roots)]


ACTIVATION_NORMS = Statistic(
    name="activation_norms",
    init=lambda model, plan: Norms(*(like_units(model, after=dict.fromkeys(STRUCTURES, 2)) for _ in range(2))),
    source="activations",
    observe=_of_units(_norms),
    kind=Norms,
    accumulation=mean_over("examples"),
)
"""`Norms` of the gated activations of each example."""


class Written(NamedTuple):
    """Means over tokens of the L2 norm of what a unit writes, and of whether it writes anything."""

    norm: dict[str, Float[Array, "layers units"]]
    share: dict[str, Float[Array, "layers units"]]


def _written(point: Point) -> dict[str, list[Float[Array, "units"]]]:
    name, _, norms = point.name.rpartition("_")
    if norms != "norms":
        return {}
    weights = point.mask.astype(point.values.dtype)
    counted = (point.values > 0).astype(point.values.dtype)
    return {name: [jnp.einsum("bt,btu->u", weights, each) for each in (point.values, counted)]}


WRITTEN_NORMS = Statistic(
    name="written_norms",
    init=lambda model, plan: Written(like_units(model), like_units(model)),
    source="activations",
    observe=_written,
    kind=Written,
    accumulation=mean_over("seen"),
)
"""`Written` of the gated activations over all tokens."""


def turn(before: Float[Array, "batch seq embed"], after: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq"]:
    """1 - cos(before, after) of each token, in [0, 2]; computed as ½ ‖before/‖before‖ - after/‖after‖‖².

    The residual stream turns by little, and 1 - cos would lose the digits that tell the blocks apart. A zero vector
    has no direction and counts as a zero unit vector.
    """

    def direction(x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
        return x / jnp.where(norm > 0, norm, 1)

    return 0.5 * jnp.sum(jnp.square(direction(before) - direction(after)), axis=-1)


def _turns(point: Point) -> dict[str, Float[Array, ""]]:
    """Sum how far a sub-block turns the stream, and behind the MLP how far the whole layer does."""
    name, _, side = point.name.rpartition("_")
    if side != "out":
        return {}
    turns = {name: turn(point.layer[f"{name}_in"], point.values)}
    if name == "mlp":
        turns["layer"] = turn(point.layer["attention_in"], point.values)
    return {key: jnp.sum(point.mask.astype(angles.dtype) * angles) for key, angles in turns.items()}


BLOCK_CHANGE = Statistic(
    name="block_change",
    init=lambda model, plan: {
        name: jnp.zeros(len(model.spec.layers), statistics_dtype(model)) for name in (*STRUCTURES, "layer")
    },
    source="activations",
    observe=_turns,
    accumulation=mean_over("seen"),
    axes=lambda path: ("layers",),
)
"""Mean over all tokens of 1 - cos(in, out) of the residual stream: {"attention", "mlp", "layer": [layers]}."""


# --- what estimators make of it --------------------------------------------------------------------


def wanda() -> Estimator:
    """Score a unit by Σ over its writing weights of |W| · √(mean a²).

    Source: Wanda (arXiv:2306.11695), equation 1, summed over the weights of a unit; the paper removes single weights.
    """

    def formula(weight: Float[Array, "layers units coordinates embed"], square: Array) -> Array:
        return jnp.einsum("lucd,luc->lu", jnp.abs(weight), jnp.sqrt(square))

    return estimator_of(ACTIVATION_MOMENTS, lambda moments, params: score_writers(formula, params, moments.square))


def fluctuation(*, standardize: bool = False, attention_power: Literal[1, 2] = 2) -> Estimator:
    """Score a unit by Var(a) · ‖W_out‖², summed over its coordinates.

    With `standardize` the coordinates of each layer and structure get mean 0 and deviation 1 first, and their mean is
    the score: what FLAP ranks over all layers (`global(by=score)`). Such scores have either sign.
    Before that, FLAP's code squares the metric of attention's coordinates, which the paper does not say:
    `attention_power` 2, or 1 without. It is not read without `standardize`; of a traced model, heads are meant.

    Source: FLAP (arXiv:2312.11983), WIFV, equation 3. Deviations: the population variance over all tokens (FLAP adds up
    those of windows), and without `standardize` a head's coordinates are summed (FLAP averages them: a constant
    factor).
    """

    def metric(weight: Float[Array, "layers units coordinates embed"], mean: Array, square: Array) -> Array:
        """Var(a_c) · ‖W_out[c]‖² of each coordinate c, `[layers, units, coordinates]`."""
        return jnp.maximum(square - jnp.square(mean), 0) * jnp.sum(jnp.square(weight), axis=-1)

    def standardized(power: int) -> Callable[..., Float[Array, "layers units"]]:
        """Mean over a unit's coordinates of (f_c - mean f) / std f, f the metric to a power, over a layer's n of them,
        with the divisor n - 1."""

        def formula(weight: Array, mean: Array, square: Array, *there: Array) -> Array:
            f = metric(weight, mean, square) ** power
            center = jnp.nanmean(f, axis=(1, 2), keepdims=True)
            spread = jnp.nanstd(f, axis=(1, 2), keepdims=True, ddof=1)
            standard = jnp.where(spread > 0, (f - center) / spread, jnp.where(jnp.isnan(f), f, 0))
            if not there:
                return jnp.mean(standard, axis=-1)
            left = jnp.maximum(jnp.sum(there[0], axis=-1), 1)  # a unit without any has 0
            return jnp.sum(jnp.where(there[0], standard, 0), axis=-1) / left.astype(f.dtype)

        return formula

    def score(statistics: Statistics, params: Weights) -> Scores:
        moments = statistics.of(ACTIVATION_MOMENTS)
        exist = statistics.there(params)
        if not standardize:
            return score_writers(lambda *given: jnp.sum(metric(*given), axis=-1), params, moments.mean, moments.square)
        there = {name: jnp.asarray(units)[..., None] for name, units in exist.items()}
        if moments.there is not None:
            there = {name: units & moments.there[name] for name, units in there.items()}
        given = [
            {name: jnp.where(units, each[name], jnp.nan) for name, units in there.items()}
            for each in (moments.mean, moments.square)
        ]
        given += [] if moments.there is None else [there]
        scores = score_writers(standardized(1), params, *given)
        heads = params.heads & scores.keys()
        if attention_power > 1 and heads:
            powered = score_writers(standardized(attention_power), params, *given)
            scores |= {name: powered[name] for name in heads}
        if moments.there is None:
            return scores
        return {name: jnp.where(units, scores[name], jnp.nan) for name, units in exist.items()}

    return Estimator(frozenset({ACTIVATION_MOMENTS}), score)


def activation_norm(*, tokens: Literal["mean", "l2"] = "l2", examples: Literal["mean", "l2"] = "mean") -> Estimator:
    """Score a unit by the norm of its activation, added up over the tokens of an example and then over the examples.

    With r_u = √(Σ_c a_{u,c}²) on one token: `tokens` takes the mean of r_u over an example or the root of the sum of
    r_u², `examples` the mean of that over the examples, or the root of the mean of its square (which orders as the L2
    norm does).

    Sources: Minitron (arXiv:2407.14679) section 2.2, `tokens="mean", examples="l2"`; 2SSP (arXiv:2501.17771), stage 1,
    `tokens="l2", examples="mean"`.
    """

    def pick(norm: Float[Array, "layers units 2"]) -> Array:
        if examples == "l2":
            return jnp.sqrt(norm[..., 1])
        return norm[..., 0]

    return estimator_of(ACTIVATION_NORMS, lambda norms, params: only_units(params, getattr(norms, tokens), pick))


def activation_frequency(*, multiple: int | float = 1.0) -> Estimator:
    """Score a unit by the share of tokens on which it is `used`: how often, not how much. In [0, 1].

    `multiple` is one of `MULTIPLES`: the statistic is counted at these only. No unit of a layer with n of them exceeds
    √n times the RMS, so a multiple of 2 or more says nothing about layers with few attention units.

    Raises:
        ValueError: another multiple.
    """
    if multiple not in MULTIPLES:
        expected = ", ".join(f"{m:g}" for m in MULTIPLES)
        raise ValueError(f"activation_frequency: expected multiple to be one of {expected}, got {multiple}")
    column = MULTIPLES.index(multiple)
    return estimator_of(ACTIVATION_USAGE, lambda usage, params: only_units(params, usage, lambda x: x[..., column]))


def reap() -> Estimator:
    """Score a unit by the mean of the norm of what it writes over the tokens for which it writes anything.

    Of an expert that is the mean, over the tokens that are routed to it, of its router weight times ‖f(x)‖₂: it is not
    blamed for being asked seldom. An expert that no token is routed to has 0. Source: REAP (arXiv:2510.13999), equation
    of S_j. Deviation: attention units and channels of a plain MLP, of which the paper has none, are scored alike.
    """

    def score(written: Written, params: Weights) -> Scores:
        means = {name: written.norm[name] / jnp.where(share > 0, share, 1) for name, share in written.share.items()}
        return only_units(params, means)

    return estimator_of(WRITTEN_NORMS, score)


def block_influence(*, granularity: Literal["sub_block", "layer"] = "sub_block") -> Estimator:
    """Score every unit by 1 - mean cos(in, out) of its sub-block, or of its whole layer, whose units go as one.

    `sub_block`: the residual stream before and after attention, and before and after the MLP; `layer`: before and
    after both, one score for attention and MLP. Scores are in [0, 2]. Source: ShortGPT (arXiv:2403.03853), equation 1,
    which has `layer` only.
    """
    whole = granularity == "layer"
    return estimator_of(
        BLOCK_CHANGE,
        lambda change, params: only_units(
            params, {name: change["layer" if whole else name][:, None] for name in STRUCTURES}
        ),
    )
