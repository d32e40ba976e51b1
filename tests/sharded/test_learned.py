"""Derivatives by gates on eight devices: those of one device, and the same units learnt."""

import jax
import numpy as np
import pytest

from saap_jax.config.mesh import MeshConfig
from saap_jax.config.method import LearnConfig, SearchConfig
from saap_jax.data import Windows
from saap_jax.llama import LayerWidths, LlamaSpec, load_model, random_llama, save_model
from saap_jax.runtime.mesh import layout_of
from saap_jax.selection.choose import choose, chosen_again
from saap_jax.subjects.llama import LlamaSubject

pytestmark = pytest.mark.sharded


@pytest.mark.parametrize("mesh", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(fsdp=8)])
def test_learned_units_do_not_depend_on_the_mesh(mesh, tmp_path):
    spec = LlamaSpec(
        vocab=32, embed=16, head_dim=4, layers=(LayerWidths(kv_heads=4, q_per_kv=1, mlp=16),) * 2, tied=True
    )
    alone = random_llama(spec, jax.random.key(0))
    layout = layout_of(mesh, jax.devices()[:8])
    spread = load_model(save_model(alone, tmp_path / "m"), layout=layout)
    assert len({leaf.sharding for leaf in jax.tree.leaves(spread)}) > 1
    random = np.random.default_rng(0)
    text = Windows(random.integers(0, 32, (32, 8)).astype(np.int32), np.ones((32, 8), bool))
    subjects = [LlamaSubject(alone), LlamaSubject(spread, layout=layout)]
    config = SearchConfig(allocation="global", learn=LearnConfig(steps=12, rate=0.4))
    scores = {name: random.random(units.shape) for name, units in subjects[0].existing.items()}
    start = choose(subjects[0], scores, 0.4, config)
    gradients = [each.objective(text, 8).gradient(start.keep, 1) for each in subjects]
    assert gradients[1][0] == pytest.approx(gradients[0][0], rel=1e-4)
    for name, expected in gradients[0][1].items():
        np.testing.assert_allclose(gradients[1][1][name], expected, rtol=2e-3, atol=2e-6)
        assert np.abs(expected[~start.keep[name]]).max() > 1e-3, "control"
    one, other = (chosen_again(each, start, {"text": text}, config) for each in subjects)
    np.testing.assert_allclose(other.divergences, one.divergences, rtol=1e-3)
    assert min(one.divergences) < one.divergences[0]
    for name, kept in one.keep.items():
        np.testing.assert_array_equal(other.keep[name], kept)
