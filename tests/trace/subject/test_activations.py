"""Estimators of activations on traced models: those of our LLaMA on the same model, and sums written out by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.estimation.activations import ACTIVATION_MOMENTS, ACTIVATION_USAGE, MULTIPLES
from saap_jax.estimation.observe import observe, score
from saap_jax.estimation.registry import make_estimators
from saap_jax.llama.model import Llama
from saap_jax.llama.segments import existing_units, masks
from saap_jax.runtime.progress import Passes
from saap_jax.structures.weights import weights_of
from saap_jax.trace.problem import Problem
from saap_jax.trace.subject.subject import subject_of
from tests.helpers import dense_model, random_tokens
from tests.trace.subject.problems import calibrate, problem_of, square
from tests.trace.subject.test_compensation import mlp_problem

NAMES = (
    "wanda", "fluctuation", "fluctuation(standardize=True)", "activation_frequency",
    "activation_frequency(multiple=0.5)",
)  # fmt: skip
NEEDS = frozenset({ACTIVATION_MOMENTS, ACTIVATION_USAGE})


def llama_problem(model, tokens) -> Problem:
    """Pose a model of ours as somebody else's: a function and arrays."""
    targets = jnp.asarray(np.random.default_rng(0).normal(size=(*tokens.shape, model.spec.vocab)), jnp.float32)
    examples = (jnp.asarray(tokens), targets)
    return Problem(function=Llama.__call__, params=model, loss=square, calibration=examples, held_out=examples)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "masked"), [("gqa", False), ("mha", False), ("gqa", True)])
def test_scores_are_those_of_our_llama(kind, masked):
    """On examples of one length without padding; heads and channels, the structures that both know."""
    model = dense_model(kind, mlp=7)
    keep = existing_units(model.segments)
    if masked:
        keep["attention"][0, 1] = keep["mlp"][0, :2] = keep["mlp"][1, 4:] = False
    tokens = random_tokens(6, 9)
    subject = subject_of(llama_problem(model, tokens))
    made = make_estimators(NAMES)
    batches = [(tokens[i : i + 2], np.ones((2, 9), bool)) for i in (0, 2, 4)]
    own = observe(model, batches, NEEDS, gates=masks(keep))
    heads = next(each.name for each in subject.structures if each.role == "heads")
    pairs = {"attention": heads, "mlp": "segments/0/mlp/down[1]"}
    traced_keep = subject.existing | {traced: keep[name] for name, traced in pairs.items()}
    seen = subject.observe(subject.problem.scenarios["calibration"], NEEDS, Passes(4), keep=traced_keep)
    found = score(made, seen, subject.weights)
    for name in NAMES:
        expected = made[name].score(own, weights_of(model))
        for structure, traced in pairs.items():
            np.testing.assert_allclose(
                found[name][traced], expected[structure], rtol=2e-4, atol=1e-6, err_msg=f"{name} {structure}"
            )
            assert np.nanstd(np.asarray(expected[structure])) > 1e-4
    assert np.abs(found["wanda"][pairs["mlp"]] - found["fluctuation"][pairs["mlp"]]).max() > 1e-3


def by_hand(a, w):
    """Score units with some coordinates each, `a` [rows, units, coordinates] and `w` [.., out]."""
    f = a.var(0) * np.square(w).sum(-1)
    r = np.sqrt(np.square(a).mean(-1))
    shares = {m: (r > m * np.sqrt(np.square(r).mean(-1, keepdims=True))).mean(0) for m in MULTIPLES}
    return {
        "wanda": (np.abs(w) * np.sqrt(np.square(a).mean(0))[..., None]).sum((-2, -1)),
        "fluctuation": f.sum(-1),
        "fluctuation(standardize=True)": ((f - f.mean()) / f.std(ddof=1)).mean(-1),
        "activation_frequency": shares[1.0],
        "activation_frequency(multiple=0.5)": shares[0.5],
    }


@pytest.mark.slow
def test_a_hidden_layer_is_the_formulas_written_out():
    problem = mlp_problem(np.float32)
    found = calibrate(subject_of(problem), NAMES, batch_size=7)
    p = jax.tree.map(lambda w: np.asarray(w, np.float64), problem.params)
    a = np.maximum(np.asarray(problem.calibration[0], np.float64) @ p["up"], 0)
    for name, expected in by_hand(a[:, :, None], p["down"][:, None]).items():
        np.testing.assert_allclose(found.scores(name)["down[0]"][0], expected, rtol=1e-4, err_msg=name)
    wrong = by_hand(a[:, :, None], p["up"].T[:, None])
    assert np.abs(wrong["wanda"] - found.scores("wanda")["down[0]"][0]).max() > 0.1


