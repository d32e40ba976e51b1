"""Scores of traced models beside brute force: finite differences, the loss without a unit, sums written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.trace.cut import keep_units, smaller
from saap_jax.trace.subject.problem import loss_of_one
from saap_jax.trace.subject.subject import subject_of
from tests.trace.subject.problems import calibrate, gated_losses, square, stacked

ALL = (
    "random", "magnitude", "taylor_vector", "taylor_element", "taylor_element_second", "fisher", "gate_taylor",
    "gate_taylor_signed", "gate_fisher", "gate_hessian(probes=64)", "ablation",
)  # fmt: skip


@pytest.fixture(scope="module")
def subject():
    return subject_of(stacked())


@pytest.fixture(scope="module")
def scores(subject):
    found = calibrate(subject, ALL, batch_size=2)
    return {name: found.scores(name) for name in found.estimators}


def losses(subject, gates):
    return gated_losses(subject, gates, subject.problem.calibration)


def test_the_dense_losses_are_the_functions(subject):
    inputs, targets = subject.problem.calibration
    outputs = subject.problem.function(subject.problem.params, inputs)
    np.testing.assert_allclose(losses(subject, subject.ones), jnp.square(outputs - targets).mean(-1), rtol=1e-5)


@pytest.mark.parametrize("name", ["in[1]", "layers/down[1]"])
def test_gate_scores_are_finite_differences(subject, scores, name):
    step = 1e-2
    for copy, unit in np.ndindex(*scores["gate_taylor"][name].shape):
        up, down = (
            losses(subject, subject.ones | {name: subject.ones[name].at[copy, unit].add(d)}) for d in (step, -step)
        )
        slopes = (up - down) / (2 * step)
        for estimator, expected in (
            ("gate_taylor", np.abs(slopes).mean()),
            ("gate_taylor_signed", -slopes.mean()),
            ("gate_fisher", np.square(slopes).mean()),
        ):
            np.testing.assert_allclose(scores[estimator][name][copy, unit], expected, rtol=2e-2, atol=2e-3)


@pytest.mark.slow
def test_ablation_is_the_loss_of_the_model_without_the_unit(subject, scores):
    inputs, targets = subject.problem.calibration
    params = subject.problem.params
    for name, changes in scores["ablation"].items():
        for copy, unit in np.ndindex(*changes.shape):
            if len(changes) > 1:  # one layer alone loses a unit: its weights are zero instead
                up = params["layers"]["up"].at[copy, :, unit].set(0)
                without = params | {"layers": params["layers"] | {"up": up}}
                outputs = subject.problem.function(without, inputs)
            elif unit > 1:
                continue
            else:
                keep = {name: np.arange(changes.shape[1]) != unit}
                less = keep_units(subject.traced, keep, params)
                rows = [smaller(subject.traced, keep)(less, inputs[i : i + 1]) for i in range(len(inputs))]
                np.testing.assert_allclose(
                    jnp.concatenate(rows), subject.problem.function(less, inputs), rtol=1e-4, atol=1e-5
                )
                outputs = jnp.concatenate(rows)
            change = square(outputs, targets) - losses(subject, subject.ones).mean()
            np.testing.assert_allclose(changes[copy, unit], change, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_weight_scores_are_the_formulas_written_out(subject, scores):
    inputs, targets = subject.problem.calibration
    params = subject.problem.params

    def loss(p, rows):
        return square(subject.problem.function(p, inputs[rows]), targets[rows])

    mean = jax.grad(loss)(params, slice(None))
    each = [jax.grad(loss)(params, slice(n, n + 1)) for n in range(5)]
    fisher = jax.tree.map(lambda *g: jnp.stack([jnp.square(x) for x in g]).mean(0), *each)
    for layer, unit in np.ndindex(2, 5):
        parts = []
        for tree in (params, mean, fisher):
            parts.append([tree["layers"]["down"][layer, unit], tree["layers"]["up"][layer, :, unit]])
        expected = {
            "magnitude": np.sqrt(sum(np.square(w).sum() for w in parts[0])),
            "taylor_vector": sum(abs((w * g).sum()) for w, g, _ in zip(*parts, strict=True)),
            "taylor_element": sum(np.abs(w * g).sum() for w, g, _ in zip(*parts, strict=True)),
            "fisher": sum((w**2 * f).sum() for w, _, f in zip(*parts, strict=True)),
            "taylor_element_second": sum(np.abs(w * g - w**2 * f / 2).sum() for w, g, f in zip(*parts, strict=True)),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(scores[name]["layers/down[1]"][layer, unit], value, rtol=1e-4, err_msg=name)


@pytest.mark.slow
def test_the_probed_hessian_nears_the_exact_diagonal(subject, scores):
    def loss(row):
        gates = subject.ones | {"layers/down[1]": row.reshape(2, 5)}
        one = loss_of_one(subject)
        rows = jax.vmap(one, (None, None, 0, 0))(gates, subject.problem.params, *subject.problem.calibration)
        return rows.mean()

    ones = jnp.ones(10)
    exact = np.abs(jax.grad(loss)(ones) - jnp.diag(jax.hessian(loss)(ones)) / 2)
    found = scores["gate_hessian(probes=64)"]["layers/down[1]"].ravel()
    assert np.corrcoef(found, exact)[0, 1] > 0.9
    assert np.corrcoef(found, scores["magnitude"]["layers/down[1]"].ravel())[0, 1] < 0.9
