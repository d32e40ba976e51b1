"""A pruned model goes to a directory and comes back with the same factory; another factory is refused in one line."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.trace.subject import cut, load_pruned, subject_of
from tests.trace.subject.problems import chosen, stacked


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    subject = subject_of(stacked())
    random = np.random.default_rng(0)
    scores = {name: random.uniform(size=gate.shape) for name, gate in subject.ones.items()}
    keep = chosen(subject, scores, 0.4).keep
    path = tmp_path_factory.mktemp("pruned") / "model"
    subject.cut(keep).save(path, keep, {"estimator": "random"})
    return path, subject, keep


@pytest.mark.slow
def test_it_comes_back(pruned):
    path, subject, keep = pruned
    function, params = load_pruned(path, stacked())
    before, less = cut(subject, keep)
    jax.tree.map(np.testing.assert_array_equal, params, less)
    assert params["layers"]["up"].shape != subject.problem.params["layers"]["up"].shape
    inputs = subject.problem.held_out[0]
    np.testing.assert_allclose(function(params, inputs), before(less, inputs), rtol=1e-6)
    np.testing.assert_allclose(function(params, inputs[:1])[0], function(params, inputs)[0], rtol=1e-5)
    assert np.abs(function(params, inputs) - subject.problem.function(subject.problem.params, inputs)).max() > 1e-3
    problem = stacked()  # shapes of the dense parameters are enough
    shapes = jax.eval_shape(lambda: problem.params)
    function, params = load_pruned(path, dataclasses.replace(problem, params=shapes))
    np.testing.assert_allclose(function(params, inputs), before(less, inputs), rtol=1e-6)
    for length in (1, 4):  # and no dense weights are needed for other shapes
        wide = dataclasses.replace(problem, params=shapes, function=lambda p, x: problem.function(p, x[:, :3]))
        function, params = load_pruned(path, wide)
        more = jnp.ones((length, 5))
        np.testing.assert_allclose(function(params, more), before(less, more[:, :3]), rtol=1e-6)


def test_nothing_is_overwritten(pruned):
    path, subject, keep = pruned
    with pytest.raises(FileExistsError, match="never overwritten"):
        subject.cut(keep).save(path, keep)


def test_another_factory_is_refused(pruned):
    path = pruned[0]
    problem = stacked()
    wider = {**problem.params, "in": jnp.ones((3, 6))}
    with pytest.raises(
        ValueError, match=r"another model .*: parameter in was of shape \(3, 4\), and is of shape \(3, 6\)"
    ):
        load_pruned(path, dataclasses.replace(problem, params=wider, function=lambda p, x: x @ p["in"]))
    more = {**problem.params, "more": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"parameter more was absent, and is of shape \(2,\)"):
        load_pruned(path, dataclasses.replace(problem, params=more))
    with pytest.raises(ValueError, match=r"structure .* is not prunable any more"):  # the width is a number in the code
        load_pruned(path, dataclasses.replace(problem, function=lambda p, x: problem.function(p, x) + 0 * jnp.einsum(
            "id,d->", p["in"], jnp.arange(4.0))))  # fmt: skip
    load_pruned(path, dataclasses.replace(problem, params=jax.tree.map(jnp.zeros_like, problem.params)))
