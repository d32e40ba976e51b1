"""Scores of a masked traced model, as `rounds` asks for them: those of the model that the cut leaves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.estimation.registry import ESTIMATORS
from saap_jax.runtime.progress import Passes
from saap_jax.steps.score.calibrate import score_examples
from saap_jax.steps.score.score import Score
from saap_jax.trace.cut import keep_units, smaller
from saap_jax.trace.problem import Problem
from saap_jax.trace.subject.observe import OBSERVED
from saap_jax.trace.subject.problem import at_shapes
from saap_jax.trace.subject.subject import subject_of
from tests.helpers import dense_model, random_tokens
from tests.models_for_tracing import drawn
from tests.trace.subject.problems import problem_of, square, stacked
from tests.trace.subject.test_activations import llama_problem

BY_INDEX = {"random", "gate_hessian"}
"""Estimators that draw a number for each unit by its index."""
NAMES = [
    *(name for name, make in ESTIMATORS.items() if make().needs <= OBSERVED and name not in BY_INDEX),
    "fluctuation(standardize=True)",
    "fluctuation(standardize=True, attention_power=1)",
    "activation_frequency(multiple=0.5)",
]


def grouped_queries(first=0):
    """Make attention in which several queries share a key, without positions: a width's rows are of all of them."""
    draw = functools.partial(drawn, seed=np.random.default_rng(0))

    def function(p, x):
        q = jnp.einsum("btd,dkge->btkge", x, p["query"])
        k, v = (jnp.einsum("bsd,dke->bske", x, p[name]) for name in ("key", "value"))
        scores = [jnp.einsum("btkge,bske->bkgts", q, k), jnp.einsum("bske,btkge->bkgts", k, q)]
        weights = jax.nn.softmax(scores[first])
        return jnp.einsum("bkgts,bske,kgeo->bto", weights, v, p["output"])

    params = {"query": draw(5, 3, 4, 6), "key": draw(5, 3, 6), "value": draw(5, 3, 6), "output": draw(3, 4, 6, 2)}
    examples = draw(6, 7, 5), draw(6, 7, 2)
    return Problem(function=function, params=params, loss=square, calibration=examples, held_out=examples)


MODELS = {
    "stream and layers": lambda: (stacked(), True),
    "llama": lambda: (llama_problem(dense_model("gqa", mlp=7), random_tokens(6, 9)), False),
    "experts": lambda: (problem_of("moe"), False),
    "grouped queries": lambda: (grouped_queries(), False),
    "grouped queries, keys first": lambda: (grouped_queries(1), False),
    "cross-attention": lambda: (problem_of("cross_attention"), False),
    "repeated heads": lambda: (problem_of("repeated_heads"), False),
    "decoder": lambda: (problem_of("nnx_decoder"), True),
    "convolutions": lambda: (problem_of("convnet"), True),
}
FIRST = ("stream and layers", "llama", "grouped queries", "grouped queries, keys first", "cross-attention")
"""Those that are tried before each change; what they have in common with the others is that structures cross."""


def in_double(tree):
    def double(leaf):
        return jnp.asarray(leaf, jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(double, tree)


def drawn_keep(subject):
    """Keep more than half of the units of every structure, other ones in each copy."""
    random, keep = np.random.default_rng(1), {}
    for structure in subject.structures:
        count = min(structure.units, max(2, structure.least, round(0.6 * structure.units)))
        order = np.broadcast_to(np.arange(structure.units), (structure.copies, structure.units))
        keep[structure.name] = random.permuted(order, axis=1) < count
    return keep


def cut_subject(subject, keep):
    """Trace the cut model as if it were somebody's own."""
    shaped = subject.by_copies(keep)

    def function(params, *inputs):
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), inputs)
        return smaller(at_shapes(subject, shapes), shaped)(params, *inputs)

    less = keep_units(subject.traced, shaped, subject.problem.params)
    return subject_of(dataclasses.replace(subject.problem, function=function, params=less), refused=True, norms=True)


def kept_copies(subject, structure, keep):
    """Say which copies of a structure the cut leaves: those whose experts or heads stay."""
    kept, first = np.ones(structure.copied, bool), structure.members[0]
    for other in subject.structures:
        for member in other.members:
            if member.path == first.path and member.axis in first.shared:
                places = [first.shared.index(axis) for axis in (*member.shared, member.axis)]
                own = keep[other.name].reshape(*other.copied, other.units).transpose(np.argsort(places))
                kept &= own.reshape([n if axis in places else 1 for axis, n in enumerate(structure.copied)])
    return np.flatnonzero(kept)


@functools.cache
def masked_and_cut(model: str):
    problem, norms = MODELS[model]()
    fields = {name: in_double(getattr(problem, name)) for name in ("params", "calibration", "held_out")}
    with jax.numpy_dtype_promotion("standard"):
        subject = subject_of(dataclasses.replace(problem, **fields), refused=True, norms=norms)
        keep = drawn_keep(subject)
        small = cut_subject(subject, keep)
        plan = {name: Score(name) for name in NAMES}
        examples = subject.problem.calibration
        masked = score_examples(subject, examples, plan, Passes(4), keep=keep)[1].scores
        cut = score_examples(small, examples, plan, Passes(4))[1].scores
    assert {each.name for each in subject.structures} <= {each.name for each in small.structures}
    return subject, keep, masked, cut


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", [m if m in FIRST else pytest.param(m, marks=pytest.mark.nightly) for m in MODELS])
def test_masked_units_score_as_those_of_the_cut(model, name, x64):
    """Whatever units of other structures have gone: streams, heads, widths, experts."""
    subject, keep, masked, cut = masked_and_cut(model)
    for structure in subject.structures:
        copies = kept_copies(subject, structure, keep)
        for place, copy in enumerate(copies):
            kept = keep[structure.name][copy]
            found, expected = masked[name][structure.name][copy], cut[name][structure.name][place]
            np.testing.assert_allclose(found[kept], expected, rtol=1e-5, atol=1e-10, err_msg=structure.name)
            assert np.isnan(found[~kept]).all()
