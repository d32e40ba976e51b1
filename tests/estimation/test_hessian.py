"""Gates to second order: `gate_hessian` against jax.hessian, and the first order against finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.estimation.base import Curvature
from saap_jax.estimation.gates import GATE_GRADIENT
from saap_jax.estimation.hessian import GATE_HESSIAN, curvature_of, random_signs
from saap_jax.estimation.observe import observe, score
from saap_jax.estimation.registry import make_estimator, make_estimators
from saap_jax.llama.loss import next_token_losses
from saap_jax.llama.segments import existing_units, masks, ones_gates
from saap_jax.structures.weights import weights_of
from saap_jax.surgery.cut import cut
from saap_jax.types import STRUCTURES
from tests.helpers import dense_model, length_mask, losses_of, random_model, random_tokens, spec_of

TOKENS, MASK = random_tokens(3, 6), length_mask(6, 4, 5, seq=6)
LENGTHS = np.asarray([5, 3, 4])
NEED = frozenset({GATE_HESSIAN})


def gates_of(model):
    return jax.tree.map(lambda g: g.astype(jnp.float64), ones_gates(model.segments))


def cut_model(dtype):
    """Return a model of two runs, one without attention in it."""
    return random_model(spec_of((2, 4), (0, 3)), dtype=dtype)


@functools.cache
def full_hessian(make):
    """Return the gradient and the Hessian of the mean loss, a row a gate, with the structures' index ranges."""
    model = make(dtype=np.float64)
    gates, sizes = gates_of(model), {}
    flat, unflatten = jax.flatten_util.ravel_pytree(gates)
    start = 0
    for name in STRUCTURES:
        sizes[name] = slice(start, start + gates[name].size)
        start += gates[name].size

    def loss(flat):
        return jnp.sum(next_token_losses(model, jnp.asarray(TOKENS), jnp.asarray(MASK), unflatten(flat))[0]) / 12

    gradient, hessian = jax.jit(lambda g: (jax.grad(loss)(g), jax.hessian(loss)(g)))(flat)
    return np.asarray(gradient), np.asarray(hessian), sizes


@functools.cache
def observed(probes: int, attention: str = "exact"):
    curvature = Curvature(probes=probes, attention=attention)
    return observe(dense_model(dtype=np.float64), [(TOKENS, MASK)], NEED, curvature=curvature)


class TestAgainstTheFullHessian:
    @pytest.mark.parametrize(
        ("make", "size"),
        [
            (cut_model, 2),
            pytest.param(dense_model, 1, marks=[pytest.mark.slow, pytest.mark.nightly]),
        ],
    )
    def test_attention_is_exact_whatever_the_batches(self, x64, make, size):
        model = make(dtype=np.float64)
        gradient, hessian, ranges = full_hessian(make)
        rows = [np.pad(array, ((0, -3 % size), (0, 0))) for array in (TOKENS, MASK)]
        batches = [tuple(array[i : i + size] for array in rows) for i in range(0, 3, size)]
        statistics = observe(model, batches, NEED, curvature=Curvature(probes=2))
        value = statistics.of(GATE_HESSIAN)
        diagonal = np.diag(hessian)[ranges["attention"]]
        np.testing.assert_allclose(value.exact["attention"].ravel(), diagonal, rtol=1e-9, atol=1e-12)
        for name in STRUCTURES:
            np.testing.assert_allclose(value.gradient[name].ravel(), gradient[ranges[name]], rtol=1e-9, atol=1e-12)
        assert np.abs(diagonal).max() > 1e-3  # there is something to find
        exists = existing_units(model.segments)["attention"]
        scores = score({"h": make_estimator("gate_hessian(probes=2)")}, statistics, model)["h"]["attention"]
        by_hand = np.abs(gradient[ranges["attention"]] - diagonal / 2).reshape(exists.shape)
        np.testing.assert_allclose(scores[exists], by_hand[exists], rtol=1e-9)
        assert np.isnan(scores[~exists]).all()

    @pytest.mark.slow
    def test_a_probe_gives_z_times_its_product(self, x64):
        """Of all gates at once, where attention is probed too."""
        _, hessian, ranges = full_hessian(dense_model)
        value = observed(3, "probes").of(GATE_HESSIAN)
        for number in range(3):
            signs = random_signs(0, jnp.asarray(number), value.gradient)
            z = np.concatenate([np.asarray(signs[name]).ravel() for name in STRUCTURES])
            assert set(z) == {-1.0, 1.0}
            for name in STRUCTURES:
                expected = (z * (hessian @ z))[ranges[name]]
                np.testing.assert_allclose(value.probed[name][number].ravel(), expected, rtol=1e-9, atol=1e-12)

    @pytest.mark.slow
    def test_error_shrinks_as_one_over_the_root_of_the_probes(self, x64):
        """The mean squared error of n probes is Σ_{v≠u} H_uv² / n; probes of channels touch no attention gate."""
        _, hessian, ranges = full_hessian(dense_model)
        block = hessian[ranges["mlp"], ranges["mlp"]]
        probed = np.asarray(observed(512).of(GATE_HESSIAN).probed["mlp"]).reshape(512, -1)
        theory = (block**2).sum(axis=1) - np.diag(block) ** 2
        for probes in (1, 4, 16):
            means = probed.reshape(-1, probes, probed.shape[1]).mean(axis=1)
            error = ((means - np.diag(block)) ** 2).mean()
            assert error == pytest.approx(theory.mean() / probes, rel=0.25)
        assert np.abs(probed.mean(axis=0) - np.diag(block)).max() < 5 * np.sqrt(theory.max() / 512)

    @pytest.mark.slow
    def test_probes_of_a_masked_model_are_those_of_the_cut_one(self, x64):
        """With the same signs: gates that are closed are not probed."""
        kept = np.array([[1, 1, 0, 1, 0, 1], [0, 1, 1, 1, 1, 0]], bool)
        keep = {"attention": np.ones((2, 2), bool), "mlp": kept}
        model, curvature = dense_model(dtype=np.float64), Curvature(probes=1)
        _, hessian, ranges = full_hessian(lambda dtype: cut(model, keep))
        seen = observe(model, [(TOKENS, MASK)], NEED, gates=masks(keep), curvature=curvature).of(GATE_HESSIAN)
        z = np.asarray(random_signs(0, jnp.asarray(0), seen.gradient)["mlp"])[kept]
        probed = np.asarray(seen.probed["mlp"][0])
        expected = z * (hessian[ranges["mlp"], ranges["mlp"]] @ z)
        np.testing.assert_allclose(probed[kept], expected, rtol=1e-9, atol=1e-12)
        assert not probed[~kept].any()


