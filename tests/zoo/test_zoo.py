"""Models of other libraries (extra `zoo`): what is found, masked = cut, their own code, other shapes, training."""

import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

os.environ.setdefault("KERAS_BACKEND", "jax")

from saap_jax.llama.segments import masks
from saap_jax.trace.interpret import gated
from saap_jax.trace.own_code import verdicts
from saap_jax.trace.subject.problem import at_shapes, cut
from saap_jax.trace.subject.subject import subject_of
from saap_jax.trace.trace import by_path
from tests.trace.subject.problems import cut_losses, masked_losses
from tests.zoo.models import COUNT, ZOO, counted

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]
ANIMALS = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ZOO]
"""Of one model, all tests run in one process, which traces it once."""


@functools.cache
def subject(name):
    """Trace a model, whatever its own code takes."""
    return subject_of(ZOO[name]().problem, refused=True)


@functools.cache
def chosen(name):
    """Remove a third of every structure, at random, and leave what has to be left."""
    random, keep = np.random.default_rng(0), {}
    for each in subject(name).structures:
        order = random.permuted(np.tile(np.arange(each.units), (each.copies, 1)), axis=1)
        keep[each.name] = order >= min(max(each.units // 3, 1), each.units - max(each.least, 1))
    return keep


@functools.cache
def pruned(name):
    return cut(subject(name), chosen(name))


@pytest.mark.parametrize("name", ANIMALS)
def test_the_structures_are_those_that_an_expert_counts(name):
    assert counted(subject(name).structures) == {*ZOO[name]().structures.split(", ")}
    assert not subject(name).traced.unknown


@pytest.mark.parametrize("name", ANIMALS)
def test_masked_is_cut(name):
    animal, keep = subject(name), chosen(name)
    masked, dense = (masked_losses(animal, each) for each in (keep, None))
    assert np.abs(masked - dense).max() > 1e-4
    np.testing.assert_allclose(cut_losses(animal, keep, pruned(name)[1], COUNT), masked, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ANIMALS)
def test_what_the_own_code_takes(name):
    animal, problem = subject(name), ZOO[name]().problem
    inputs = problem.inputs(problem.row(problem.calibration, 0)[0])
    found = verdicts(problem.function, animal.traced, animal.structures, problem.params, *inputs)
    takes = {f"{each.role} {each.units}" for each in animal.structures if found[each.name].verdict == "takes"}
    assert takes == {*filter(None, ZOO[name]().takes.split(", "))}


@pytest.mark.parametrize("name", ANIMALS)
def test_another_shape_of_inputs(name):
    """Another length of sequences, another size of images: masked = cut there too."""
    make = ZOO[name]().other
    if make is None:
        pytest.skip("one shape of inputs only")
    animal, keep, inputs = subject(name), chosen(name), make(2)
    function, params = pruned(name)
    run = jax.jit(gated(at_shapes(animal, (inputs[:1],))))
    gates = animal.by_copies(masks(keep))
    masked = [run(gates, animal.problem.params, row[None]) for row in inputs]
    outputs = jax.jit(function)(params, inputs)
    np.testing.assert_allclose(outputs, jnp.concatenate(masked), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ANIMALS)
def test_five_steps_of_training(name):
    problem = ZOO[name]().problem
    function, params = pruned(name)
    inputs, targets = problem.calibration
    leaves, tree = jax.tree.flatten(params)
    statistics = re.compile(ZOO[name]().statistics)
    trained = [
        jnp.issubdtype(leaf.dtype, jnp.floating) and not statistics.search(path)
        for path, leaf in by_path(params).items()
    ]
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.02))

    def loss(values):
        every = iter(values)
        whole = tree.unflatten([next(every) if one else leaf for one, leaf in zip(trained, leaves, strict=True)])
        return problem.loss(function(whole, *problem.inputs(inputs)), targets)

    @jax.jit
    def step(values, state):
        now, gradient = jax.value_and_grad(loss)(values)
        updates, state = optimizer.update(gradient, state, values)
        return optax.apply_updates(values, updates), state, now

    values = [jnp.asarray(leaf) for one, leaf in zip(trained, leaves, strict=True) if one]
    state, seen = optimizer.init(values), []
    for _ in range(5):
        values, state, now = step(values, state)
        seen.append(float(now))
    assert np.isfinite(seen).all()
    assert seen[-1] < seen[0]
