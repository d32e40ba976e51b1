"""What is trained on gates, on eight devices: scales and learned units are those of one device."""

import jax
import numpy as np
import pytest

from saap_jax.config.mesh import MeshConfig
from saap_jax.data.windows import Windows
from saap_jax.llama.files.load import load_model
from saap_jax.llama.files.write import save_model
from saap_jax.llama.model import random_llama
from saap_jax.llama.segments import masks
from saap_jax.llama.spec import LayerWidths, LlamaSpec
from saap_jax.runtime.gather import fetched
from saap_jax.runtime.mesh import layout_of
from saap_jax.steps.chain import parse
from saap_jax.steps.run import Runner
from saap_jax.subjects.llama import LlamaSubject

pytestmark = pytest.mark.sharded


@pytest.fixture(params=[MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(fsdp=8)], ids=["mixed", "fsdp"])
def subjects(request, tmp_path) -> list[LlamaSubject]:
    """The same model on one device and on eight."""
    spec = LlamaSpec(
        vocab=32, embed=16, head_dim=4, layers=(LayerWidths(kv_heads=4, q_per_kv=1, mlp=16),) * 2, tied=True
    )
    alone, layout = random_llama(spec, jax.random.key(0)), layout_of(request.param, jax.devices()[:8])
    spread = load_model(save_model(alone, tmp_path / "m"), layout=layout)
    assert len({leaf.sharding for leaf in jax.tree.leaves(spread)}) > 1
    return [LlamaSubject(alone), LlamaSubject(spread, layout=layout)]


def test_scales_do_not_depend_on_the_mesh(subjects):
    rows = np.random.default_rng(0).integers(0, 32, (8, 8)).astype(np.int32)
    text = Windows(np.tile(rows, (4, 1)), np.ones((32, 8), bool))  # what is learnt holds on what is held out
    chain = parse("random > global > scales(9, rate=0.02)")
    one, other = (Runner(each, {"text": text}, [chain]).run(chain, 0.4) for each in subjects)
    np.testing.assert_allclose(other.metrics["scaled"], one.metrics["scaled"], rtol=1e-4)
    assert min(one.metrics["scaled"]) < one.metrics["scaled"][0], "control"
    for expected, got in zip(jax.tree.leaves(one.subject.model), jax.tree.leaves(other.subject.model), strict=True):
        np.testing.assert_allclose(fetched(got), expected, rtol=0, atol=1e-3)


def test_what_is_best_does_not_depend_on_the_mesh(subjects):
    text = Windows(np.random.default_rng(0).integers(0, 32, (32, 8)).astype(np.int32), np.ones((32, 8), bool))
    chain = parse("best_of(magnitude > global, magnitude > uniform > least_squares, magnitude > uniform)")
    one, other = (Runner(each, {"text": text}, [chain]).run(chain, 0.4) for each in subjects)
    np.testing.assert_allclose(other.metrics["judged"], one.metrics["judged"], rtol=1e-3)
    assert other.metrics["chosen"] == one.metrics["chosen"]
    assert len(set(one.metrics["judged"])) == 3, "control"
    for name, kept in one.keep.items():
        np.testing.assert_array_equal(other.keep[name], kept)


def test_what_is_written_does_not_depend_on_the_mesh(subjects):
    text = Windows(np.random.default_rng(0).integers(0, 32, (5, 8)).astype(np.int32), np.ones((5, 8), bool))
    one, other = (each.continued(text, 12, 3, temperature=4.0, seed=0).tokens for each in subjects)
    np.testing.assert_array_equal(other, one)
    assert len({*map(bytes, one)}) == 12, "control"


def test_learned_units_do_not_depend_on_the_mesh(subjects):
    random = np.random.default_rng(0)
    text = Windows(random.integers(0, 32, (32, 8)).astype(np.int32), np.ones((32, 8), bool))
    start, learnt = parse("random > global"), parse("random > global > learn(steps=12, rate=0.4)")
    runners = [Runner(each, {"text": text}, [start, learnt]) for each in subjects]
    keep = runners[0].choose(start, 0.4).keep
    gradients = [each.objective(text, 8, each).gradient(masks(keep), 1) for each in subjects]
    assert gradients[1][0] == pytest.approx(gradients[0][0], rel=1e-4)
    for name, expected in gradients[0][1].items():
        np.testing.assert_allclose(gradients[1][1][name], expected, rtol=2e-3, atol=2e-6)
        assert np.abs(expected[~keep[name]]).max() > 1e-3, "control"
    one, other = (each.choose(learnt, 0.4) for each in runners)
    np.testing.assert_allclose(other.metrics["divergences"], one.metrics["divergences"], rtol=1e-3)
    assert min(one.metrics["divergences"]) < one.metrics["divergences"][0]
    for name, kept in one.keep.items():
        np.testing.assert_array_equal(other.keep[name], kept)
