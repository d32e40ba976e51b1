"""Eight devices: attention in blocks, each device its own rows and heads, is that of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from saap_jax.config.mesh import MeshConfig
from saap_jax.llama.attention import Seen, in_blocks, plain
from saap_jax.runtime.mesh import layout_of

pytestmark = pytest.mark.sharded

LENGTH = 24


@pytest.mark.parametrize("kv_heads", [2, 3])  # three heads are whole on every device
def test_rows_and_heads_of_devices_are_those_of_one(kv_heads):
    random, heads = np.random.default_rng(0), (kv_heads, 2)
    shapes = ((4, LENGTH, *heads, 4), (4, LENGTH, kv_heads, 4), (4, LENGTH, kv_heads, 4), (4, LENGTH, *heads, 4))
    *arrays, cotangent = (jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in shapes)
    segments = jnp.asarray(np.sort(random.integers(1, 4, (4, LENGTH)), axis=1))

    def run(path, segments, *arrays):
        found, pull = jax.vjp(lambda *each: path(*each, Seen(LENGTH, 9, segments=segments), 0.5), *arrays)
        return found, *pull(cotangent)

    expected = jax.jit(functools.partial(run, plain))(segments, *arrays)
    mesh = layout_of(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()).mesh
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    with jax.set_mesh(mesh):
        placed = [jax.device_put(each, rows) for each in (segments, *arrays)]
        found = jax.jit(functools.partial(run, functools.partial(in_blocks, size=8)))(*placed)
    for each, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(each, other, rtol=0, atol=2e-5)
        assert np.abs(np.asarray(each) - np.asarray(other)[::-1]).max() > 0.1, "control"
