"""One operation at a time: the hidden width of a two-layer network with that operation in between, and why it stays.

Where it can go, what is masked is what is cut.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax
from jax.extend.random import threefry_2x32

from saap_jax.trace.axes import Axes, Place
from saap_jax.trace.cut import keep_units, smaller
from saap_jax.trace.interpret import gated
from saap_jax.trace.own_code import retrace
from saap_jax.trace.trace import trace
from tests.models_for_tracing import drawn, floats, masked_as_cut, removed_shapes
from tests.trace.test_gates import keep_of

WIDTH, BATCH = 6, 5


@jax.custom_vjp
def passed(x):
    return x * 2


passed.defvjp(lambda x: (x * 2, None), lambda _, g: (g,))

key = functools.partial(jax.random.key, 0)


def beside(operation):
    """Add a statistic over the units to what they are."""
    return lambda h: h + operation(h)[:, None].astype(h.dtype)


def pairs(a, b):
    return a[0] + b[0], jnp.maximum(a[1], b[1])


raw = functools.partial(jax.random.PRNGKey, 0)


def dropped(h, key=key):
    return jnp.where(jax.random.bernoulli(key(), 0.5, h.shape), h, 0)


def dropped_in_turn(h):
    def turn(state, key):
        return dropped(state, lambda: key) + 1, None

    return lax.scan(turn, h, jax.random.split(key(), 3))[0]


def dropped_by_row(h):
    """Drop as Equinox does: a key of each example."""
    keys = jax.random.split(raw(), BATCH)
    return jax.vmap(lambda row, key: dropped(row, lambda: key))(h, keys)


@jax.custom_vjp
def noisy(h):
    return h + jax.random.normal(key(), h.shape)


noisy.defvjp(lambda h: (noisy(h), None), lambda _, g: (g,))


def joined(h):
    """Sum over units and noise that stand side by side: the noise has a width of its own."""
    return h + jnp.concatenate([h, jax.random.normal(key(), (BATCH, 4))], -1).sum(-1, keepdims=True)


def looped(h):
    return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.sin(c[1])), (0, h))[1]


def looped_by_row(h):
    def row(r):
        return r * lax.while_loop(lambda c: c < jnp.sum(r), lambda c: c + 0.5, 0.0)

    return jax.vmap(row)(h)


def keyed(h):
    keys = jax.random.split(key(), h.shape[1])
    return jax.vmap(lambda k, column: column * jax.random.normal(k), (0, 1), 1)(keys, h)


def keyed_by_number(h, key=key):
    codes = jnp.zeros(h.shape[1:], int)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key(), codes)
    return h * jax.vmap(jax.random.normal)(keys)[None]


def counted(h):
    return h + jax.vmap(lambda row: jnp.zeros(2).at[(row > 0).astype(int)].add(row))(h)[:, :1]


def cached(h):
    return jax.lax.dynamic_update_slice(jnp.zeros((BATCH + 3, h.shape[1])), h, (1, 0))[:BATCH]


def depthwise(h, multiplier=1):
    x, kernel = h[:, None, :], jnp.ones((1, 1, h.shape[1] * multiplier))
    numbers = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1,), "SAME", dimension_numbers=numbers, feature_group_count=h.shape[1]
    )[:, 0]


PRUNABLE = {
    "relu": jax.nn.relu,
    "custom_vjp": passed,
    "jit": jax.jit(jnp.tanh),
    "checkpoint": jax.checkpoint(jnp.tanh),
    "while": looped,
    "while of each row": looped_by_row,
    "cond": lambda h: jax.lax.cond(True, jnp.sin, jnp.cos, h),
    "switch": lambda h: jax.lax.switch(1, [jnp.sin, jnp.cos, jnp.tanh], h),
    "scan carry": lambda h: jax.lax.scan(lambda c, _: (c + 1, None), h, length=3)[0],
    "scan over batch": lambda h: jax.lax.scan(lambda c, row: (c + row, c * row), h[0], h)[1],
    "associative scan over batch": lambda h: jax.lax.associative_scan(jnp.add, h),
    "map": lambda h: jax.lax.map(jnp.sin, h),
    "vmap": lambda h: jax.vmap(lambda row: row * row.shape[0])(h),
    # draws of which no size is that of the units, and keys that each unit has of its own
    "keys by number": keyed_by_number,
    "noise of each row": lambda h: h + jax.random.normal(key(), (BATCH, 1)),
    "noise beside units": joined,
    "dropout of rows": lambda h: jnp.where(jax.random.bernoulli(raw(), 0.5, (BATCH, 1)), h, 0),
    "noise in a loop": lambda h: lax.scan(
        lambda c, key: (c * jax.random.uniform(key), None), h, jax.random.split(key(), 3)
    )[0],
    "clip": lambda h: jnp.clip(h, -1.0, 1.0),
    "normalised": lambda h: h / jnp.linalg.norm(h, axis=-1, keepdims=True),
    "softmax": lambda h: jax.nn.softmax(h, -1),
    "two transposes": lambda h: h.T.reshape(h.shape[1], BATCH, 1)[..., 0].T,
    "cumsum over batch": lambda h: jnp.cumsum(h, 0),
    "flip of the batch": lambda h: h[::-1],
    "roll of the batch": lambda h: jnp.roll(h, 1, 0),
    "sort over batch": lambda h: jnp.sort(h, 0),
    "rows by index": lambda h: h[jnp.array([0, 2, 1, 1, 4])],
    "largest values": lambda h: h - jax.lax.top_k(h, 2)[0][:, -1:],
    "written rows": lambda h: h.at[jnp.array([0, 2])].add(1.0),
    "update of rows": cached,
    "convolution of width 1": lambda h: depthwise(h) * 2,
    "pooling over batch": lambda h: jax.lax.reduce_window(h, 0.0, jax.lax.add, (3, 1), (1, 1), "SAME"),
    "pad of the batch": lambda h: jnp.pad(h, [(1, 1), (0, 0)])[1:-1],
    "one-sized axes": lambda h: jnp.squeeze(h[None, :, None, :] + jnp.zeros((1, 1, 1, 1)), (0, 2)),
    "stack": lambda h: jnp.stack([h, h], 1)[:, 0],
    "unstack of the batch": lambda h: jnp.stack(jnp.unstack(h)),
    "tiled batch": lambda h: jnp.tile(h, (2, 1))[:BATCH],
    "composite": jax.lax.composite(lambda h: h + 1, "tests.composite"),
    "halves": lambda h: jnp.concatenate(jnp.split(h, 2, -1), -1),
    "gradient": lambda h: jax.grad(lambda h: jnp.sum(jnp.sin(h) ** 2))(h),
    "optimization barrier": lambda h: jax.lax.optimization_barrier((h, h))[0],
    "stop gradient": jax.lax.stop_gradient,
    "reduced precision": lambda h: h.astype(jnp.bfloat16).astype(jnp.float32),
    "empty arrays": lambda h: h + jnp.zeros((*h.shape, 2))[..., 2:].reshape(h.shape[0], -1).sum(-1)[:, None],
    # statistics, in which a masked unit has no part
    "softmax of softmax": lambda h: jax.nn.softmax(jax.nn.softmax(12 * jax.nn.softmax(12 * h, -1), -1), -1),
    "max": beside(lambda h: h.max(-1)),
    "min": beside(lambda h: h.min(-1)),
    "prod": beside(lambda h: h.prod(-1)),
    "any": beside(lambda h: (h > 1).any(-1)),
    "all": beside(lambda h: (h > -1).all(-1)),
    "largest truth": beside(lambda h: lax.reduce_max(h > 1, (1,))),
    "bits of all": beside(lambda h: lax.reduce_and(jnp.round(4 * h).astype(jnp.int32) | 8, (1,))),
    "largest integer": beside(lambda h: jnp.round(10 * h).astype(jnp.int32).max(-1)),
    # numbers that are filled into the shape of units: the cut once asked a Python number for its shape
    "jnp.full": lambda h: jnp.full(h.shape, 2.0) + h,
    "lax.full_like": lambda h: lax.select(h > 0, h, lax.full_like(h, 0.5)),
    "half": lambda h: h + jnp.full(h.shape, 3, jnp.bfloat16).astype(h.dtype),
    "where": lambda h: jnp.where(h > 0, h, -0.25),
    "lax.broadcast": lambda h: jnp.maximum(h, lax.broadcast(0.1, h.shape)),
    "lax.reshape": lambda h: h + lax.reshape(2.0, (1, 1)),
    "slice of a number": lambda h: h + lax.slice(2.0, (), ())[None, None],
    "dynamic_slice of a number": lambda h: h + lax.dynamic_slice(jnp.float32(2.0), (), ())[None, None],
    "lax.pad": lambda h: lax.pad(h, 0.5, ((0, 0, 0), (0, 0, 0))),
    "lax.clamp": lambda h: lax.clamp(-0.5, h, 0.5),
    "full in a loop": lambda h: lax.fori_loop(0, 2, lambda i, c: c + jnp.full(c.shape, 1.5), h),
}
PINNED = {
    "cumsum": (lambda h: jnp.cumsum(h, -1), "order"),
    "sort": (lambda h: jnp.sort(h, -1), "order"),
    "two sorts": (lambda h: jax.lax.sort((h, h), num_keys=1)[1], "order"),
    "argsort": (lambda h: jnp.argsort(h, -1).astype(jnp.float32), "order"),
    "argmax": (lambda h: h + jnp.argmax(h, -1, keepdims=True).astype(jnp.float32), "order"),
    "argmax of truths": (lambda h: h + jax.nn.one_hot(jnp.argmax(h > 0.3, -1), h.shape[1]), "order"),
    "places of the largest counts": (
        lambda h: h * jax.nn.one_hot(lax.top_k((h > 0.9).astype(jnp.uint8), 2)[1], h.shape[1]).sum(1),
        "order",
    ),
    "places of the largest": (lambda h: h + jax.lax.top_k(h, 2)[1][:, -1:].astype(jnp.float32), "order"),
    "flip": (lambda h: h[:, ::-1], "order"),
    "roll": (lambda h: jnp.roll(h, 1, -1), "split"),
    "numbers": (lambda h: h * jnp.arange(h.shape[1], dtype=jnp.float32)[None], "constant"),
    "mask": (lambda h: jnp.einsum("bi,ij->bj", h, jnp.tril(jnp.ones((h.shape[1], h.shape[1])))), "constant"),
    "position encoding": (lambda h: h + jnp.linspace(0, 1, h.shape[1])[None], "constant"),
    "taken": (lambda h: jnp.take(h, jnp.array([1, 0, 2, 3, 4, 5]), axis=1), "lookup"),
    "taken along": (lambda h: h + jnp.take_along_axis(h, jnp.zeros((BATCH, 1), jnp.int32), 1), "lookup"),
    "written": (lambda h: h.at[:, 1].set(0.0), "lookup"),
    "counted": (counted, "lookup"),
    "dealt out": (lambda h: h + lax.ragged_dot(h.T, jnp.ones((2, BATCH, BATCH)), jnp.array([2, 4])).T, "order"),
    "dynamic slice": (lambda h: h + jax.lax.dynamic_slice(h, (0, jnp.int32(1)), (BATCH, 1)), "lookup"),
    "unstack": (lambda h: jnp.stack(jnp.unstack(h, axis=1), 1), "split or reshape"),  # as the version of jax has it
    "first": (lambda h: h + h[:, :1], "split"),
    "shift": (lambda h: jnp.pad(h, [(0, 0), (1, 0)])[:, :-1], "split"),
    "pooling": (lambda h: jax.lax.reduce_window(h, 0.0, jax.lax.add, (1, 3), (1, 1), "SAME"), "window"),
    "grouped convolution": (lambda h: h + depthwise(h, 2).sum(-1, keepdims=True), "window"),
    "general reduction": (lambda h: h * jax.lax.reduce((h, h), (0.0, 0.0), pairs, (1,))[0][:, None], "unknown"),
    "fft": (lambda h: jnp.real(jnp.fft.fft(h)), "unknown"),
    # random numbers: fewer of the same key are others
    "dropout": (dropped, "random"),
    "dropout by a raw key": (lambda h: dropped(h, raw), "random"),
    "dropout by rbg": (lambda h: dropped(h, functools.partial(jax.random.key, 0, impl="rbg")), "random"),
    "dropout in a scan": (dropped_in_turn, "random"),
    "dropout of each row": (dropped_by_row, "random"),
    "dropout of columns": (lambda h: dropped(h[:1]) + h, "random"),
    "dropout of Linen": (
        lambda h: linen.Dropout(0.5, deterministic=False).apply({}, h, rngs={"dropout": key()}),
        "random",
    ),
    "dropout of NNX": (lambda h: nnx.Dropout(0.5)(h, rngs=nnx.Rngs(0)), "random"),
    "noise in a custom derivative": (noisy, "random"),
    "noise in a branch": (lambda h: lax.cond(h.sum() > 0, noisy, jnp.sin, h), "random"),
    "noise in jit": (lambda h: h + jax.jit(jax.random.normal, static_argnums=1)(key(), h.shape), "random"),
    "noise of all at once": (lambda h: h + jax.random.uniform(key(), (h.size,)).reshape(h.shape), "random"),
    "gamma": (lambda h: h + jax.random.gamma(key(), jnp.ones(h.shape)), "random"),
    "poisson": (lambda h: h + jax.random.poisson(key(), jnp.ones(h.shape)).astype(h.dtype), "random"),
    "bits of a generator": (
        lambda h: h + lax.rng_bit_generator(jnp.zeros(4, jnp.uint32), h.shape)[1].astype(h.dtype) / 2.0**32,
        "random",
    ),
    "counters": (
        lambda h: h + (threefry_2x32(raw(), jnp.arange(h.shape[1], dtype=jnp.uint32)) % 7).astype(h.dtype)[None],
        "constant",
    ),
    "random features": (lambda h: h @ jax.random.normal(key(), (h.shape[1], h.shape[1])), "random"),
    "one of random signs": (lambda h: h * jax.random.rademacher(raw(), h.shape[1:], h.dtype)[None], "random"),
    "choice": (lambda h: h + jax.random.categorical(key(), h, -1)[:, None].astype(h.dtype), "random"),
    "keys": (keyed, "random"),
    "keys by number of rbg": (
        lambda h: keyed_by_number(h, functools.partial(jax.random.key, 0, impl="unsafe_rbg")),
        "random",
    ),
    "scan over units": (lambda h: jax.lax.scan(lambda c, x: (c + x, c * x), h[:, 0] * 0, h.T)[1].T, "scan"),
    "associative scan": (lambda h: jax.lax.associative_scan(jnp.add, h, axis=1), "split"),
    "blocks that do not fit": (lambda h: (h.reshape(-1, 2, 3) + 1).reshape(-1, 3, 2).reshape(h.shape), "reshape"),
}


def hidden(middle):
    """Trace the network with `middle`, and find the structures that hold its hidden width."""

    def function(params, x):
        return middle(x @ params["up"] + params["bias"][None]) @ params["down"]

    params = {"up": floats(3, WIDTH), "bias": floats(WIDTH), "down": floats(WIDTH, 4)}
    traced = trace(function, params, floats(BATCH, 3))
    found = [s for s in traced.structures if ("up", 1) in {(member.path, member.axis) for member in s.members}]
    return function, params, traced, found


@pytest.mark.parametrize("name", PRUNABLE)
def test_the_hidden_width_is_prunable(name):
    function, shapes, traced, (structure,) = hidden(PRUNABLE[name])
    assert not traced.unknown
    assert structure.prunable, structure.pinned
    assert {(member.path, member.axis) for member in structure.members} == {("up", 1), ("bias", 0), ("down", 0)}
    assert retrace(function, traced, structure, shapes, floats(BATCH, 3)) == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", PRUNABLE)
def test_masked_is_cut_and_gates_of_one_change_nothing(name):
    """Control: the dense model has other outputs."""
    function, shapes, traced, (structure,) = hidden(PRUNABLE[name])
    random = np.random.default_rng(0)
    params = {path: drawn(*leaf.shape, seed=random) for path, leaf in shapes.items()}
    x, run = drawn(BATCH, 3, seed=random), jax.jit(gated(traced))
    dense, changed = function(params, x), 0.0
    np.testing.assert_allclose(run({structure.name: jnp.ones(structure.units)}, params, x), dense, rtol=1e-5, atol=1e-5)
    for removed in (0, structure.units - 1):
        masked = masked_as_cut(traced, {structure.name: np.arange(structure.units) != removed}, params, x, run=run)
        assert np.isfinite(masked).all()
        changed = max(changed, float(np.abs(masked - dense).max()))
    assert changed > 1e-3


@pytest.mark.parametrize("name", PINNED)
def test_the_hidden_width_is_pinned(name):
    middle, kind = PINNED[name]
    _, _, traced, found = hidden(middle)
    assert found
    assert not any(structure.prunable for structure in found)
    assert set(kind.split(" or ")) & {reason.kind for structure in found for reason in structure.pinned}
    assert bool(traced.unknown) == (kind == "unknown")


DROPPED = {
    "nothing": ({}, {"heads", "head width", "channels", "stream"}),
    "input": ({"input"}, {"heads", "head width", "channels", "stream"}),
    "weights": ({"weights"}, {"head width", "channels", "stream"}),
    "channels": ({"channels"}, {"heads", "head width", "stream"}),
    "stream": ({"stream"}, {"heads", "head width", "channels"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("dropped_at", DROPPED)
def test_dropout_pins_what_it_numbers_alone(dropped_at):
    """A transformer block with dropout that is on, at the places where libraries have it; masked is cut."""
    places, roles = DROPPED[dropped_at]

    def drop(place, x):
        return jnp.where(jax.random.bernoulli(key(), 0.7, x.shape), x / 0.7, 0) if place in places else x

    def function(p, x):
        h = drop("stream", jnp.einsum("bti,id->btd", drop("input", x), p["in"]))
        q, k, v = (jnp.einsum("btd,dhe->bthe", h, p[name]) for name in ("query", "key", "value"))
        weights = drop("weights", jax.nn.softmax(jnp.einsum("bthe,bshe->bhts", q, k)))
        h += drop("stream", jnp.einsum("bhts,bshe,hed->btd", weights, v, p["output"]))
        h += drop("stream", drop("channels", jax.nn.relu(h @ p["up"])) @ p["down"])
        return h @ p["head"]

    random = np.random.default_rng(0)
    shapes = {"in": (3, 6), "query": (6, 4, 2), "key": (6, 4, 2), "value": (6, 4, 2), "output": (4, 2, 6)}
    shapes |= {"up": (6, 8), "down": (8, 6), "head": (6, 2)}
    params, x = {name: drawn(*shape, seed=random) for name, shape in shapes.items()}, drawn(2, 5, 3, seed=random)
    traced = trace(function, params, x)
    assert {structure.role for structure in traced.prunable} == roles
    masked_as_cut(traced, {each.name: keep_of(each, random) for each in traced.prunable}, params, x)
    pinned = [reason for each in traced.structures for reason in each.pinned if reason.kind == "random"]
    assert bool(pinned) == bool(places)
    for reason in map(str, pinned):
        assert reason.startswith("is drawn at random (random_bits) at jit")
        assert "drop" in reason


def test_axes_that_go_together_everywhere_are_no_copies_of_each_other():
    def function(params, x):
        return jnp.einsum("bei,eio->bo", jax.nn.relu(jnp.einsum("bd,edi->bei", x, params["up"])), params["down"])

    traced = trace(function, {"up": floats(4, 3, 5), "down": floats(4, 5, 2)}, floats(BATCH, 3))
    assert [(s.units, s.copied) for s in traced.prunable] == [(4, ()), (5, ())]


@pytest.mark.parametrize(("equation", "copied"), [("ef,gf->eg", ()), ("ef,ef->e", (4,))])
def test_units_that_meet_those_of_another_copy_are_chosen_once(equation, copied):
    def function(params, x):
        h, codes = x @ params["up"], jnp.einsum(equation, params["codes"], params["codes"])
        return (h @ codes if codes.ndim == 2 else h * codes[None]) @ params["down"]

    params = {"codes": floats(4, 6), "up": floats(3, 4), "down": floats(4, 2)}
    traced = trace(function, params, floats(BATCH, 3))
    assert [(s.units, s.copied) for s in traced.prunable] == [(4, ()), (6, copied)]


SHIFTS = {
    "gather": lambda h: jnp.take(h, np.array([1, 2, 3, 0]), axis=1),
    "scatter": lambda h: jnp.zeros_like(h).at[:, np.array([1, 2, 3, 0])].set(h),
    "top_k": lambda h: jnp.swapaxes(lax.top_k(jnp.swapaxes(h, 1, 2), 4)[0], 1, 2),
    "pool": lambda h: lax.reduce_window(h, -jnp.inf, lax.max, (1, 3, 1), (1, 1, 1), "SAME"),
    "pad": lambda h: lax.pad(h, 0.0, ((0, 0, 0), (1, -1, 0), (0, 0, 0))),
    "constant": lambda h: jnp.einsum(
        "bef,eg->bgf", h, np.float32([[1, 2, 0, 0], [0, 1, 2, 0], [3, 0, 1, 0], [0, 0, 1, 1]])
    ),
    "loop": lambda h: lax.map(lambda one: (one[:, None] * h).sum(1), h.swapaxes(0, 1)).swapaxes(0, 1),
    "none": jnp.sin,
}


@pytest.mark.parametrize("name", SHIFTS)
def test_units_that_are_added_to_those_of_another_copy_are_chosen_once(name):
    """Experts whose activations are moved along the experts, and added to what was there; control: not moved."""

    def function(params, x):
        h = jnp.einsum("bd,edf->bef", x, params["up"]) * jnp.arange(1.0, 5.0)[None, :, None]
        return jnp.einsum("bef,efd->bd", h + SHIFTS[name](h), params["down"])

    random = np.random.default_rng(0)
    params = {"up": drawn(4, 3, 6, seed=random), "down": drawn(4, 6, 3, seed=random)}
    x = drawn(BATCH, 3, seed=random)
    traced = trace(function, params, x)
    (structure,) = traced.prunable
    assert structure.copied == ((4,) if name == "none" else ())
    masked_as_cut(traced, {structure.name: keep_of(structure, random)}, params, x)


def test_a_custom_derivative_without_units_is_the_smaller_programs_too():
    def function(params, x):
        return jnp.sum(passed(jnp.sin(x @ params["up"]) @ params["down"]) ** 2)

    random = np.random.default_rng(0)
    params = {"up": drawn(3, 6, seed=random), "down": drawn(6, 2, seed=random)}
    traced, x = trace(function, params, floats(BATCH, 3)), drawn(BATCH, 3, seed=random)
    keep = {traced.prunable[0].name: np.arange(6) > 1}
    less = keep_units(traced, keep, params)
    own, of_smaller = (jax.grad(each)(less, x) for each in (function, smaller(traced, keep)))
    np.testing.assert_allclose(of_smaller["up"], own["up"], rtol=1e-5)
    true = jax.grad(lambda p, x: jnp.sum((2 * (jnp.sin(x @ p["up"]) @ p["down"])) ** 2))(less, x)
    np.testing.assert_allclose(true["up"], 2 * own["up"], rtol=1e-5, err_msg="control: the derivative is a custom one")


def test_joined_widths_stay_apart():
    def function(params, x):
        return jnp.concatenate([x @ params["a"], x @ params["b"]], -1) @ params["down"]

    params = {"a": floats(3, 4), "b": floats(3, 6), "down": floats(10, 2)}
    traced = trace(function, params, floats(BATCH, 3))
    first, second = traced.prunable
    assert first.members[1].places == (Place(0, 1),)
    assert second.members[1].places == (Place(4, 1),)
    assert removed_shapes(traced, second.members) == {"a": (3, 4), "b": (3, 5), "down": (9, 2)}


def test_blocks_are_found_in_both_orders():
    axes = Axes()
    first, second = axes.atom(12), axes.atom(12)
    heads, width = axes.factor_at(first, 3) or (0, 0)
    outer = axes.factor_at(second, 6)
    assert outer is not None
    axes.equate(first, second, "")
    assert [axes.size(atom) for atom in axes.atoms(first)] == [3, 2, 2]
    assert axes.atoms(first) == axes.atoms(second)
    (place,) = axes.places(first, axes.find(heads))
    assert place == Place(0, 4)
    assert place.indices(1) == [4, 5, 6, 7]
    minor = axes.atoms(width)[1]
    assert axes.places(first, minor) == (Place(0, 1, ((6, 2),)),)
    assert not axes.pins


def test_blocks_that_do_not_fit_are_pinned():
    axes = Axes()
    first, second = axes.atom(6), axes.atom(6)
    axes.factor_at(first, 2)
    axes.factor_at(second, 3)
    axes.equate(first, second, "no")
    assert {pin.kind for pin in axes.pins} == {"reshape"}
    assert {pin.node for pin in axes.pins} == {first, second}
