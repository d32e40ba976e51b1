"""Scales of units on eight devices: those of one device, and the same corrected weights."""

import jax
import numpy as np
import pytest

from saap_jax.config.mesh import MeshConfig
from saap_jax.config.method import CompensationConfig
from saap_jax.llama import LayerWidths, LlamaSpec, load_model, random_llama, save_model
from saap_jax.llama.segments import existing_units
from saap_jax.runtime.gather import fetched
from saap_jax.runtime.mesh import layout_of
from saap_jax.surgery.scales import scaled
from tests.helpers import random_keep

pytestmark = pytest.mark.sharded


@pytest.mark.parametrize("mesh", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(fsdp=8)])
def test_scales_do_not_depend_on_the_mesh(mesh, tmp_path):
    spec = LlamaSpec(
        vocab=32, embed=16, head_dim=4, layers=(LayerWidths(kv_heads=4, q_per_kv=1, mlp=16),) * 2, tied=True
    )
    alone = random_llama(spec, jax.random.key(0))
    spread = load_model(save_model(alone, tmp_path / "m"), layout=layout_of(mesh, jax.devices()[:8]))
    assert len({leaf.sharding for leaf in jax.tree.leaves(spread)}) > 1
    random = np.random.default_rng(0)
    batches = [(random.integers(0, 32, (8, 8)).astype(np.int32), np.ones((8, 8), bool)) for _ in range(4)]
    keep = random_keep(existing_units(alone.segments), 0.4)
    config = CompensationConfig(method="scales", steps=9, rate=0.02)
    (one, done), (other, found) = (scaled(model, model, keep, batches, config) for model in (alone, spread))
    np.testing.assert_allclose(found.divergences, done.divergences, rtol=1e-4)
    assert done.best > 0
    for name, values in done.scales.items():
        np.testing.assert_allclose(found.scales[name], values, rtol=0, atol=1e-3)
        assert np.abs(values - 1).max() > 0.02, "control"
    for expected, got in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(fetched(got), expected, rtol=0, atol=1e-3)
