"""Estimators on activations: how large or variable what a unit adds to the residual stream is, how often it is used,
and how much its sub-block turns the stream."""

import functools
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from saap_jax.estimation.base import (
    Estimator,
    Plan,
    Point,
    Statistic,
    Statistics,
    like_units,
    mean_over,
    only_units,
    score_writers,
    statistics_dtype,
)
from saap_jax.llama.model import Llama
from saap_jax.structures.weights import TracedWeights, Weights
from saap_jax.types import STRUCTURES, Scores

MULTIPLES: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
"""Multiples of the layer's RMS at which usage is counted, so that each of them can be scored from one pass."""


def weighted_magnitude(
    weight: Float[Array, "layers units coordinates embed"], square: Float[Array, "layers units coordinates"]
) -> Float[Array, "layers units"]:
    """Σ |W| · √(mean a²) over a unit's writing weights."""
    return jnp.einsum("lucd,luc->lu", jnp.abs(weight), jnp.sqrt(square))


def weighted_variance(
    weight: Float[Array, "layers units coordinates embed"],
    mean: Float[Array, "layers units coordinates"],
    square: Float[Array, "layers units coordinates"],
) -> Float[Array, "layers units"]:
    """Σ_c Var(a_c) · ‖W_out[c]‖² over a unit's coordinates c."""
    return jnp.sum(coordinate_variance(weight, mean, square), axis=-1)


def coordinate_variance(
    weight: Float[Array, "layers units coordinates embed"],
    mean: Float[Array, "layers units coordinates"],
    square: Float[Array, "layers units coordinates"],
) -> Float[Array, "layers units coordinates"]:
    """Var(a_c) · ‖W_out[c]‖² of each coordinate c."""
    return jnp.maximum(square - jnp.square(mean), 0) * jnp.sum(jnp.square(weight), axis=-1)


def standardized_variance(
    weight: Float[Array, "layers units coordinates embed"],
    mean: Float[Array, "layers units coordinates"],
    square: Float[Array, "layers units coordinates"],
    power: int = 1,
) -> Float[Array, "layers units"]:
    """Mean over a unit's coordinates c of (f_c - mean f) / std f, with f_c = (Var(a_c) · ‖W_out[c]‖²)^power.

    Mean and std (divisor n - 1) are those of all n coordinates of a layer.
    """
    f = coordinate_variance(weight, mean, square) ** power
    center = jnp.nanmean(f, axis=(1, 2), keepdims=True)
    spread = jnp.nanstd(f, axis=(1, 2), keepdims=True, ddof=1)
    return jnp.mean(jnp.where(spread > 0, (f - center) / spread, jnp.where(jnp.isnan(f), f, 0)), axis=-1)


def used(activation: Float[Array, "batch seq units coordinates"], multiple: float) -> Bool[Array, "batch seq units"]:
    """Say where r_u > multiple · √(mean_v r_v²), with r_u = √(mean_c a_{u,c}²) on one token.

    r_u is |a_u| for a channel, and the RMS of its coordinates for an attention unit; the right side is the RMS of the
    structure's whole activation in the layer on the same token. A token is compared with itself only, so neither the
    batch nor the rest of the text matters.
    """
    square = jnp.mean(jnp.square(activation), axis=-1)
    return square > multiple**2 * jnp.mean(square, axis=-1, keepdims=True)


class Moments(NamedTuple):
    """Mean of a and of a² of each unit's coordinates: a channel has one, an expert its channels, an attention unit
    q_per_kv · head_dim."""

    mean: dict[str, Float[Array, "layers units coordinates"]]
    square: dict[str, Float[Array, "layers units coordinates"]]


def _no_moments(model: Llama, plan: Plan) -> Moments:
    q_per_kv, head_dim = (max(segment.attention.output.shape[axis] for segment in model.segments) for axis in (2, 3))
    coordinates = {"attention": q_per_kv * head_dim, "mlp": max(each.widths.channels or 1 for each in model.segments)}
    return Moments(like_units(model, after=coordinates), like_units(model, after=coordinates))


