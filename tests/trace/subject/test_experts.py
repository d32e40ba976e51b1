"""Experts go with their router columns while as many remain as are chosen; masked = cut = experts taken out by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.trace.cut import keep_units, smaller
from saap_jax.trace.interpret import Changes, evaluate, gated
from saap_jax.trace.problem import Problem
from saap_jax.trace.subject.problem import cut
from saap_jax.trace.subject.subject import subject_of
from saap_jax.trace.trace import trace
from tests.trace.subject.problems import chosen, cut_losses, masked_losses

E, K, D, F = 5, 2, 4, 6


def dense(h, params, weights):
    """All experts of all tokens, weighted `[tokens, experts]`."""
    hidden = jnp.tanh(jnp.einsum("td,edf->tef", h, params["up"]))
    return jnp.einsum("tef,efd,te->td", hidden, params["down"], weights)


def by_threshold(params, h):
    probabilities = jax.nn.softmax(h @ params["router"])
    least = jax.lax.top_k(probabilities, K)[0][:, -1:]
    return dense(h, params, jnp.where(probabilities >= least, probabilities, 0.0))


def by_one_hot(params, h):
    values, places = jax.lax.top_k(jax.nn.softmax(h @ params["router"]), K)
    values = values / values.sum(-1, keepdims=True)
    chosen = jax.nn.one_hot(places, params["router"].shape[1])
    return dense(h, params, jnp.einsum("tk,tke->te", values, chosen))


def switch(params, h):
    probabilities = jax.nn.softmax(h @ params["router"])
    chosen = jax.nn.one_hot(jnp.argmax(probabilities, -1), params["router"].shape[1])
    return dense(h, params, probabilities * chosen)


ROUTERS = [by_threshold, by_one_hot, switch]


def parameters(seed=0):
    random = np.random.default_rng(seed)
    shapes = {"router": (D, E), "up": (E, D, F), "down": (E, F, D), "out": (D, 3)}
    return {name: jnp.asarray(random.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def model(router):
    def function(params, x):
        params = dict(params)
        outputs = [router(params, row) for row in x]  # a batch of two, unrolled
        return jnp.einsum("btd,dn->btn", x + jnp.stack(outputs), params["out"])

    return function


def without(params, gone):
    axes = {"router": 1, "up": 0, "down": 0}
    return {n: jnp.asarray(np.delete(w, gone, axis=axes[n])) if n in axes else w for n, w in params.items()}


def experts_of(router, params=None):
    params = parameters() if params is None else params
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 9, D)), jnp.float32)
    with jax.numpy_rank_promotion("allow"):
        traced = trace(model(router), params, x)
    (found,) = [each for each in traced.prunable if each.role == "experts"]
    return found, traced, params, x


@pytest.mark.slow
@pytest.mark.parametrize("router", ROUTERS)
def test_masked_is_cut_is_experts_taken_out_by_hand(router):
    """Of every set of experts that may go, all outputs agree; a removed expert is never chosen."""
    found, traced, params, x = experts_of(router)
    least = 1 if router is switch else K
    assert (found.units, found.least, found.copied) == (E, least, ())
    wanted = {("router", 1), ("up", 0), ("down", 0)}
    assert {(member.path, member.axis) for member in found.members} == wanted
    run, same, changed = jax.jit(gated(traced)), jax.jit(model(router)), 0.0
    with jax.numpy_rank_promotion("allow"):
        original = model(router)(params, x)
        np.testing.assert_allclose(run({found.name: jnp.ones(E)}, params, x), original, 1e-5)
        for count in range(1, E - least + 1):
            for gone in itertools.combinations(range(E), count) if count < 3 else [(0, 2, 4)]:
                keep = {found.name: ~np.isin(np.arange(E), gone)}
                masked = run({found.name: jnp.asarray(keep[found.name], jnp.float32)}, params, x)
                by_hand = same(without(params, gone), x)
                less = keep_units(traced, keep, params)
                jax.tree.map(np.testing.assert_array_equal, less, without(params, gone))
                np.testing.assert_allclose(masked, by_hand, rtol=1e-4, atol=1e-5, err_msg=str(gone))
                if count < 2:
                    after = jax.jit(smaller(traced, keep))(less, x)
                    np.testing.assert_allclose(after, by_hand, rtol=1e-4, atol=1e-5, err_msg=str(gone))
                changed = max(changed, float(jnp.abs(masked - original).max()))
    assert changed > 1e-2


@pytest.mark.slow
def test_a_gate_of_zero_on_the_logits_is_not_enough():
    """Negative control: where only products are gated, a removed expert is chosen in another's place."""
    found, traced, params, x = experts_of(by_one_hot)
    gone, worst = jnp.ones(E), 0.0
    for expert in range(E):
        values = gone.at[expert].set(0.0)
        placed = [(gate, gate.along, values) for gate in found.gates]
        (wrong,), _ = evaluate(traced.program, [*jax.tree.leaves(params), x], (), Changes(placed))
        right = gated(traced)({found.name: values}, params, x)
        worst = max(worst, float(jnp.abs(wrong - right).max()))
    assert worst > 1e-2


