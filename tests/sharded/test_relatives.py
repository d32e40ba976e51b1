"""Eight devices: LLaMA's relatives are loaded, scored and evaluated as on one device, biases and windows too."""

import dataclasses

import jax
import numpy as np
import pytest

from saap_jax.config.mesh import MeshConfig
from saap_jax.estimation.observe import observe, score, union_of_needs
from saap_jax.estimation.registry import make_estimator
from saap_jax.evaluation.perplexity import window_losses
from saap_jax.llama import LayerWidths, LlamaSpec, load_model, random_llama, save_model
from saap_jax.runtime.mesh import layout_of
from tests.helpers import RELATIVES

pytestmark = pytest.mark.sharded

MIXED = layout_of(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8]) if len(jax.devices()) >= 8 else None


@pytest.mark.parametrize("family", [each for each in RELATIVES if each != "mixtral"])  # see `test_experts`
def test_relatives_do_not_depend_on_the_mesh(family, tmp_path):
    channels = 8 if RELATIVES[family].traits.experts else None
    widths = LayerWidths(kv_heads=4, q_per_kv=1, mlp=16, channels=channels)
    spec = LlamaSpec(vocab=32, embed=16, head_dim=4, layers=(widths,) * 2, tied=True, constants=RELATIVES[family])
    alone = random_llama(spec, jax.random.key(0))
    directory = save_model(alone, tmp_path / "m")
    spread = load_model(directory, layout=MIXED)
    for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(spread), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    random = np.random.default_rng(0)
    batches = [(random.integers(0, 32, (8, 8)).astype(np.int32), np.ones((8, 8), bool))]
    estimators = {name: make_estimator(name) for name in ("taylor_element", "fisher", "gate_fisher", "wanda")}
    needs = union_of_needs(estimators.values())
    expected, found = (score(estimators, observe(m, batches, needs, remat="full"), m) for m in (alone, spread))
    for name, by_structure in expected.items():
        for structure, values in by_structure.items():
            scale = np.abs(values).max()
            np.testing.assert_allclose(found[name][structure], values, rtol=1e-5, atol=1e-6 * scale)
    losses = [window_losses(m, batches, None) for m in (alone, spread)]
    assert losses[0].perplexity == pytest.approx(losses[1].perplexity, rel=1e-5)
    if spec.constants.sliding_window is not None:
        wider = jax.tree.map(lambda leaf: leaf, alone)
        wider.constants = dataclasses.replace(spec.constants, sliding_window=None)
        assert window_losses(wider, batches, None).perplexity != pytest.approx(losses[1].perplexity, rel=1e-4)
