"""Eight devices: loading, scores, chosen units and losses are those of one device, on every mesh."""

import jax
import numpy as np
import pytest

from saap_jax.estimation.accumulate import ACCUMULATORS
from saap_jax.estimation.observe import curvature_of, observe, score, union_of_needs
from saap_jax.estimation.registry import ESTIMATORS, make_estimator
from saap_jax.evaluation.candidates import candidate_losses
from saap_jax.evaluation.perplexity import window_losses
from saap_jax.llama import LayerWidths, LlamaSpec, load_model, random_llama, save_model
from saap_jax.options import SearchConfig
from saap_jax.options_mesh import MeshConfig
from saap_jax.pipeline import select_units
from saap_jax.sharding import layout_of, put

pytestmark = pytest.mark.sharded

MESHES = [
    MeshConfig(data=2),
    MeshConfig(fsdp=4),
    MeshConfig(tensor=2),
    MeshConfig(data=8),
    MeshConfig(fsdp=8),
    MeshConfig(data=2, fsdp=2, tensor=2),
    MeshConfig(fsdp=4, tensor=2),
    MeshConfig(tensor=4, data=2),
]


def devices(config: MeshConfig) -> list:
    return jax.devices()[: config.data * config.fsdp * config.tensor]


def mesh_name(config: MeshConfig) -> str:
    return f"{config.data}x{config.fsdp}x{config.tensor}"


@pytest.fixture(scope="module")
def model():
    widths = LayerWidths(kv_heads=4, q_per_kv=2, mlp=32)
    spec = LlamaSpec(vocab=64, embed=16, head_dim=4, layers=(widths,) * 3, tied=True)
    return random_llama(spec, jax.random.key(0))


@pytest.fixture(scope="module")
def batches():
    random = np.random.default_rng(0)
    tokens = random.integers(0, 64, (2, 8, 12)).astype(np.int32)
    mask = np.ones((2, 8, 12), bool)
    mask[1, 3, 7:] = False
    mask[1, 6:] = False  # padding rows at the end
    return [(tokens[i], mask[i]) for i in (0, 1)]


@pytest.fixture(scope="module")
def estimators():
    return {name: make_estimator(name) for name in ESTIMATORS}


def scores_of(model, batches, estimators):
    statistics = observe(
        model, batches, union_of_needs(estimators.values()), curvature=curvature_of(estimators.values())
    )
    return statistics, score(estimators, statistics, model)


@pytest.fixture(scope="module")
def alone(model, batches, estimators):
    return scores_of(model, batches, estimators)[1]


@pytest.mark.parametrize("config", MESHES, ids=mesh_name)
def test_scores_and_choices_do_not_depend_on_the_mesh(config, model, batches, estimators, alone):
    where = layout_of(config, devices(config))
    sharded = put(model, where)
    statistics, scores = scores_of(sharded, batches, estimators)
    for name, by_structure in scores.items():
        for structure, values in by_structure.items():
            scale = np.abs(alone[name][structure]).max()
            np.testing.assert_allclose(values, alone[name][structure], rtol=1e-5, atol=1e-6 * scale)
        search = SearchConfig(allocation="global")
        kept = [select_units(model, each, 0.3, search).keep for each in (by_structure, alone[name])]
        assert all(np.array_equal(kept[0][s], kept[1][s]) for s in kept[0]), name
    for statistic, tree in statistics.values.items():
        if ACCUMULATORS[statistic].init.__name__ == "_like_parameters":
            same = jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), tree, sharded)
            assert all(jax.tree.leaves(same)), statistic


def test_a_mesh_with_other_examples_gives_other_scores(model, batches, estimators, alone):
    config = MeshConfig(data=2, fsdp=2, tensor=2)
    changed = [(np.roll(batches[0][0], 1, axis=1), batches[0][1]), batches[1]]
    _, scores = scores_of(put(model, layout_of(config, devices(config))), changed, estimators)
    assert not np.allclose(scores["gate_fisher"]["mlp"], alone["gate_fisher"]["mlp"], rtol=1e-3)


@pytest.mark.parametrize("config", MESHES, ids=mesh_name)
def test_losses_do_not_depend_on_the_mesh(config, model, batches):
    sharded = put(model, layout_of(config, devices(config)))
    keep = {"attention": np.ones((3, 4), bool), "mlp": np.ones((3, 32), bool)}
    keep["attention"][1, 2] = keep["mlp"][0, 5:9] = False
    for ours, single in zip(
        [window_losses(sharded, batches), *next(candidate_losses(sharded, batches, [keep])).values()],
        [window_losses(model, batches), *next(candidate_losses(model, batches, [keep])).values()],
        strict=True,
    ):
        np.testing.assert_allclose(ours.sums, single.sums, rtol=1e-5)
        np.testing.assert_array_equal(ours.counts, single.counts)


@pytest.mark.parametrize("config", MESHES, ids=mesh_name)
def test_loading_onto_a_mesh_reads_the_same_parameters(config, model, tmp_path):
    path = save_model(model, tmp_path / "model")
    where = layout_of(config, devices(config))
    loaded = load_model(path, layout=where)
    for ours, theirs, wanted in zip(*map(jax.tree.leaves, (loaded, model, put(model, where))), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
        assert ours.sharding == wanted.sharding
