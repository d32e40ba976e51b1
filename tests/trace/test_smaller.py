"""The cut program: equations whose operands are numbers, and other input shapes than the traced ones."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from saap_jax.trace.cut import keep_units, smaller
from saap_jax.trace.interpret import gated
from saap_jax.trace.trace import trace

FILLED = {
    "jnp.full": lambda h: jnp.full(h.shape, 2.0) + h,
    "lax.full": lambda h: lax.full(h.shape, 2.0) * h,
    "lax.broadcast": lambda h: jnp.maximum(h, lax.broadcast(0.1, h.shape)),
    "lax.full_like": lambda h: lax.select(h > 0, h, lax.full_like(h, 0.5)),
    "lax.expand_dims": lambda h: h * lax.expand_dims(2.0, (0, 1)),
    "lax.reshape": lambda h: h + lax.reshape(2.0, (1, 1)),
    "integers": lambda h: h + jnp.full(h.shape, 3, jnp.int32).astype(h.dtype),
    "half": lambda h: h + jnp.full(h.shape, 3, jnp.bfloat16).astype(h.dtype),
    "where": lambda h: jnp.where(h > 0, h, -0.25),
    "slice of a number": lambda h: h + lax.slice(2.0, (), ())[None, None],
    "dynamic_slice of a number": lambda h: h + lax.dynamic_slice(jnp.float32(2.0), (), ())[None, None],
    "in a loop": lambda h: lax.fori_loop(0, 2, lambda i, c: c + jnp.full(c.shape, 1.5), h),
    "pad": lambda h: lax.pad(h, 0.5, ((0, 0, 0), (0, 0, 0))),
    "clamp": lambda h: lax.clamp(-0.5, h, 0.5),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FILLED)
def test_numbers_may_be_filled_into_the_shape_of_units(name):
    """The cut once asked a Python number for its shape."""

    def function(params, x):
        h = FILLED[name](jnp.einsum("bi,id->bd", x, params["in"]))
        return jnp.einsum("bd,dn->bn", h, params["out"])

    random = np.random.default_rng(0)
    params = {n: jnp.asarray(random.normal(size=s), jnp.float32) for n, s in (("in", (3, 6)), ("out", (6, 2)))}
    x = jnp.asarray(random.normal(size=(5, 3)), jnp.float32)
    traced = trace(function, params, x)
    (structure,) = traced.prunable
    keep = {structure.name: np.arange(6) % 3 > 0}
    masked = gated(traced)({structure.name: jnp.asarray(keep[structure.name], jnp.float32)}, params, x)
    after = smaller(traced, keep)(keep_units(traced, keep, params), x)
    np.testing.assert_allclose(after, masked, rtol=1e-5, atol=1e-6)
    assert np.abs(masked - function(params, x)).max() > 1e-2
