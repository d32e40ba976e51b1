"""Programs compiled for TPUs that are not there; needs libtpu (`make tpu-plan`)."""

from typing import Any

import jax
import pytest

from saap_jax.config.mesh import MESH_AXES, MeshConfig
from saap_jax.config.use import PlanConfig
from saap_jax.llama.spec import LayerWidths, LlamaSpec
from saap_jax.planning.chips import CHIPS, GIB, target_of, targets
from saap_jax.planning.estimate import estimate
from saap_jax.planning.models import spec_of
from saap_jax.planning.plan import _devices, plan_one, search
from saap_jax.runtime.mesh import layout_of
from saap_jax.types import AttentionPath

pytestmark = pytest.mark.tpuplan

WIDTHS = LayerWidths(kv_heads=4, q_per_kv=2, mlp=2048)
SMALL = LlamaSpec(vocab=4096, embed=1024, head_dim=128, layers=(WIDTHS,) * 6, tied=False)
MATRIX = 1024 * 2048 * 2
"""Bytes of the largest matrix of a layer in bfloat16."""


def plan(target="v5e:2x2", **fields):
    config = PlanConfig(**({"mesh": MeshConfig(fsdp=-1), "length": 256, "examples": 16} | fields))
    return plan_one(config, SMALL, target_of(target), None, config.batch, config.remat)


def target_devices(topology: str) -> Any:
    return _devices(target_of(topology))


@pytest.mark.parametrize("sizes", [(1, 16, 2), (2, 2, 8), (1, 4, 8)])
@pytest.mark.parametrize("topology", ["v6e:4x8", "v5e:4x8", "v5p:2x4x4"])
def test_a_mesh_may_lie_along_part_of_an_axis_of_the_torus(topology, sizes):
    devices = target_devices(topology)
    mesh = layout_of(MeshConfig(**dict(zip(MESH_AXES, sizes, strict=True))), devices).mesh
    assert tuple(mesh.shape.values()) == sizes
    assert {device.id for device in mesh.devices.flat} == {device.id for device in devices}


TASKS = [{"task": "evaluate"}, {}, {"task": "recover"}, {"task": "recover", "method": "groupwise"}]


@pytest.mark.parametrize("fields", TASKS)
def test_every_task_compiles_and_is_split(fields):
    record = plan(**fields)
    assert record["fits"]
    assert record["source"] == "compiled"
    embeddings, matrices = 2 * 4096 * 1024, 6 * (1024 * 128 * (8 + 4 + 4 + 8) + 3 * 1024 * 2048)
    parameters = 2 * (embeddings + matrices)
    if fields.get("method") == "groupwise":  # beside the model as it was loaded
        parameters += 2 * embeddings + (4 / 8 + 8 / 32) * matrices
    assert parameters / 4 <= record["bytes"]["parameters"] <= 1.1 * parameters / 4
    estimated = estimate(PlanConfig(length=256, **fields), SMALL, (1, 4, 1), 4, "full")
    assert estimated.parameters == parameters / 4
    assert record["bytes"]["peak"] < record["memory"]
    assert record["tokens_per_second"] > 0


def test_a_chip_of_two_devices_is_planned_by_device():
    record = plan("tpu7x:2x2x1", task="evaluate", batch=8)
    assert (record["source"], record["chips"]) == ("compiled", 4)
    assert record["mesh"]["fsdp"] == 8
    assert record["memory"] == 94.7 * GIB > record["bytes"]["peak"]


def test_statistics_are_split_and_weights_are_gathered_a_layer_at_a_time():
    record = plan()
    statistics = 4 * (2 * 4096 * 1024 + 2 * 6 * (1024 * 128 * 24 + 3 * 1024 * 2048))
    assert record["bytes"]["state"] <= 1.1 * statistics / 4
    assert record["largest"]["all-gather"] <= max(MATRIX, 4096 * 1024 * 2)  # a matrix of a layer, or the embedding
    layers = 2 * 6 * (1024 * 128 * 24 + 3 * 1024 * 2048)
    # forward and backward pass, and the two embeddings once or twice
    assert record["sent"]["all-gather"] <= 0.75 * (2 * layers + 4 * 2 * 4096 * 1024) * 1.05


def test_scores_of_long_rows_are_never_whole():
    """Those of 4,096 tokens take 512 MiB on a device that has a row and eight heads, those of a block 128."""
    widths = LayerWidths(kv_heads=4, q_per_kv=4, mlp=256)
    spec = LlamaSpec(vocab=512, embed=256, head_dim=128, layers=(widths,), tied=True)

    def peak(path: AttentionPath) -> float:
        config = PlanConfig(attention=path, length=4096, estimators=("gate_fisher",), examples=2)
        record = plan_one(config, spec, target_of("v5e:2x2"), (1, 2, 2), 2, "full")
        products, rows_and_heads = 6, 8  # two forward, four backward; on a device
        assert record["flops"] > products * rows_and_heads * 2 * 4096**2 * 128
        return record["bytes"]["peak"]

    whole = peak("plain")
    for path in ("blocks", "auto"):
        assert peak(path) < whole - 256 * 2**20


def test_more_devices_hold_less():
    peaks = [plan(target, batch=16)["bytes"]["peak"] for target in ("v5e:2x2", "v5e:4x4")]
    assert peaks[1] < 0.5 * peaks[0]


def test_the_search_compiles_and_takes_the_smallest():
    config = PlanConfig(length=256, examples=16)
    best, tried = search(config, SMALL, targets(CHIPS["v5e"]))
    assert best is not None
    assert best["target"] == "v5e:1x1"
    assert best["source"] == "compiled"
    assert 1 <= len(tried) <= 6
    fits = [record["step_seconds"] / record["batch"] for record in tried if record["fits"]]
    assert best["step_seconds"] / best["batch"] == min(fits)


def test_what_does_not_fit_says_by_how_much():
    config = PlanConfig(length=4096, batch=8, remat="none")
    record = plan_one(config, spec_of("llama-2-7b"), target_of("v5e:2x2"), None, 8, "none")
    assert not record["fits"]
    assert record["overrun"] > GIB
    assert len(record["remedies"]) == 3


def test_seven_billion_with_squared_gradients_fit_sixteen_small_chips():
    config = PlanConfig()
    assert "taylor_element_second" in config.estimators
    record = plan_one(config, spec_of("llama-2-7b"), target_of("v5e-16"), None, 0, "full")
    assert record["fits"]
    assert record["bytes"]["peak"] < 0.75 * record["memory"]
    assert record["largest"]["all-gather"] <= 32000 * 4096 * 2


def test_what_was_compiled_is_not_compiled_again(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        first = plan()
        assert [path for path in tmp_path.iterdir() if not path.name.startswith("jit")]
        monkeypatch.setattr("saap_jax.planning.plan.told_by", lambda *_: pytest.fail("compiled"))
        assert plan() == first
        with pytest.raises(pytest.fail.Exception, match="compiled"):
            plan(length=128)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
