"""Contractions that carry units onward: rows times matrices is what the program computes, and what is none is left."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.trace.interpret import tapped
from saap_jax.trace.listing import traced_model
from saap_jax.trace.trace import by_path, trace
from saap_jax.trace.writers import writers_of
from tests.helpers import dense_model
from tests.models_for_tracing import EXAMPLES, all_ones, drawn
from tests.trace.test_gates import example_of, keep_of

QUICK = ("phi", "convnet")
SOME_QUICK = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in EXAMPLES]


@functools.cache
def traced_example(name):
    example, params, inputs = example_of(name)
    traced = trace(example.function, params, *inputs)
    return traced, writers_of(traced, traced.prunable), params, inputs


def small(function, *shapes, x=(5, 3), integer=()):
    """Trace `function(params, x)` with random parameters and input, and find the writers of its structures."""
    random = np.random.default_rng(0)
    params = {
        name: jnp.asarray(random.integers(-9, 9, shape), jnp.int8) if name in integer else drawn(*shape, seed=random)
        for name, shape in shapes
    }
    x = drawn(*x, seed=random)
    traced = trace(function, params, x)
    return traced, writers_of(traced, traced.prunable), params, x


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_rows_times_matrices_is_what_the_program_computes(name):
    """The product of each writer, bound to its own operands, has the same numbers."""
    traced, writers, params, inputs = traced_example(name)
    values, taps = by_path(params), [(w.tap[0], operand) for w in writers.found for operand in (0, 1)]
    _, found = jax.jit(tapped(traced, taps))({}, params, *inputs)
    assert writers.found
    for writer in writers.found:
        eqn, operands = writer.eqn, [found[writer.tap[0], operand] for operand in (0, 1)]
        parameters = eqn.primitive.get_bind_params(eqn.params)
        bind = lambda a, b, e=eqn, p=parameters: e.primitive.bind(a, b, **p)  # noqa: E731
        for _ in writer.scans:
            bind = jax.vmap(bind)

        @jax.jit
        def products(operands, value, writer=writer, bind=bind):
            rows, matrices = writer.rows(operands[writer.tap[1]]), writer.matrices(value)
            own, other = (jnp.einsum("src,sco->sro", rows, each) for each in (matrices, matrices[:, ::-1]))
            return own, other, bind(*operands)

        own, other, expected = (np.sort(np.ravel(each)) for each in products(operands, values[writer.path]))
        np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-4)
        assert writer.index.shape[1] == 1 or np.abs(other - expected).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_what_is_written_back_is_read_again_and_nothing_else_changes(name):
    _, writers, params, _ = traced_example(name)
    values, random = by_path(params), np.random.default_rng(1)
    for writer in writers.found:
        value = np.asarray(values[writer.path])
        before = np.asarray(writer.matrices(value))
        matrix = random.normal(size=before.shape[1:])
        system = writer.systems - 1
        after = writer.replaced(value, system, matrix)
        found = np.asarray(writer.matrices(after))
        np.testing.assert_array_equal(found[system], matrix.astype(value.dtype))
        np.testing.assert_array_equal(found[:system], before[:system])
        assert np.count_nonzero(after != value) == matrix.size
        assert (after.shape, after.dtype) == (value.shape, value.dtype)


@pytest.mark.parametrize("name", SOME_QUICK)
def test_coordinates_of_removed_units_are_those_that_gates_set_to_zero(name):
    traced, writers, params, inputs = traced_example(name)
    random = np.random.default_rng(2)
    keep = {each.name: keep_of(each, random) for each in traced.prunable}
    run = jax.jit(tapped(traced, [writer.tap for writer in writers.found]))
    gates = {n: jnp.asarray(kept, jnp.float32) for n, kept in keep.items()}
    _, found = run(gates, params, *inputs)
    _, dense = run(all_ones(traced.prunable), params, *inputs)
    flat = {each.name: keep[each.name].reshape(each.copies, each.units) for each in traced.prunable}
    for writer in writers.found:
        kept = writer.kept(flat)
        assert not kept.all()
        rows, whole = (np.asarray(writer.rows(each[writer.tap])) for each in (found, dense))
        assert not rows.transpose(0, 2, 1)[~kept].any()
        assert np.abs(whole.transpose(0, 2, 1)[~kept]).max() > 1e-3


def test_the_writers_of_our_llama_are_output_and_down():
    traced = traced_model(dense_model("gqa", mlp=7))
    structures = [each for each in traced.prunable if each.role != "stream"]
    writers = writers_of(traced, structures)
    assert {writer.path for writer in writers.found} == {"segments/0/attention/output", "segments/0/mlp/down"}
    assert all(writer.systems == 2 for writer in writers.found)  # layers
    assert not writers.without


def test_parts_of_a_fused_matrix_are_told_apart():
    def function(p, x):
        up, down = jnp.split(p["fused"].T, 2, 1)  # [in, hidden] and, turned, [out, hidden]
        return jnp.tanh(x @ up) @ down.T[:, ::-1]

    traced, writers, params, x = small(function, ("fused", (14, 3)))
    (hidden,) = [each for each in traced.prunable if each.units == 7]
    (writer,) = writers.of(hidden.name)
    expected = np.asarray(params["fused"])[7:, ::-1]
    np.testing.assert_array_equal(writer.matrices(params["fused"])[0], expected)
    np.testing.assert_allclose(function(params, x), jnp.tanh(x @ params["fused"][:7].T) @ expected, rtol=1e-5)


def loop(p, x):
    """Apply one matrix in every turn: its rows are those of all turns."""

    def turn(h, up):
        return h + jnp.tanh(h @ up) @ p["down"], None

    return jax.lax.scan(turn, x, p["up"])[0] @ p["out"]


def test_a_matrix_that_all_turns_share_is_one_system():
    traced, writers, params, x = small(loop, ("up", (4, 3, 6)), ("down", (6, 3)), ("out", (3, 2)))
    (writer,) = [each for each in writers.found if each.path == "down"]
    _, found = tapped(traced, [writer.tap])({}, params, x)
    rows = writer.rows(found[writer.tap])
    assert rows.shape == (1, 4 * 5, 6)
    h, expected = x, []
    for up in params["up"]:
        expected.append(jnp.tanh(h @ up))
        h = h + expected[-1] @ params["down"]
    np.testing.assert_allclose(rows[0], jnp.concatenate(expected), rtol=1e-4, atol=1e-6)
    assert [writer.turn(0)] == [writer.tap[0]]


def test_turns_come_in_the_order_in_which_they_run():
    def function(p, x):
        def turn(h, w):
            return h + jnp.tanh(h @ w["up"]) @ w["down"], None

        return jax.lax.scan(turn, x, {"up": p["up"], "down": p["down"]}, reverse=True)[0]

    _, writers, *_ = small(function, ("up", (4, 3, 6)), ("down", (4, 6, 3)))
    (writer,) = [each for each in writers.found if each.path == "down"]
    assert sorted(range(4), key=writer.turn) == [3, 2, 1, 0]


def tied(p, x):
    return jnp.tanh(x @ p["up"]) @ p["down"] * jnp.square(p["down"]).sum(0)[None]


def branched(p, x):
    h = jnp.tanh(x @ p["up"])
    return jax.lax.cond(x.sum() > 0, lambda h: h @ p["down"], lambda h: h @ p["down"] * 2, h)


def quantised(p, x):
    return jnp.tanh(x @ p["up"]) @ (p["down"].astype(jnp.float32) * p["scale"][None])


def scaled(p, x):
    return jnp.tanh(x @ p["up"]) @ (1 + p["down"])


def repeated(p, x):
    return jnp.tanh(x @ p["up"]) @ jnp.broadcast_to(p["down"][:, None], (6, 4))


def summed(p, x):
    return jnp.tanh(x @ p["up"]).sum(-1)


@pytest.mark.parametrize(
    ("function", "shapes", "reason"),
    [
        (tied, [("up", (3, 6)), ("down", (6, 4))], "down is used elsewhere too"),
        (branched, [("up", (3, 6)), ("down", (6, 4))], "act inside a cond"),
        (quantised, [("up", (3, 6)), ("down", (6, 4)), ("scale", (4,))], "meet no parameter as it is"),
        (scaled, [("up", (3, 6)), ("down", (6, 4))], "meet no parameter as it is"),
        (repeated, [("up", (3, 6)), ("down", (6,))], "numbers of down are repeated"),
        (summed, [("up", (3, 6))], "are summed by reduce_sum"),
    ],
)
def test_what_carries_no_units_is_left_with_a_reason(function, shapes, reason):
    traced, writers, *_ = small(function, *shapes, integer=("down",) if function is quantised else ())
    hidden = next(each.name for each in traced.prunable if each.units == 6)
    found = [each.shared for each in writers.of(hidden)] or [writers.without[hidden]]
    assert all(reason in each for each in found)
