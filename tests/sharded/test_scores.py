"""Eight devices: loading, scores, chosen units and losses are those of one device, on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.api import select_units
from saap_jax.config.mesh import MeshConfig
from saap_jax.estimation.base import Plan
from saap_jax.estimation.gates import GATE_GRADIENT
from saap_jax.estimation.hessian import GATE_HESSIAN, curvature_of
from saap_jax.estimation.observe import observe, observe_step, score, union_of_needs
from saap_jax.estimation.registry import ESTIMATORS, make_estimator
from saap_jax.estimation.storage import load_statistics, save_statistics
from saap_jax.estimation.taylor import WEIGHT_GRADIENT
from saap_jax.evaluation.perplexity import candidate_losses, window_losses
from saap_jax.llama.files.load import load_model
from saap_jax.llama.files.write import save_model
from saap_jax.llama.model import random_llama
from saap_jax.llama.product import is_matrix
from saap_jax.llama.segments import ones_gates
from saap_jax.llama.spec import LayerWidths, LlamaSpec
from saap_jax.runtime.constraints import on_mesh_of
from saap_jax.runtime.mesh import laid_out, layout_of, mesh_of, settled, shard
from saap_jax.structures.discovery import parameters_by_path
from saap_jax.surgery.cut import cut
from saap_jax.types import Remat

pytestmark = pytest.mark.sharded

MIXED = MeshConfig(data=2, fsdp=2, tensor=2)
MESHES = [MeshConfig(data=4), MeshConfig(fsdp=8), MeshConfig(tensor=4, data=2), MIXED]
REMAT: dict[MeshConfig, Remat] = dict(zip(MESHES, ("none", "full", "dots", "full"), strict=True))
"""What the sharded backward pass recomputes; that of one device recomputes all but matrix products."""


def devices(config: MeshConfig) -> list:
    return jax.devices()[: config.data * config.fsdp * config.tensor]


def mesh_name(config: MeshConfig) -> str:
    return f"{config.data}x{config.fsdp}x{config.tensor}"


@pytest.fixture(scope="module")
def model():
    widths = LayerWidths(kv_heads=4, q_per_kv=1, mlp=16)
    spec = LlamaSpec(vocab=32, embed=16, head_dim=4, layers=(widths,) * 2, tied=True)
    return random_llama(spec, jax.random.key(0))


@pytest.fixture(scope="module")
def batches():
    random = np.random.default_rng(0)
    tokens = random.integers(0, 32, (2, 8, 8)).astype(np.int32)
    mask = np.ones((2, 8, 8), bool)
    mask[1, 3, 5:] = False
    mask[1, 6:] = False  # padding rows at the end
    return [(tokens[i], mask[i]) for i in (0, 1)]


@pytest.fixture(scope="module")
def estimators():
    return {name: make_estimator(name) for name in ESTIMATORS}


def scores_of(model, batches, estimators, remat: Remat = "dots"):
    needs, curvature = union_of_needs(estimators.values()), curvature_of(estimators.values())
    statistics = observe(model, batches, needs, curvature=curvature, remat=remat)
    return statistics, score(estimators, statistics, model)


@pytest.fixture(scope="module")
def alone(model, batches, estimators):
    return scores_of(model, batches, estimators)[1]


@pytest.mark.parametrize("config", MESHES, ids=mesh_name)
def test_scores_and_choices_do_not_depend_on_the_mesh(config, model, batches, estimators, alone):
    """Second derivatives, whose programs take longest to compile, on the mixed mesh alone."""
    if config != MIXED:
        estimators = {name: made for name, made in estimators.items() if GATE_HESSIAN not in made.needs}
    sharded = laid_out(model, layout_of(config, devices(config)))
    statistics, scores = scores_of(sharded, batches, estimators, REMAT[config])
    for name, by_structure in scores.items():
        for structure, values in by_structure.items():
            scale = np.abs(alone[name][structure]).max()
            np.testing.assert_allclose(values, alone[name][structure], rtol=1e-5, atol=1e-6 * scale)
        kept = [select_units(model, each, 0.3, "global").keep for each in (by_structure, alone[name])]
        assert all(np.array_equal(kept[0][s], kept[1][s]) for s in kept[0]), name
    for statistic, tree in statistics.values.items():
        if statistic is WEIGHT_GRADIENT:
            held, like = parameters_by_path(tree), parameters_by_path(sharded)
            matrices = [path for path, parameter in like.items() if is_matrix(parameter)]
            assert len(matrices) == 7 * len(sharded.segments)
            for path in matrices:
                place = held[path][...].sharding
                assert place.is_equivalent_to(like[path][...].sharding, held[path].ndim), (statistic, path)


def test_a_device_works_on_its_own_examples_only(model, batches):
    """Also where every device holds all of them: the model says which are its own."""
    needs, flops = frozenset({GATE_GRADIENT}), []
    for config in (None, MESHES[0]):
        own = model if config is None else laid_out(model, layout_of(config, devices(config)))
        state, losses, gates = settled(
            ({need: need.init(own, Plan(8)) for need in needs}, jnp.zeros(8), ones_gates(own.segments)), mesh_of(own)
        )
        batch = (*(shard(each, own) for each in batches[0]), jnp.asarray(0, jnp.int32))
        with on_mesh_of(own):
            step = observe_step.lower(own, state, losses, batch, gates, remat="none").compile()
        flops.append(step.cost_analysis()["flops"])
    assert 0.24 < flops[1] / flops[0] < 0.3


def test_a_mesh_with_other_examples_gives_other_scores(model, batches, estimators, alone):
    changed = [(np.roll(batches[0][0], 1, axis=1), batches[0][1]), batches[1]]
    some = {"gate_fisher": estimators["gate_fisher"]}
    _, scores = scores_of(laid_out(model, layout_of(MIXED, devices(MIXED))), changed, some)
    assert not np.allclose(scores["gate_fisher"]["mlp"], alone["gate_fisher"]["mlp"], rtol=1e-3)


def test_narrow_parameters_have_wide_statistics(model, batches, estimators):
    """Rounded differently where sums are split, and still the scores of one device to the precision of bfloat16."""
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    some = {"fisher": estimators["fisher"]}
    statistics, scores = scores_of(laid_out(narrow, layout_of(MIXED, devices(MIXED))), batches, some, "full")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(statistics.values)} == {"float32"}
    for name, wanted in scores_of(narrow, batches, some)[1].items():
        for structure, values in wanted.items():
            np.testing.assert_allclose(scores[name][structure], values, rtol=0.1, atol=0.02 * values.max())


def test_statistics_are_saved_and_read_where_they_lie(model, batches, estimators, tmp_path):
    some = {name: estimators[name] for name in ("fisher", "wanda")}
    sharded = laid_out(model, layout_of(MIXED, devices(MIXED)))
    statistics, scores = scores_of(sharded, batches, some)
    read = load_statistics(save_statistics(tmp_path / "s", statistics), sharded)
    for ours, theirs in zip(*map(jax.tree.leaves, (read, statistics)), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
        assert ours.ndim < 2 or ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim) or ours.size < 100
    again = score(some, read, sharded)
    assert all(np.array_equal(again[n][s], scores[n][s]) for n in scores for s in scores[n])


@pytest.mark.parametrize("config", [MESHES[1], MIXED], ids=mesh_name)
def test_a_sharded_model_is_cut_and_saved_as_a_whole_one(config, model, tmp_path):
    """Widths that the mesh does not divide any more are held whole; what is saved is what one device saves."""
    keep = {"attention": np.ones((2, 4), bool), "mlp": np.ones((2, 16), bool)}
    keep["attention"][0, 1] = keep["mlp"][1, :3] = False
    sharded = cut(laid_out(model, layout_of(config, devices(config))), keep)
    whole = cut(model, keep)
    assert sharded.spec == whole.spec
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(sharded))
    paths = [save_model(each, tmp_path / name) for name, each in (("sharded", sharded), ("whole", whole))]
    contents = [(path / "model.safetensors").read_bytes() for path in paths]
    assert contents[0] == contents[1]
    loaded = load_model(paths[0], layout=layout_of(config, devices(config)).lenient())
    for ours, theirs in zip(*map(jax.tree.leaves, (loaded, sharded)), strict=True):
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)


@pytest.mark.parametrize("config", MESHES, ids=mesh_name)
def test_what_is_loaded_onto_a_mesh_has_the_same_parameters_and_losses(config, model, batches, tmp_path):
    where = layout_of(config, devices(config))
    loaded = load_model(save_model(model, tmp_path / "model"), layout=where)
    for ours, theirs, wanted in zip(*map(jax.tree.leaves, (loaded, model, laid_out(model, where))), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
        assert ours.sharding == wanted.sharding
    keep = {"attention": np.ones((2, 4), bool), "mlp": np.ones((2, 16), bool)}
    keep["attention"][1, 2] = keep["mlp"][0, 5:9] = False
    ours, single = (
        [window_losses(each, batches), *next(candidate_losses(each, batches, [keep])).values()]
        for each in (loaded, model)
    )
    for one, other in zip(ours, single, strict=True):
        np.testing.assert_allclose(one.sums, other.sums, rtol=1e-5)
        np.testing.assert_array_equal(one.counts, other.counts)


@pytest.mark.parametrize("config", [MESHES[1], MIXED], ids=mesh_name)
def test_layers_without_heads_or_channels_load_and_evaluate(config, batches, tmp_path):
    layers = tuple(LayerWidths(kv_heads=heads, q_per_kv=1, mlp=mlp) for heads, mlp in ((4, 16), (0, 16), (4, 0)))
    model = random_llama(LlamaSpec(vocab=32, embed=16, head_dim=4, layers=layers, tied=True), jax.random.key(0))
    loaded = load_model(save_model(model, tmp_path / "model"), layout=layout_of(config, devices(config)))
    ours, single = window_losses(loaded, batches), window_losses(model, batches)
    np.testing.assert_allclose(ours.sums, single.sums, rtol=1e-5)
