"""Programs that a search over random ones found: what was wrong there once, held fixed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.structures.weights import TracedWeights
from saap_jax.trace.cut import keep_units, smaller
from saap_jax.trace.interpret import all_ones, gated
from saap_jax.trace.own_code import retrace
from saap_jax.trace.trace import trace


def softmax_of_softmax(params, x):
    h = jnp.einsum("bi,id->bd", x, params["in"])
    p = jax.nn.softmax(jax.nn.softmax(jax.nn.softmax(h, -1), -1), -1)
    return jnp.einsum("bd,dn->bn", p, params["out"])


def over_units(operation):
    def function(params, x):
        h = jnp.einsum("bi,id->bd", x, params["in"])
        return jnp.einsum("bd,dn->bn", h, params["out"]) + operation(h)[:, None]

    return function


OPERATIONS = {
    "max": lambda h: h.max(-1),
    "min": lambda h: h.min(-1),
    "prod": lambda h: h.prod(-1),
    "any": lambda h: (h > 1).any(-1).astype(h.dtype),
    "all": lambda h: (h > -1).all(-1).astype(h.dtype),
    "largest integer": lambda h: jnp.round(10 * h).astype(jnp.int32).max(-1).astype(h.dtype),
}


def both(function, removed, scale=1.0):
    """Return the outputs of the dense, the masked and the cut program, with one hidden unit removed."""
    random = np.random.default_rng(0)
    params = {"in": random.normal(size=(3, 4)), "out": random.normal(size=(4, 2))}
    params = {name: jnp.asarray(value * scale, jnp.float32) for name, value in params.items()}
    x = jnp.asarray(random.normal(size=(6, 3)), jnp.float32)
    traced = trace(function, params, x)
    (structure,) = traced.prunable
    keep = {structure.name: np.arange(4) != removed}
    masked = gated(traced)({structure.name: jnp.asarray(keep[structure.name], jnp.float32)}, params, x)
    return function(params, x), masked, smaller(traced, keep)(keep_units(traced, keep, params), x)


@pytest.mark.slow
@pytest.mark.parametrize("removed", range(4))
def test_a_masked_unit_has_no_part_in_the_maximum_that_a_softmax_subtracts(removed):
    """It once had: behind a first softmax it can be far above the others, so that all of them underflowed: 0 / 0."""
    dense, masked, after = both(softmax_of_softmax, removed, scale=12.0)
    assert np.isfinite(dense).all()
    assert np.isfinite(after).all()
    np.testing.assert_allclose(masked, after, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_masked_unit_has_no_part_in_a_statistic(name):
    changed = False
    for removed in range(4):
        dense, masked, after = both(over_units(OPERATIONS[name]), removed)
        np.testing.assert_allclose(masked, after, rtol=1e-5, atol=1e-5)
        linear_dense, linear_after, _ = both(over_units(lambda h: (0 * h).sum(-1)), removed)
        changed |= bool(np.abs((dense - masked) - (linear_dense - linear_after)).max() > 1e-4)
    assert changed  # so the statistic itself is another without some unit


@pytest.mark.slow
def test_gates_of_one_change_no_gradient():
    function = over_units(OPERATIONS["max"])
    params = {"in": jnp.ones((3, 4)) * jnp.arange(4.0)[None], "out": jnp.ones((4, 2))}
    x = jnp.arange(6.0).reshape(2, 3)
    traced = trace(function, params, x)
    ones = all_ones(traced.prunable)
    gradients = [jax.grad(lambda p, f=f: f(p).sum())(params) for f in (
        lambda p: function(p, x), lambda p: gated(traced)(ones, p, x))]  # fmt: skip
    jax.tree.map(np.testing.assert_allclose, *gradients)


def test_an_empty_array_can_be_reshaped():
    """It once had no rule, and pinned the batch and all else that it held."""

    def function(params, x):
        h = jnp.einsum("bi,id->bd", x, params["in"])
        z = jnp.einsum("bi,ien->ben", x, params["empty"])[..., 2:]
        return jnp.einsum("bd,dn->bn", h, params["out"]) + z.reshape(z.shape[0], -1).sum(-1)[:, None]

    params = {"in": jnp.ones((3, 4)), "empty": jnp.ones((3, 5, 2)), "out": jnp.ones((4, 2))}
    traced = trace(function, params, jnp.ones((6, 3)))
    assert not traced.unknown
    pinned = {each.name: each.pinned for each in traced.structures}
    assert not pinned["in[1]"]
    assert any("an empty array" in str(reason) for reason in pinned["empty[1]"])
    for structure in traced.prunable:
        assert retrace(function, traced, structure, params, jnp.ones((6, 3))) == ""


def square_of_units(params, x):
    """The hidden axis is the square of a structure: both axes of a matrix that it is reshaped like."""
    h = jnp.einsum("bi,id->bd", x, params["in"])
    y = h.reshape(-1, *params["mix"].shape) + params["mix"][None]
    z = jnp.einsum("bij,jk->bik", y, params["mix"])
    return jnp.einsum("bd,d->b", h, params["head"])[:, None] + jnp.einsum("bik,ik->b", z, params["last"])[:, None]


@pytest.mark.slow
@pytest.mark.parametrize("removed", range(3))
def test_an_axis_that_is_the_square_of_a_structure_loses_rows_and_columns(removed):
    """It once lost the columns alone when masked, for the second place of a unit overwrote the first."""
    random = np.random.default_rng(0)
    shapes = {"in": (4, 9), "mix": (3, 3), "head": (9,), "last": (3, 3)}
    params = {name: jnp.asarray(random.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    x = jnp.asarray(random.normal(size=(5, 4)), jnp.float32)
    traced = trace(square_of_units, params, x)
    (structure,) = traced.prunable
    assert structure.units == 3
    keep = {structure.name: np.arange(3) != removed}
    less = keep_units(traced, keep, params)
    assert less["head"].shape == (4,)
    masked = gated(traced)({structure.name: jnp.asarray(keep[structure.name], jnp.float32)}, params, x)
    np.testing.assert_allclose(masked, smaller(traced, keep)(less, x), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(masked, square_of_units(less, x), rtol=1e-4, atol=1e-5)
    weights = TracedWeights.of((structure,), params)
    (head,) = [weights.view(structure, member) for member in structure.members if member.path == "head"]
    rows = [set(range(3 * u, 3 * u + 3)) | {u, u + 3, u + 6} for u in range(3)]  # each weight once
    for unit, row in enumerate(rows):
        np.testing.assert_allclose(np.sort(head[0, unit]), np.sort(params["head"][np.array(sorted(row))]))
