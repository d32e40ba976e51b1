"""Attention in blocks is that of the whole matrix, in values and gradients, and holds no matrix."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.estimation.base import Curvature, Plan
from saap_jax.estimation.gates import GATE_GRADIENT
from saap_jax.estimation.hessian import GATE_HESSIAN, hessian_step
from saap_jax.estimation.observe import grown
from saap_jax.estimation.registry import STATISTICS
from saap_jax.llama import attention
from saap_jax.llama.attention import LONG, Seen, attending, chosen, in_blocks, plain
from saap_jax.llama.passes import packed_hidden
from saap_jax.llama.segments import ones_gates
from saap_jax.planning.count import equations
from tests.helpers import dense_model, length_mask, random_tokens, relative

LENGTH = 37
"""Of rows: no other axis has this size, and no block divides it."""

TEXTS = np.repeat([1, 2, -1], [20, 12, 5])[None].repeat(2, axis=0)
PLACES = np.concatenate([np.arange(20), np.arange(12), np.arange(5)])[None].repeat(2, axis=0)

SIGHTS = {
    "causal": Seen(LENGTH),
    "window": Seen(LENGTH, 7),
    "own window": Seen(LENGTH, None, (np.asarray(True), 7)),
    "own lack of a window": Seen(LENGTH, 7, (np.asarray(True), None)),
    "window of the rest": Seen(LENGTH, 7, (np.asarray(False), 11)),
    "texts": Seen(LENGTH, segments=TEXTS),
    "texts, window": Seen(LENGTH, 7, positions=PLACES, segments=TEXTS),
}


def sight(name: str) -> Seen:
    return jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, SIGHTS[name])


def sees(name: str, row: int, query: int, key: int) -> bool:
    """Say whether a token sees another, from the words of `Seen`, one pair at a time."""
    seen = SIGHTS[name]
    window = seen.apart[1] if seen.apart is not None and seen.apart[0] else seen.window
    place = (lambda at: at) if seen.positions is None else (lambda at: seen.positions[row, at])
    if key > query or (window is not None and place(query) - place(key) >= window):
        return False
    if seen.segments is None:
        return True
    own, other = seen.segments[row, [query, key]]
    return own == other


def inputs(dtype=jnp.float32, heads=(2, 3), length=LENGTH) -> tuple[jax.Array, ...]:
    """Return queries, keys, values and what gradients are multiplied by."""
    random, (kv_heads, q_per_kv) = np.random.default_rng(0), heads
    of_queries, of_keys = (2, length, kv_heads, q_per_kv, 4), (2, length, kv_heads, 4)
    shapes = (of_queries, of_keys, of_keys, of_queries)
    return tuple(jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes)


def values_and_gradients(path, arrays, seen: Seen) -> tuple[jax.Array, ...]:
    *arrays, cotangent = arrays
    found, pull = jax.vjp(lambda *each: path(*each, seen, 0.7), *arrays)
    return found, *pull(cotangent)


def run(path, arrays, seen: Seen) -> tuple[jax.Array, ...]:
    """Return values and gradients, by one program."""
    return jax.jit(functools.partial(values_and_gradients, path, seen=seen))(arrays)


def close(found, expected, tolerance: float) -> bool:
    """Say whether arrays are equal up to a share of their largest number."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    wide = [[np.asarray(each, np.float64) for each in pair] for pair in pairs]
    return all(np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-3) for a, b in wide)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIGHTS)
def test_rules_are_what_their_words_say(name):
    rows = np.asarray([0, 8, 9, 20, 21, 31, 36])
    found = np.broadcast_to(sight(name).by(jnp.asarray(rows)), (2, len(rows), LENGTH))
    expected = [[[sees(name, row, query, key) for key in range(LENGTH)] for query in rows] for row in (0, 1)]
    np.testing.assert_array_equal(found, expected)
    assert np.asarray(expected).any(axis=-1).all(), "each sees something"


@functools.cache
def by_another_window() -> tuple[jax.Array, ...]:
    return run(plain, inputs(), Seen(LENGTH, 3))


@pytest.mark.slow
@pytest.mark.parametrize("name", SIGHTS)
def test_blocks_are_the_whole_matrix(name):
    found = run(functools.partial(in_blocks, size=8), inputs(), sight(name))
    assert close(found, run(plain, inputs(), sight(name)), 1e-5)
    assert not close(found, by_another_window(), 1e-2), "control"


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 0.03), (jnp.float64, 1e-13)])
def test_blocks_in_other_types(dtype, tolerance, x64):
    """Gradients of narrow keys and values are as near those of wide ones as with the whole matrix."""
    arrays, seen = inputs(dtype, heads=(1, 1)), sight("window")
    found = run(functools.partial(in_blocks, size=8), arrays, seen)
    assert {each.dtype for each in found} == {jnp.dtype(dtype)}
    wide = [each.astype(jnp.float64) for each in arrays]
    assert close(found, run(plain, wide, seen), tolerance)
    assert not close(found, run(plain, wide, Seen(LENGTH, 6)), tolerance), "control"