class TestOptions:
    @pytest.mark.slow
    def test_scores_use_as_many_probes_as_they_ask_for(self, x64):
        model = dense_model(dtype=np.float64)
        value = observed(512).of(GATE_HESSIAN)
        scores = {
            n: make_estimator(f"gate_hessian(probes={n})").score(observed(512), weights_of(model))["mlp"]
            for n in (3, 8)
        }
        for probes, actual in scores.items():
            by_hand = np.abs(value.gradient["mlp"] - np.mean(value.probed["mlp"][:probes], axis=0) / 2)
            np.testing.assert_allclose(actual, by_hand, rtol=1e-12)
        assert not np.allclose(scores[3], scores[8], rtol=1e-3)
        np.testing.assert_allclose(observed(3).of(GATE_HESSIAN).probed["mlp"], value.probed["mlp"][:3])
        signs = [random_signs(seed, jnp.asarray(0), value.gradient)["mlp"] for seed in (0, 1)]
        assert not np.array_equal(*signs)

    @pytest.mark.slow
    def test_attention_by_probes_and_a_model_without_any(self, x64):
        model, statistics = dense_model(dtype=np.float64), observed(3, "probes")
        value = statistics.of(GATE_HESSIAN)
        assert not value.exact
        scores = make_estimator("gate_hessian(probes=3, attention='probes')").score(statistics, weights_of(model))[
            "attention"
        ]
        by_hand = np.abs(value.gradient["attention"] - np.mean(value.probed["attention"], axis=0) / 2)
        np.testing.assert_allclose(scores, by_hand, rtol=1e-12)
        model = random_model(spec_of((0, 3)))
        statistics = observe(model, [(TOKENS, MASK)], NEED, curvature=Curvature(probes=5))
        scores = make_estimator("gate_hessian(probes=5)").score(statistics, weights_of(model))
        assert scores["attention"].shape == (1, 0)
        assert (scores["mlp"] > 0).all()

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("asked", "attention", "message"),
        [
            ("gate_hessian(probes=9)", "exact", "expected 9 probes of mlp, 3 were observed"),
            ("gate_hessian(probes=3)", "probes", "attention was observed by probes"),
            ("gate_hessian(probes=3, attention='probes')", "exact", "expected 3 probes of attention, 0 were observed"),
        ],
    )
    def test_statistics_that_do_not_hold_what_is_asked(self, x64, asked, attention, message):
        with pytest.raises(ValueError, match=message):
            score({"h": make_estimator(asked)}, observed(3, attention), dense_model(dtype=np.float64))

    def test_one_pass_serves_several_numbers_of_probes(self):
        names = ["gate_hessian(probes=4)", "gate_hessian(probes=32)", "magnitude"]
        assert curvature_of(make_estimators(names).values()) == Curvature(probes=32)
        assert curvature_of([]) == Curvature()
        with pytest.raises(ValueError, match="one seed and one kind of attention in a pass"):
            curvature_of(make_estimators([*names, "gate_hessian(seed=1)"]).values())


@pytest.mark.slow
def test_gate_taylor_signed_against_finite_differences(x64):
    """-(1/N) Σ_n ∂ℒ_n/∂g_u is minus the slope of the mean over examples of their mean losses."""
    model = dense_model(dtype=np.float64)
    statistics = observe(model, [(TOKENS, MASK)], frozenset({GATE_GRADIENT}))
    scores = make_estimator("gate_taylor_signed").score(statistics, weights_of(model))

    def loss(name, layer, unit, value) -> float:
        gates = gates_of(model)
        gates[name] = gates[name].at[layer, unit].set(value)
        return float(np.mean(np.asarray(losses_of(model, TOKENS, MASK, gates)) / LENGTHS))

    for name in STRUCTURES:
        for unit in np.ndindex(scores[name].shape):
            slope = (loss(name, *unit, 1 + 1e-5) - loss(name, *unit, 1 - 1e-5)) / 2e-5
            np.testing.assert_allclose(scores[name][unit], -slope, rtol=1e-6, atol=1e-9)
    assert min(float(s.min()) for s in scores.values()) < 0 < max(float(s.max()) for s in scores.values())
    absolute = make_estimator("gate_taylor").score(statistics, weights_of(model))["mlp"]
    assert bool(jnp.all(absolute >= jnp.abs(scores["mlp"]) - 1e-12))
    assert not np.allclose(absolute, jnp.abs(scores["mlp"]), rtol=1e-3)