def weighted_by_place(params, h):
    values, places = jax.lax.top_k(jax.nn.softmax(h @ params["router"]), K)
    return by_one_hot(params, h) + (values * places).sum(-1, keepdims=True)


def of_numbered(params, h):
    values, places = jax.lax.top_k(jax.nn.softmax(h @ params["router"]), K)
    return by_one_hot(params, h) + (values * (places == 2)).sum(-1, keepdims=True)


def by_gather(params, h):
    values, places = jax.lax.top_k(h @ params["router"], K)
    hidden = jnp.tanh(jnp.einsum("td,tkdf->tkf", h, params["up"][places]))
    return jnp.einsum("tkf,tkfd,tk->td", hidden, jnp.take(params["down"], places, axis=0), jax.nn.softmax(values))


@pytest.mark.parametrize("router", [weighted_by_place, of_numbered, by_gather])
def test_positions_that_are_used_as_numbers_pin_the_experts(router):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        traced = trace(model(router), parameters(), jnp.ones((1, 9, D)))
    (found,) = [each for each in traced.structures if ("router", 1) in {(m.path, m.axis) for m in each.members}]
    assert "order" in {reason.kind for reason in found.pinned}


def of_experts(router=by_one_hot, count=6):
    params, random = parameters(), np.random.default_rng(2)
    x, y = (jnp.asarray(random.normal(size=(count, 7, n)), jnp.float32) for n in (D, 3))
    function = jax.vmap(lambda params, x: x @ params["out"] + router(params, x) @ params["out"], (None, 0))
    return Problem(
        function=function,
        params=params,
        loss=lambda out, y: jnp.square(out - y).mean(),
        calibration=(x, y),
        held_out=(-x, y),
    )


@pytest.mark.slow
@pytest.mark.parametrize("router", [by_one_hot, by_threshold])
def test_the_pipeline_leaves_as_many_experts_as_are_chosen(router):
    with jax.numpy_rank_promotion("allow"):
        subject = subject_of(of_experts(router))
        (found,) = [each for each in subject.structures if each.role == "experts"]
        scores = {name: np.random.default_rng(0).uniform(size=gate.shape) for name, gate in subject.ones.items()}
        scores[found.name] = scores[found.name] * 0 + 1e-9
        alone = {each.name: 0.0 for each in subject.structures if each is not found}
        limits = {"min_keep": {"*": 0}, "max_ratio": alone}
        keep = chosen(subject, scores, 0.5, "global", **limits).keep
        assert keep[found.name].sum() == K
        with pytest.raises(ValueError, match="the largest possible ratio is"):
            chosen(subject, scores, 0.8, "global", **limits)
        masked = masked_losses(subject, keep)
        np.testing.assert_allclose(cut_losses(subject, keep, cut(subject, keep)[1]), masked, rtol=1e-4)