@pytest.mark.slow
def test_queries_and_keys_count_by_what_they_meet():
    """Where there is no matrix: √E[q²] √E[k²] of each coordinate, in each head; and several readers are summed."""
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)  # noqa: E731
    params = {name: draw(5, 3, 4) for name in ("query", "key", "value")}
    params |= {"out": draw(3, 4, 6), "left": draw(6, 2), "right": draw(6, 3)}
    x = draw(8, 7, 5)

    def function(p, x):
        q, k, v = (jnp.einsum("btd,dhe->bthe", x, p[name]) for name in ("query", "key", "value"))
        weights = jax.nn.softmax(jnp.einsum("bthe,bshe->bhts", q, k) / 9)
        h = jnp.einsum("bthe,hed->btd", jnp.einsum("bhts,bshe->bthe", weights, v), p["out"])
        return jnp.concatenate([h @ p["left"], jnp.tanh(h) @ p["right"]], -1)

    targets = draw(8, 7, 5)
    problem = Problem(function=function, params=params, loss=square, calibration=(x, targets), held_out=(x, targets))
    subject = subject_of(problem)
    found = calibrate(subject, NAMES, batch_size=3)
    q, k = (np.asarray(jnp.einsum("btd,dhe->bthe", x, params[name])).reshape(56, 3, 4) for name in ("query", "key"))
    (widths,) = [each.name for each in subject.structures if each.members[0].path == "key" and each.units == 4]
    expected = np.sqrt(np.square(q).mean(0)) * np.sqrt(np.square(k).mean(0))
    np.testing.assert_allclose(found.scores("wanda")[widths], expected, rtol=1e-4)
    np.testing.assert_allclose(found.scores("fluctuation")[widths], q.var(0) * np.square(k).mean(0), rtol=1e-4)
    q, k, v = (jnp.einsum("btd,dhe->bthe", x, params[name]) for name in ("query", "key", "value"))
    weights = jax.nn.softmax(jnp.einsum("bthe,bshe->bhts", q, k) / 9)
    middle = jnp.einsum("bhts,bshe->bthe", weights, v)
    heads = next(each.name for each in subject.structures if each.role == "heads")
    np.testing.assert_allclose(
        found.scores("wanda")[heads][0],
        by_hand(np.asarray(middle).reshape(56, 3, 4), np.asarray(params["out"]))["wanda"],
        rtol=1e-4,
    )
    h = np.asarray(jnp.einsum("bthe,hed->btd", middle, params["out"])).reshape(56, 6)
    (stream,) = [each.name for each in subject.structures if each.units == 6]
    both = [by_hand(a[:, :, None], np.asarray(params[n])[:, None]) for a, n in ((h, "left"), (np.tanh(h), "right"))]
    for name in ("wanda", "fluctuation"):
        np.testing.assert_allclose(found.scores(name)[stream][0], both[0][name] + both[1][name], rtol=1e-3)
    share = (both[0]["activation_frequency"] + both[1]["activation_frequency"]) / 2
    np.testing.assert_allclose(found.scores("activation_frequency")[stream][0], share, atol=1e-6)


@pytest.mark.slow
def test_masked_units_have_no_activation():
    subject = subject_of(problem_of("phi", 6), refused=True)
    keep = {name: units.copy() for name, units in subject.existing.items()}
    keep["down[0]"][:, 3] = False
    plain, masked = (
        subject.observe(subject.problem.calibration, NEEDS, keep=each).of(ACTIVATION_MOMENTS).square["down[0]"][0, :, 0]
        for each in (None, keep)
    )
    assert masked[3] == 0 < plain[3]
    np.testing.assert_allclose(np.delete(masked, 3), np.delete(plain, 3), rtol=1e-5)


@pytest.mark.slow
def test_units_that_act_in_a_branch_are_refused_by_name():
    problem = mlp_problem(np.float32)

    def function(p, x):
        h = jax.nn.relu(x @ p["up"])
        y = jax.lax.cond(x.sum() > 0, lambda h: h @ p["down"], lambda h: (2 * h) @ p["down"] / 2, h)
        return y + p["bias"][None]

    subject = subject_of(dataclasses.replace(problem, function=function))
    with pytest.raises(ValueError, match=r"activation_moments of down\[0\]: cannot be observed, its units act inside"):
        calibrate(subject, ["wanda"])
    assert calibrate(subject, ["gate_taylor"]).scores("gate_taylor")["down[0]"].shape == (1, 9)
