"""Kernels, ragged products and programs over devices: rules, references that stand in, and what is said of the rest."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from saap_jax.trace.insert_gates import gated
from saap_jax.trace.problem import Problem
from saap_jax.trace.references import with_references
from saap_jax.trace.removal import keep_units
from saap_jax.trace.smaller import smaller
from saap_jax.trace.subject import Losses, cut, subject_of
from saap_jax.trace.trace import describe, trace
from tests.trace.subject.problems import cut_losses


def drawn(seed=0, **shapes):
    random = np.random.default_rng(seed)
    return {name: jnp.asarray(random.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def masked_and_cut(function, params, *inputs, removed=1):
    """Return the outputs of the masked and of the cut program, every structure without some units."""
    traced = trace(function, params, *inputs)
    keep = {s.name: np.broadcast_to(np.arange(s.units) != removed, (*s.copied, s.units)) for s in traced.prunable}
    gates = {name: jnp.asarray(kept, jnp.float32) for name, kept in keep.items()}
    masked = jax.jit(gated(traced))(gates, params, *inputs)
    return masked, jax.jit(smaller(traced, keep))(keep_units(traced, keep, params), *inputs), traced


def doubled_body(x, out):
    out[...] = x[...] * 2


@jax.jit
def doubled(x):
    return pallas.pallas_call(doubled_body, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(x)


@jax.custom_vjp
def with_derivative(x):
    return doubled(x)


with_derivative.defvjp(lambda x: (doubled(x), None), lambda _, g: (2 * g,))


def mlp(kernel, params, x):
    return jnp.einsum("bf,fn->bn", kernel(jnp.einsum("bi,if->bf", x, params["up"])), params["down"])


PARAMS = drawn(up=(3, 8), down=(8, 2))
X = drawn(1, x=(4, 3))["x"]


@pytest.mark.parametrize("name", ["doubled", "doubled_body", doubled, doubled_body, functools.partial(doubled)])
def test_a_reference_stands_in_for_a_kernel(name):
    function = with_references(functools.partial(mlp, doubled), {name: lambda x: 2 * x})
    masked, after, traced = masked_and_cut(function, PARAMS, X)
    assert [structure.units for structure in traced.prunable] == [8]
    np.testing.assert_allclose(masked, after, rtol=1e-5)
    assert not trace(functools.partial(mlp, doubled), PARAMS, X).prunable  # without it


@pytest.mark.parametrize("inside", ["custom derivative", "scan", "checkpoint"])
def test_a_kernel_is_found_inside_of_calls(inside):
    def kernel(x):
        if inside == "scan":
            return jax.lax.scan(lambda c, _: (doubled(c), None), x, length=2)[0]
        return (with_derivative if inside == "custom derivative" else jax.checkpoint(doubled))(x)

    function = with_references(functools.partial(mlp, kernel), {"doubled": lambda x: 2 * x})
    masked, after, traced = masked_and_cut(function, PARAMS, X)
    assert traced.prunable
    np.testing.assert_allclose(masked, after, rtol=1e-5)
    np.testing.assert_allclose(function(PARAMS, X), mlp(kernel, PARAMS, X), rtol=1e-5)


def test_a_function_with_a_custom_derivative_is_named_itself():
    function = with_references(functools.partial(mlp, with_derivative), {with_derivative: lambda x: 2 * x})
    assert trace(function, PARAMS, X).prunable


def test_other_calls_keep_their_derivatives():
    """Only what holds a kernel is taken apart: a custom derivative elsewhere stays."""

    @jax.custom_jvp
    def odd(x):
        return x

    odd.defjvp(lambda primals, tangents: (primals[0], 7 * tangents[0]))
    function = with_references(lambda p, x: mlp(doubled, p, odd(x)).sum(), {doubled: lambda x: 2 * x})
    plain = jax.grad(lambda x: mlp(lambda h: 2 * h, PARAMS, x).sum())(X)
    np.testing.assert_allclose(jax.grad(function, 1)(PARAMS, X), 7 * plain, rtol=1e-5)


def of_kernel(references):
    y = jnp.zeros((4, 2))
    return Problem(
        function=functools.partial(mlp, doubled),
        params=PARAMS,
        loss=lambda out, y: jnp.square(out - y).mean(),
        calibration=(X, y),
        held_out=(X, y),
        references=references,
    )


def test_a_problem_takes_references():
    subject = subject_of(of_kernel({doubled: lambda x: 2 * x}))
    keep = {subject.structures[0].name: np.arange(8)[None] > 2}
    masked = Losses(subject).of(
        {n: jnp.asarray(k, jnp.float32) for n, k in keep.items()}, PARAMS, (X, jnp.zeros((4, 2)))
    )
    np.testing.assert_allclose(cut_losses(subject, keep, cut(subject, keep)[1]), masked, rtol=1e-5)


def test_wrong_references_are_refused():
    def other(x):
        return x

    run = functools.partial(mlp, doubled)
    for references, message in (
        ({"tripled": other}, r"expected kernels that the function calls, .*doubled.*, got tripled; name a jitted"),
        ({other: other}, r"got other at .*test_kernels.py:\d+; name a jitted function, or put jax.jit around"),
        ({"doubled": lambda x: x.T}, r"doubled to return float32\[4, 8\] as the kernel does .* got float32\[8, 4\]"),
        ({"doubled": lambda x, y: x}, r"the reference of doubled failed on the kernel's arrays float32\[4, 8\]: TypeE"),
    ):
        with pytest.raises(ValueError, match=message):
            trace(with_references(run, references), PARAMS, X)
    problem = object.__new__(Problem)  # without the type checks of the tests in front
    for field, value in (vars(of_kernel({})) | {"references": {"doubled": 3}}).items():
        object.__setattr__(problem, field, value)
    with pytest.raises(ValueError, match="expected a function or a name for each kernel"):
        problem.__post_init__()


def test_what_is_pinned_by_a_kernel_names_it_and_its_line():
    traced = trace(functools.partial(mlp, doubled), PARAMS, X)
    text = describe(traced)
    assert "no rule for pallas_call doubled_body at " in text
    hidden = next(s for s in traced.structures if s.units == 8)
    reason = next(str(reason) for reason in hidden.pinned if reason.kind == "unknown")
    assert "pallas_call doubled_body) at " in reason
    assert "test_kernels.py:" in reason


# --- ragged products -----------------------------------------------------------------------------


def ragged(params, x, sizes):
    h = jax.lax.ragged_dot(jnp.einsum("bi,id->bd", x, params["in"]), params["up"], sizes)
    return jax.lax.ragged_dot(jax.nn.relu(h), params["down"], sizes)


def test_ragged_dot_couples_what_it_contracts():
    params = drawn(up=(3, 6, 5), down=(3, 5, 2), **{"in": (4, 6)})
    x, sizes = drawn(1, x=(7, 4))["x"], jnp.asarray([2, 0, 5], jnp.int32)
    masked, after, traced = masked_and_cut(ragged, params, x, sizes)
    assert not traced.unknown
    found = {frozenset((m.path, m.axis) for m in s.members): s for s in traced.structures}
    assert found[frozenset({("in", 1), ("up", 1)})].prunable
    assert found[frozenset({("up", 2), ("down", 1)})].copied == ()  # rows of all groups lie in one array
    groups = found[frozenset({("up", 0), ("down", 0)})]
    assert "rows are dealt out to its units by ragged_dot" in str(groups.pinned)
    np.testing.assert_allclose(masked, after, rtol=1e-4, atol=1e-5)
    assert np.abs(masked - ragged(params, x, sizes)).max() > 1e-2


# --- shard_map -----------------------------------------------------------------------------------


def parallel(devices, how):
    mesh = jax.make_mesh((devices,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])

    def body(x, up, down):
        h = jnp.einsum("bi,if->bf", x, up)
        if how == "gathered":
            h = jax.lax.all_gather(h, "x", axis=1, tiled=True)
            return jnp.einsum("bf,fn->bn", jnp.tanh(h), down)
        out = jnp.einsum("bf,fn->bn", jnp.tanh(h), down)
        if how == "scattered":
            return jax.lax.psum_scatter(out, "x", scatter_dimension=1, tiled=True)
        return jax.lax.psum(out, "x")

    run = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(P(), P(None, "x"), P() if how == "gathered" else P("x")),
        out_specs=P(None, "x") if how == "scattered" else P(),
        check_vma=how == "summed",
    )

    def function(params, x):
        h = jnp.tanh(jnp.einsum("bi,id->bd", x, params["in"]))
        return jnp.einsum("bn,nk->bk", jnp.tanh(run(h, params["up"], params["down"])), params["out"])

    return function


SHARDED = drawn(up=(5, 8), down=(8, 4), out=(4, 2), **{"in": (3, 5)})
HOW = ["summed", "gathered", "scattered"]


def check_shard_map(devices, how):
    function = parallel(devices, how)
    masked, after, traced = masked_and_cut(function, SHARDED, X)
    assert not traced.unknown
    units = {s.name: s.units for s in traced.prunable}
    assert units["up[0]" if "up[0]" in units else "in[1]"] == 5
    assert 8 // devices in units.values()
    assert len(units) == 3
    np.testing.assert_allclose(masked, after, rtol=1e-4, atol=1e-5)
    assert np.abs(masked - function(SHARDED, X)).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_shard_map_on_one_device(how):
    check_shard_map(1, how)


@pytest.mark.sharded
@pytest.mark.parametrize("how", HOW)
def test_shard_map_on_two_devices_takes_a_unit_of_each(how):
    check_shard_map(2, how)
