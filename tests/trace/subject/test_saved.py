"""A pruned model goes to a directory and comes back with the same factory; another factory is refused in one line."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.trace.problem import Problem
from saap_jax.trace.subject.problem import cut
from saap_jax.trace.subject.saved import load_pruned
from saap_jax.trace.subject.subject import subject_of
from tests.models_for_tracing import drawn
from tests.trace.subject.problems import chosen, drawn_scores, square, stacked


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


def fused(first=jnp.tanh, constant=1.0, order=(0, 1), count=5) -> Problem:
    """Make a problem whose shapes say nothing of its activation, of a constant, and of the order of fused parts."""
    draw = functools.partial(drawn, seed=np.random.default_rng(0))
    params = {"in": draw(3, 2, 6), "out": draw(6, 2)}
    scale = jnp.full((2,), constant)

    def function(params, x):
        parts = jnp.einsum("bi,ipf->pbf", x, params["in"])
        return (first(parts[order[0]]) * parts[order[1]]) @ params["out"] * scale[None]

    examples = draw(count, 3), draw(count, 2)
    return Problem(function=function, params=params, loss=square, calibration=examples, held_out=examples)


@pytest.fixture(scope="module")
def of_fused(tmp_path_factory):
    subject = subject_of(fused())
    keep = chosen(subject, drawn_scores(subject), 0.4).keep
    path = tmp_path_factory.mktemp("fused") / "model"
    subject.cut(keep).save(path, keep)
    return path


@pytest.mark.parametrize("changed", [{"first": jax.nn.sigmoid}, {"constant": 2.0}, {"order": (1, 0)}])
def test_another_program_is_refused(of_fused, changed):
    load_pruned(of_fused, fused(count=3))  # control: as many examples as there are
    with pytest.raises(ValueError, match="was pruned from another program than this .*, or prune again"):
        load_pruned(of_fused, fused(**changed))


@pytest.mark.slow
def test_another_program_is_told_in_another_process(of_fused):
    """The digest is the same there."""
    code = "from tests.trace.subject.test_saved import fused, jax, load_pruned\nload_pruned({!r}, fused(constant={}))\n"
    for constant, fails in (("1.0", False), ("2.0", True)):
        environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[3])}
        words = [sys.executable, "-c", code.format(str(of_fused), constant)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
        assert (done.returncode != 0) == fails == ("was pruned from another program" in done.stderr), done.stderr


def test_a_program_of_another_version_is_a_warning(of_fused, tmp_path):
    """The texts of programs are other ones there."""
    shutil.copytree(of_fused, tmp_path / "model")
    record = json.loads((of_fused / "pruned.json").read_text())
    older = {**record["program"], "made_by": "jax 0.0.1 on abacus"}
    load_pruned(tmp_path / "model", fused())
    for program, said in ((older, "was pruned with jax 0.0.1 on abacus"), (None, "a version that kept no digest")):
        (tmp_path / "model" / "pruned.json").write_text(json.dumps({**record, "program": program}))
        with pytest.warns(UserWarning, match=f"{said}.* cannot tell whether"):
            load_pruned(tmp_path / "model", fused(constant=2.0))
