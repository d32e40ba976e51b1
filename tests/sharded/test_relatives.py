"""Eight devices: LLaMA's relatives are loaded, scored and evaluated as on one device, biases, windows, experts too."""

import dataclasses

import jax
import numpy as np
import pytest

from saap_jax.config.mesh import MeshConfig
from saap_jax.estimation.observe import observe, score, union_of_needs
from saap_jax.estimation.registry import make_estimators
from saap_jax.evaluation.perplexity import window_losses
from saap_jax.llama.files.load import load_model
from saap_jax.llama.files.write import save_model
from saap_jax.llama.model import random_llama
from saap_jax.llama.spec import LayerWidths, LlamaSpec
from saap_jax.runtime.mesh import layout_of
from tests.helpers import RELATIVES, changed, random_model

pytestmark = pytest.mark.sharded

MIXED = MeshConfig(data=2, fsdp=2, tensor=2)
EXPERTS = {"qwen3_moe": MeshConfig(fsdp=2, expert=4), "mixtral": MeshConfig(fsdp=2, tensor=2, expert=2)}
"""Meshes with an axis for experts."""
CASES = [(each, MIXED) for each in RELATIVES if each != "mixtral"] + list(EXPERTS.items())


@pytest.mark.parametrize(("family", "config"), CASES)
def test_relatives_do_not_depend_on_the_mesh(family, config, tmp_path):
    experts = RELATIVES[family].traits.experts
    widths = LayerWidths(kv_heads=4, q_per_kv=1, mlp=16, channels=8 if experts else None)
    spec = LlamaSpec(vocab=32, embed=16, head_dim=4, layers=(widths,) * 2, tied=True, constants=RELATIVES[family])
    alone = random_llama(spec, jax.random.key(0)) if config == MIXED else random_model(spec)
    spread = load_model(save_model(alone, tmp_path / "m"), layout=layout_of(config, jax.devices()[:8]))
    for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(spread), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    batches = [(np.random.default_rng(0).integers(0, 32, (8, 8)).astype(np.int32), np.ones((8, 8), bool))]
    estimators = make_estimators(["taylor_element", "fisher", "gate_fisher", "wanda", *(["reap"] if experts else [])])
    needs = union_of_needs(estimators.values())
    changed_unit = changed(alone, "segments/0/mlp/down", lambda down: down.at[0, 5].multiply(1.5))
    expected, found, control = (
        score(estimators, observe(each, batches, needs, remat="full"), each) for each in (alone, spread, changed_unit)
    )
    near = 1e-5 if config == MIXED else 1e-4
    for name, by_structure in expected.items():
        for structure, values in by_structure.items():
            scale = 0.1 * near * np.abs(values).max()
            np.testing.assert_allclose(found[name][structure], values, rtol=near, atol=scale, err_msg=name)
        assert not np.allclose(control[name]["mlp"], by_structure["mlp"], rtol=1e-3), "control: another unit"
    losses = [window_losses(each, batches, None).perplexity for each in (alone, spread)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    if spec.constants.sliding_window is not None:
        wider = jax.tree.map(lambda leaf: leaf, alone)
        wider.constants = dataclasses.replace(spec.constants, sliding_window=None)
        assert window_losses(wider, batches, None).perplexity != pytest.approx(losses[1], rel=1e-4)