def _powers(point: Point) -> dict[str, list[Float[Array, "units coordinates"]]]:
    """Sum a and a² over the real tokens."""
    if point.name not in STRUCTURES:
        return {}
    values = point.units(point.name)
    weights = point.mask.astype(values.dtype)
    return {point.name: [jnp.einsum("bt,btuc->uc", weights, power) for power in (values, jnp.square(values))]}


ACTIVATION_MOMENTS = Statistic(
    name="activation_moments",
    init=_no_moments,
    source="activations",
    observe=_powers,
    kind=Moments,
    accumulation=mean_over("seen"),
)
"""`Moments` of the gated activations over all tokens."""


def _counts(point: Point) -> dict[str, Int[Array, "units multiples"]]:
    """Count the real tokens on which a unit is `used`."""
    if point.name not in STRUCTURES:
        return {}
    values, mask = point.units(point.name), point.mask[..., None]
    counts = [jnp.sum(used(values, multiple) & mask, axis=(0, 1)) for multiple in MULTIPLES]
    return {point.name: jnp.stack(counts, axis=-1)}


ACTIVATION_USAGE = Statistic(
    name="activation_usage",
    init=lambda model, plan: like_units(model, after=dict.fromkeys(STRUCTURES, len(MULTIPLES))),
    source="activations",
    observe=_counts,
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


def _norms(point: Point) -> dict[str, list[Float[Array, "units 2"]]]:
    """Sum both norms of each example, and their squares, over the examples."""
    if point.name not in STRUCTURES:
        return {}
    squares = jnp.sum(jnp.square(point.units(point.name)), axis=-1)
    mask = point.mask.astype(squares.dtype)
    tokens = jnp.maximum(jnp.sum(mask, axis=1), 1)[:, None]
    means = jnp.einsum("bt,btu->bu", mask, jnp.sqrt(squares)) / tokens
    roots = jnp.sqrt(jnp.einsum("bt,btu->bu", mask, squares))
    return {point.name: [jnp.stack([norm.sum(0), jnp.square(norm).sum(0)], axis=-1) for norm in (means, roots)]}


ACTIVATION_NORMS = Statistic(
    name="activation_norms",
    init=lambda model, plan: Norms(*(like_units(model, after=dict.fromkeys(STRUCTURES, 2)) for _ in range(2))),
    source="activations",
    observe=_norms,
    kind=Norms,
    accumulation=mean_over("examples"),
)
"""`Norms` of the gated activations of each example."""


def activation_norm(*, tokens: Literal["mean", "l2"] = "l2", examples: Literal["mean", "l2"] = "mean") -> Estimator:
    """Score a unit by the norm of its activation, added up over the tokens of an example and then over the examples.

    With r_u = √(Σ_c a_{u,c}²) on one token: `tokens` takes the mean of r_u over an example or the root of the sum of
    r_u², `examples` the mean of that over the examples, or the root of the mean of its square (which orders as the L2
    norm does).

    Sources: Minitron (arXiv:2407.14679) section 2.2, `tokens="mean", examples="l2"`; 2SSP (arXiv:2501.17771), stage 1,
    `tokens="l2", examples="mean"`.
    """

    def score(statistics: Statistics, params: Weights) -> Scores:
        norms = getattr(statistics.of(ACTIVATION_NORMS), tokens)
        pick = (lambda norm: jnp.sqrt(norm[..., 1])) if examples == "l2" else (lambda norm: norm[..., 0])
        return only_units(params, {name: pick(norm) for name, norm in norms.items()})

    return Estimator(frozenset({ACTIVATION_NORMS}), score)


def wanda() -> Estimator:
    """Score a unit by Σ over its writing weights of |W| · √(mean a²).

    Source: Wanda (arXiv:2306.11695), equation 1, summed over the weights of a unit; the paper removes single weights.
    """

    def score(statistics: Statistics, params: Weights) -> Scores:
        moments: Moments = statistics.of(ACTIVATION_MOMENTS)
        return score_writers(weighted_magnitude, params, moments.square)

    return Estimator(frozenset({ACTIVATION_MOMENTS}), score)


def fluctuation(*, standardize: bool = False, attention_power: Literal[1, 2] = 2) -> Estimator:
    """Score a unit by Var(a) · ‖W_out‖², summed over its coordinates.

    With `standardize` the coordinates of each layer and structure get mean 0 and deviation 1 first, and their mean is
    the score: what FLAP ranks over all layers (allocation `global`, `rank_by="score"`). Such scores have either sign.
    Before that, FLAP's code squares the metric of attention's coordinates, which the paper does not say:
    `attention_power` 2, or 1 without. It is not read without `standardize`; of a traced model, heads are meant.

    Source: FLAP (arXiv:2312.11983), WIFV, equation 3. Deviations: the population variance over all tokens (FLAP adds up
    those of windows), and without `standardize` a head's coordinates are summed (FLAP averages them: a constant
    factor).
    """

    def score(statistics: Statistics, params: Weights) -> Scores:
        moments: Moments = statistics.of(ACTIVATION_MOMENTS)
        if not standardize:
            return score_writers(weighted_variance, params, moments.mean, moments.square)
        scores = score_writers(standardized_variance, params, moments.mean, moments.square)
        heads = {"attention"}
        if isinstance(params, TracedWeights):
            heads = {each.name for each in params.structures if each.role == "heads"}
        if attention_power > 1 and heads & scores.keys():
            squared = functools.partial(standardized_variance, power=attention_power)
            powered = score_writers(squared, params, moments.mean, moments.square)
            scores |= {name: powered[name] for name in heads & scores.keys()}
        return scores

    return Estimator(frozenset({ACTIVATION_MOMENTS}), score)


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

    def score(statistics: Statistics, params: Weights) -> Scores:
        usage = statistics.of(ACTIVATION_USAGE)
        return only_units(params, {name: share[..., column] for name, share in usage.items()})

    return Estimator(frozenset({ACTIVATION_USAGE}), score)


class Written(NamedTuple):
    """Means over tokens of the L2 norm of what a unit writes, and of whether it writes anything."""

    norm: dict[str, Float[Array, "layers units"]]
    share: dict[str, Float[Array, "layers units"]]


def _written(point: Point) -> dict[str, list[Float[Array, "units"]]]:
    """Sum the norms of what units write over the real tokens, and count the tokens for which they write."""
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


def reap() -> Estimator:
    """Score a unit by the mean of the norm of what it writes over the tokens for which it writes anything.

    Of an expert that is the mean, over the tokens that are routed to it, of its router weight times ‖f(x)‖₂: it is not
    blamed for being asked seldom. An expert that no token is routed to has 0. Source: REAP (arXiv:2510.13999), equation
    of S_j. Deviation: attention units and channels of a plain MLP, of which the paper has none, are scored alike.
    """

    def score(statistics: Statistics, params: Weights) -> Scores:
        written: Written = statistics.of(WRITTEN_NORMS)
        means = {name: written.norm[name] / jnp.where(share > 0, share, 1) for name, share in written.share.items()}
        return only_units(params, means)

    return Estimator(frozenset({WRITTEN_NORMS}), score)


# --- whole sub-blocks ------------------------------------------------------------------------------


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


def block_influence(*, granularity: str = "sub_block") -> Estimator:
    """Score every unit by 1 - mean cos(in, out) of its sub-block, or of its whole layer, whose units go as one.

    `sub_block`: the residual stream before and after attention, and before and after the MLP; `layer`: before and
    after both, one score for attention and MLP. Scores are in [0, 2]. Source: ShortGPT (arXiv:2403.03853), equation 1,
    which has `layer` only.
    """
    if granularity not in ("sub_block", "layer"):
        raise ValueError(f"block_influence: expected granularity 'sub_block' or 'layer', got {granularity!r}")

    def score(statistics: Statistics, params: Weights) -> Scores:
        change = statistics.of(BLOCK_CHANGE)
        whole = granularity == "layer"
        return only_units(params, {name: change["layer" if whole else name][:, None] for name in STRUCTURES})

    return Estimator(frozenset({BLOCK_CHANGE}), score)