# --- in programs ---------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch):
    """Make blocks of three queries."""
    monkeypatch.setattr(attention, "FEWEST", 3)
    monkeypatch.setattr(attention, "SCORES", 0)


def scored(path: str, family: str, length: int = LENGTH, remat: str = "none"):
    """Return what scores a batch, its arguments, and the path that it takes."""
    model, tokens = relative(family), jnp.asarray(random_tokens(2, length))
    mask = jnp.asarray(length_mask(length, length - 4, seq=length))
    needs = (GATE_GRADIENT, STATISTICS["squared_weight_gradient"])

    def run(model, gates):
        with attending(path):
            state = {need: need.init(model, Plan(2)) for need in needs}
            return grown(model, (tokens, mask, jnp.asarray(0)), gates, state, remat)

    return run, (model, ones_gates(model.segments))


def packed(path: str, family: str):
    """Return the gradient that recovery takes of packed rows, and its arguments."""
    tokens, positions, segments = (jnp.asarray(each) for each in (random_tokens(2, LENGTH), PLACES, TEXTS))

    def loss(model):
        with attending(path):
            return jnp.sum(packed_hidden(model, tokens, positions, segments)[0] ** 2)

    return jax.grad(loss), (relative(family),)


@pytest.mark.slow
def test_a_model_scores_the_same_in_blocks(few):
    """Gradients of weights and of each example's gates; layers apart have a window of their own."""
    (whole, arguments), (blocks, _) = (scored(path, "gemma3_text", 11) for path in ("plain", "blocks"))
    expected, found = jax.jit(whole)(*arguments), jax.jit(blocks)(*arguments)
    assert close(found, expected, 1e-4)
    constants = arguments[0].constants
    arguments[0].constants = dataclasses.replace(constants, apart=dataclasses.replace(constants.apart, layers=(1,)))
    assert not close(jax.jit(blocks)(*arguments), expected, 1e-2), "control"


def matrices(run, arguments) -> int:
    """Count the arrays of a program that have an entry for each pair of tokens."""
    found = equations(jax.make_jaxpr(run)(*arguments))
    return sum(var.aval.shape.count(LENGTH) > 1 for equation, _ in found for var in equation.outvars)


@pytest.mark.slow
@pytest.mark.parametrize("program", [scored, packed])
@pytest.mark.parametrize("family", ["phi3", "gemma3_text"])
def test_no_program_has_an_entry_for_each_pair_of_tokens(program, family, few):
    assert matrices(*program("blocks", family)) == 0
    assert matrices(*program("plain", family)) > 0, "control"


def test_the_backward_pass_keeps_no_scores():
    """Those of four heads take 16 MiB, those of a block 1."""
    shapes = [jax.ShapeDtypeStruct((1, 1024, *heads, 4), jnp.float32) for heads in ((2, 2), (2,), (2,))]

    def held(path) -> int:
        gradient = jax.grad(lambda *each: jnp.sum(path(*each, Seen(1024), 0.5)), (0, 1, 2))
        return jax.jit(gradient).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert held(functools.partial(in_blocks, size=64)) < 6 * 2**20
    assert held(plain) > 32 * 2**20, "control"


@pytest.mark.slow
def test_second_derivatives_in_blocks(few):
    model, (tokens, mask) = dense_model(), (jnp.asarray(random_tokens(2, 8)), jnp.ones((2, 8), bool))
    curvature = Curvature(probes=1, attention="probes")
    step = hessian_step.__wrapped__  # the jitted one donates its sums

    def hessian(path: str):
        with attending(path):
            run = functools.partial(step, curvature=curvature, remat="dots")
            total = GATE_HESSIAN.init(model, Plan(2, curvature))
            return jax.jit(run)(model, total, (tokens, mask), ones_gates(model.segments))

    assert close(hessian("blocks"), hessian("plain"), 1e-4)


# --- the switch ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "asked", "path"),
    [
        (LONG, "auto", "plain"),
        (LONG + 1, "auto", "blocks"),
        (LONG + 1, "plain", "plain"),
        (2, "blocks", "blocks"),
    ],
)
def test_which_path_is_taken(length, asked, path):
    with attending(asked):
        assert chosen(jnp.zeros((1, length, 1, 1, 2))) == path
        assert chosen(jnp.zeros((1, length, 0, 1, 2))) == "plain", "a layer without heads"
    assert chosen(jnp.zeros((1, 2, 1, 1, 2))) == "plain", "the context has ended"


def test_compiled_programs_are_told_apart_by_the_switch():
    traced = []

    @jax.jit
    def run(query, key):
        traced.append(chosen(query))
        return query

    for path in ("plain", "blocks", "plain", "blocks"):
        with attending(path):
            run(jnp.zeros((1, 2, 1, 1, 2)), jnp.zeros((1, 2, 1, 2)))
    assert traced == ["plain", "blocks"]
