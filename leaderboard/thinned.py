"""The size of a gate's gradient in a model whose gates are half closed, and what the channels that go write together.

Levels, powers and the chain were chosen in races on `builtin:descriptions`, calibrated on `builtin:reference`. The log
is thinned.md beside this file.
"""

import functools

import jax
import jax.numpy as jnp

from saap_jax.estimation.activations import ACTIVATION_MOMENTS
from saap_jax.estimation.base import (
    Estimator,
    Statistic,
    like_units,
    mean_over,
    only_units,
    score_writers,
)
from saap_jax.estimation.gates import GATE_GRADIENT
from saap_jax.estimation.reconstruction import SECOND_MOMENT
from saap_jax.llama.loss import next_token_losses, predicted_tokens

ENDS = (4, 2)
"""First and last layers whose gates stay open: those that `within(protect=(0.13, -0.07))` protects."""


def open_layers(layers):
    """1 for a layer whose gates stay open, [layers, 1]."""
    place = jnp.arange(layers)
    return ((place < ENDS[0]) | (place >= layers - ENDS[1])).astype(jnp.float32)[:, None]


def ranks(scores):
    """Place of each unit among those of its sub-block, (0, 1): the lowest first."""
    order = jnp.argsort(jnp.argsort(scores, axis=-1), axis=-1)
    return (order + 0.5) / scores.shape[-1]


@functools.cache
def gradients_at(levels, random, ranked):
    """Make the statistic: over gates at each level, mean over examples of -∂ℒ_n/∂g, |∂ℒ_n/∂g| and its square.

    A level is what all gates of the middle layers are scaled to, or, if `random`, the share of them that stays open,
    drawn for each example. Then, `ranked` times, gates are opened by the rank of the mean size, and the gradient is
    that there. {structure: [3, layers, units]}, mean over levels.
    """

    def step(model, total, batch, gates, *, curvature, remat, places=()):
        tokens, mask = batch
        counts = jnp.maximum(predicted_tokens(mask), 1)
        key = jax.random.fold_in(jax.random.key(0), jnp.sum(tokens))

        def loss(gates):
            sums = next_token_losses(model, tokens, mask, gates, remat=remat, once=True)[0]
            return jnp.sum(jnp.where(predicted_tokens(mask) > 0, sums / counts, 0))

        def one(place):
            level, key_ = jnp.asarray(levels)[place], jax.random.fold_in(key, place)
            at = {}
            for index, (name, gate) in enumerate(gates.items()):
                shape = (len(tokens), *gate.shape)
                drawn = jax.random.uniform(jax.random.fold_in(key_, index), shape)
                thin = jnp.where(drawn < level, 1.0, 0.0) if random else jnp.full(shape, level)
                at[name] = gate * jnp.maximum(thin, open_layers(len(gate)))
            return moments(at)

        def moments(at):
            found = jax.grad(loss)(at)
            return {name: jnp.stack([-each.sum(0), jnp.abs(each).sum(0), jnp.square(each).sum(0)])
                    for name, each in found.items()}  # fmt: skip

        def again(sums, _):
            at = {name: jnp.maximum(ranks(each[1]), open_layers(each.shape[1])) for name, each in sums.items()}
            return moments(
                {name: jnp.broadcast_to(each, (len(tokens), *each.shape)) for name, each in at.items()}
            ), None

        sums = jax.lax.map(one, jnp.arange(len(levels)))
        sums = {name: jnp.mean(each, axis=0) for name, each in sums.items()}
        if ranked:
            sums, _ = jax.lax.scan(again, sums, length=ranked)
        return {name: total[name] + each for name, each in sums.items()}

    return Statistic(
        name=f"gradients_at_{'_'.join(str(round(100 * each)) for each in levels)}{'_random' * random}_ranked{ranked}",
        init=lambda model, plan: like_units(model, (3,)),
        source="step",
        step=jax.jit(step, static_argnames=("curvature", "remat", "places")),
        accumulation=mean_over("examples"),
        axes=lambda path: ("moments", "layers", "units"),
    )


def order_together(weight, product, size, block=16):
    """Place of each channel when the cheapest goes first, by what the squared sum of all that went then grows by.

    With Q_uv = s_u s_v mean(a_u a_v) W_u·W_v, a channel costs Q_uu + 2 Σ_gone Q_uv.
    """
    price = product * (weight @ weight.T) * size[:, None] * size[None]
    price = price / jnp.mean(jnp.diag(price))

    def remove(state, step):
        gone, scores = state
        costs = jnp.where(gone > 0, jnp.inf, jnp.diag(price) + 2 * price @ gone)
        chosen = jnp.argsort(costs)[:block]
        return (gone.at[chosen].set(1.0), scores.at[chosen].set(step * block + jnp.arange(block))), None

    count = len(weight)
    start = jnp.zeros(count), jnp.full(count, float(count))
    (_, scores), _ = jax.lax.scan(remove, start, jnp.arange(count // block, dtype=jnp.float32))
    return scores


def thinned(
    *,
    levels: tuple = (0.5,),
    random: bool = False,
    ranked: int = 0,
    moment: int = 1,
    heads: str = "thinned",
    energy: float = 0.0,
    together: bool = False,
) -> Estimator:
    """Score a unit by a moment of its gate's gradient: 0 -mean, 1 mean size, 2 mean square; or heads by open gates.

    With `energy`, that of channels is times the mean energy that a channel writes to this power. With `together`,
    channels go in the order of `order_together`.
    """
    need = gradients_at(tuple(levels), random, ranked)

    def score(seen, params):
        scores = only_units(params, seen.of(need), lambda value: value[moment])
        if heads == "fisher":
            scores["attention"] = jnp.mean(jnp.square(seen.of(GATE_GRADIENT)["attention"]), axis=0)
        if heads == "signed":
            scores["attention"] = only_units(params, seen.of(need), lambda value: value[0])["attention"]
        if energy:
            square = seen.of(ACTIVATION_MOMENTS).square
            written = score_writers(lambda w, s: jnp.einsum("lucd,luc->lu", jnp.square(w), s), params, square)
            scores["mlp"] = scores["mlp"] * written["mlp"] ** energy
            if heads == "energy":
                scores["attention"] = scores["attention"] * written["attention"] ** energy
        if together:
            sizes, products = seen.of(need)["mlp"][1], seen.of(SECOND_MOMENT)["mlp"]
            orders = []
            for place, weight in params.writing("mlp"):
                width = weight.shape[1]
                layer = (weight[:, :, 0], products[place, :width, :width], sizes[place, :width])
                orders.append(jax.lax.map(lambda each: order_together(*each), layer))
            scores["mlp"] = jnp.concatenate(orders)
        return scores

    more = {SECOND_MOMENT} if together else set()
    return Estimator(frozenset({need, GATE_GRADIENT, ACTIVATION_MOMENTS, *more}), score)


AUTHOR = "saap_jax, by the prompt of AGENTS.md"
METHOD = "FILE:thinned(together=True) > within(protect=(0.13, -0.07)) > uniform > least_squares"
