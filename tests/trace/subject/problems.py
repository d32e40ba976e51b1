"""Problems made of the small models for tracing: a random teacher's outputs as targets, the mean square as loss."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from saap_jax.api import score_units, select_units
from saap_jax.llama.segments import masks
from saap_jax.steps.base import TextSize
from saap_jax.steps.repair.output import LeastSquares
from saap_jax.trace.problem import Problem
from saap_jax.trace.subject.problem import cut_function, loss_of_one
from saap_jax.trace.subject.subject import CutTraced, TracedSubject, subject_of
from tests.models_for_tracing import EXAMPLES, drawn
from tests.trace.test_gates import example_of, values_like

MIXED = "control_flow"
"""The one whose branches depend on the sum over a batch."""


def square(outputs, targets):
    return jnp.square(outputs - targets).mean()


def stacked() -> Problem:
    """Make a small model with two layers in a scan, and five examples, which batches of two do not divide."""
    draw = functools.partial(drawn, seed=np.random.default_rng(0))

    def function(params, x):
        h = jnp.tanh(jnp.einsum("bi,id->bd", x, params["in"]))

        def layer(h, w):
            return h + jnp.einsum("bf,fd->bd", jnp.tanh(jnp.einsum("bd,df->bf", h, w["up"])), w["down"]), None

        h, _ = jax.lax.scan(layer, h, params["layers"])
        return jnp.einsum("bd,dn->bn", h, params["out"])

    params = {"in": draw(3, 4), "layers": {"up": draw(2, 4, 5), "down": draw(2, 5, 4)}, "out": draw(4, 2)}
    examples = [(draw(5, 3), draw(5, 2)) for _ in range(2)]
    return Problem(function=function, params=params, loss=square, calibration=examples[0], held_out=examples[1])


def problem_of(name: str, count: int = 6) -> Problem:
    """Draw a problem of `count` calibration and as many held-out examples, not trained."""
    example, params, _ = example_of(name)
    random = np.random.default_rng(3)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2 * count, *leaf.shape[1:]), leaf.dtype), example.inputs)
    inputs = values_like(shapes, random)
    outputs = jax.eval_shape(example.function, params, *inputs)
    targets = jnp.asarray(random.normal(size=outputs.shape), jnp.float32)
    halves = [
        jax.tree.map(lambda leaf, p=part: leaf[p], (inputs, targets)) for part in (slice(count), slice(count, None))
    ]
    return Problem(function=example.function, params=params, loss=square, calibration=halves[0], held_out=halves[1])


@functools.cache
def subject_of_model(name: str) -> TracedSubject:
    """Trace a model that is not trained, with 16 examples, whatever its own code takes."""
    return subject_of(problem_of(name, 16), refused=True)


@functools.cache
def trained(name: str, count: int = 64, steps: int = 300) -> Problem:
    """Train a model on targets that a random network made, by some steps of Adam.

    Each step takes 64 examples, or all where there are fewer.
    """
    example = EXAMPLES[name]()

    def small(seed: int):
        return jax.tree.map(lambda leaf: leaf * 0.5, values_like(example.params, np.random.default_rng(seed)))

    problem = problem_of(name, count)
    make = jax.jit(example.function)
    halves = [(inputs, make(small(1), *inputs)) for inputs, _ in (problem.calibration, problem.held_out)]
    optimizer = optax.adam(1e-2)
    batches = [jax.tree.map(lambda leaf, at=at: leaf[at : at + 64], halves[0]) for at in range(0, count, 64)]

    @jax.jit
    def step(params, state, batch):
        inputs, targets = batch
        gradient = jax.grad(lambda p: square(example.function(p, *inputs), targets))(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params = small(2)
    state = optimizer.init(params)
    with jax.numpy_dtype_promotion("standard"):
        for number in range(steps):
            params, state = step(params, state, batches[number % len(batches)])
    return dataclasses.replace(problem, params=params, calibration=halves[0], held_out=halves[1])


SAAP = "fused(taylor_element, gate_taylor, attention=fused)"
"""What SAAP fuses in a traced model: a sum over elements, and the gradients of gates."""


def calibrate(subject, estimators, stability=False, **options):
    """Score the units by all calibration examples of a subject's problem."""
    return score_units(subject, subject.problem.scenarios, estimators, stability=stability, **options)


def chosen(subject, scores, ratio, allocation="uniform", **limits):
    """Choose units by scores; `limits` are by structures' names: `min_keep`, `max_ratio`, `multiple_of`."""
    said = ", ".join(f"{name}={value}" for name, value in limits.items())
    return select_units(subject, scores, ratio, f"within({said}) > {allocation}" if limits else allocation)


def selected(subject, calibrated, estimator, ratio):
    """Choose units by the scores of an estimator, as many of every structure."""
    return select_units(subject, calibrated, ratio, estimator=estimator)


def drawn_scores(subject, seed=0):
    """Draw a score for every unit."""
    random = np.random.default_rng(seed)
    return {name: random.lognormal(0, 1, gate.shape) for name, gate in subject.ones.items()}


def repaired(subject, keep, batch_size=8, examples=None, **options):
    """Correct by least squares, on the calibration examples: the new subject, and what was done."""
    examples = subject.problem.calibration if examples is None else examples
    step = LeastSquares(**options)
    step.check(subject, TextSize(len(jax.tree.leaves(examples)[0]), batch_size))
    return subject.repaired(keep, examples, step, dense=subject, batch_size=batch_size)


def gated_losses(subject, gates, examples):
    """Compute the loss of each example at some gates."""
    step = subject.program("losses of tests", lambda: jax.jit(jax.vmap(loss_of_one(subject), (None, None, 0, 0))))
    return np.asarray(step(gates, subject.problem.params, *examples), np.float64)


def masked_losses(subject, keep):
    """Compute the losses of the held-out examples under a keep-set (None: of the dense model)."""
    return gated_losses(subject, subject.ones if keep is None else masks(keep), subject.problem.held_out)


def cut_losses(subject, keep, params, batch_size=8):
    """Compute the losses of the cut model on the held-out examples."""
    return CutTraced(subject, cut_function(subject, keep), params).losses(subject.problem.held_out, batch_size).sums
