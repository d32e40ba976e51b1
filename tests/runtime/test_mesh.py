"""Meshes, rules and the shardings that follow from a model's axis names."""

import math
import types

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from saap_jax.config.mesh import MeshConfig, by_axis
from saap_jax.llama.model import abstract_llama
from saap_jax.llama.spec import Constants, LayerWidths, LlamaSpec
from saap_jax.runtime.constraints import expert_shards, unit_axes
from saap_jax.runtime.mesh import (
    RULES,
    Layout,
    check_experts,
    layout_of,
    layout_of_job,
    mesh_sizes,
    partition_spec,
    rules_of,
    shardings,
)
from saap_jax.subjects.llama import LlamaSubject
from saap_jax.trace.problem import Problem
from saap_jax.trace.trace import trace
from tests.helpers import RELATIVES, random_model, spec_of

P = PartitionSpec


def layout(*sizes: int, rules: tuple[str, ...] = (), uneven: str = "refuse") -> Layout:
    mesh = AbstractMesh(sizes, tuple(by_axis(sizes)), axis_types=(AxisType.Auto,) * len(sizes))
    return Layout(mesh, rules_of(rules), uneven)


def model(**changes):
    widths = LayerWidths(kv_heads=4, q_per_kv=2, mlp=24)
    sizes = {"vocab": 32, "embed": 16, "head_dim": 4, "layers": (widths,) * 2, "tied": True, "constants": Constants()}
    return abstract_llama(LlamaSpec(**sizes | changes))


def specs(tree, where: Layout) -> dict[str, PartitionSpec]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        shardings(tree, where), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.get_value().spec for path, leaf in leaves}


def test_golden_specs_of_the_default_rules():
    assert specs(model(tied=False), layout(1, 2, 2)) == {
        "embedding": P("tensor", "fsdp"),
        "norm": P("fsdp"),
        "segments/0/attention/key": P(None, "fsdp", "tensor", None),
        "segments/0/attention/output": P(None, "tensor", None, None, "fsdp"),
        "segments/0/attention/query": P(None, "fsdp", "tensor", None, None),
        "segments/0/attention/value": P(None, "fsdp", "tensor", None),
        "segments/0/attention_norm": P(None, "fsdp"),
        "segments/0/mlp/down": P(None, "tensor", "fsdp"),
        "segments/0/mlp/gate": P(None, "fsdp", "tensor"),
        "segments/0/mlp/up": P(None, "fsdp", "tensor"),
        "segments/0/mlp_norm": P(None, "fsdp"),
        "unembedding": P("fsdp", "tensor"),
    }


def test_biases_and_norms_of_heads():
    """A bias is split with its heads; norms of heads, which all have, lie on every device."""
    found = specs(model(constants=Constants(family="qwen2")), layout(1, 2, 2))
    assert found["segments/0/attention/query_bias"] == P(None, "tensor", None, None)
    assert found["segments/0/attention/key_bias"] == found["segments/0/attention/value_bias"] == P(None, "tensor", None)
    found = specs(model(constants=Constants(family="qwen3")), layout(1, 2, 2))
    assert found["segments/0/attention/query_norm"] == found["segments/0/attention/key_norm"] == P(None, None)


def mixture(experts: int = 8):
    widths = LayerWidths(kv_heads=4, q_per_kv=2, mlp=experts, channels=6)
    return model(layers=(widths,) * 2, constants=RELATIVES["mixtral"])


def test_experts_lie_along_an_axis_of_their_own():
    """And along `tensor` within each part; heads and vocabulary along `tensor` alone, as without that axis."""
    found = specs(mixture(), layout(1, 2, 2, 2))
    assert {path: spec for path, spec in found.items() if "expert" in str(spec)} == {
        "segments/0/mlp/down": P(None, ("expert", "tensor"), None, "fsdp"),
        "segments/0/mlp/gate": P(None, "fsdp", ("expert", "tensor"), None),
        "segments/0/mlp/router": P(None, "fsdp", ("expert", "tensor")),
        "segments/0/mlp/up": P(None, "fsdp", ("expert", "tensor"), None),
    }
    three = specs(mixture(), layout(1, 2, 2))
    assert three["segments/0/mlp/gate"] == P(None, "fsdp", "tensor", None)
    apart = "mlp/gate", "mlp/up", "mlp/down", "router"
    assert all(found[path] == spec for path, spec in three.items() if not path.endswith(apart))
    assert specs(mixture(), layout(1, 2, 1, 4))["segments/0/mlp/up"] == P(None, "fsdp", "expert", None)
    for rule, expected in (("experts=expert", "expert"), ("experts=tensor", "tensor"), ("experts=", None)):
        changed = specs(mixture(), layout(1, 2, 2, 2, rules=(rule,)))
        assert changed["segments/0/mlp/gate"] == P(None, "fsdp", expected, None)
    with pytest.raises(ValueError, match="axis 'experts' of size 6 is not divided by expert x tensor = 4"):
        shardings(mixture(6), layout(1, 1, 2, 2))


def test_programs_are_told_where_experts_are():
    experts, heads = ("embed", "experts", "channels"), ("embed", "kv_heads", "head_dim")
    for sizes, of_experts, of_heads in (
        ((1, 2, 2), ("tensor",), ("tensor",)),
        ((1, 2, 2, 4), ("expert", "tensor"), ("tensor",)),
        ((1, 2, 1, 4), ("expert",), ()),
    ):
        with jax.sharding.use_abstract_mesh(layout(*sizes).mesh):
            assert (unit_axes(experts, 16), unit_axes(heads, 16)) == (of_experts, of_heads)
            assert unit_axes(experts, 7) == ()
            assert (expert_shards(experts, 16), expert_shards(heads, 16)) == (
                math.prod(sizes[2:]) if sizes[3:] else 1,
                1,
            )


def test_axes_of_size_one_split_nothing():
    assert all(spec == P(*[None] * len(spec)) for spec in specs(model(), layout(4, 1, 1)).values())


def test_a_rule_can_be_changed():
    changed = specs(model(), layout(2, 2, 2, rules=("embed=data+fsdp", "vocab=")))
    assert changed["embedding"] == P(None, ("data", "fsdp"))
    assert rules_of(()) == RULES
    shardings(model(), layout(1, 2, 1, rules=("mlp=fsdp", "embed=")))


def test_an_axis_that_does_not_divide_is_replicated_where_asked():
    made = specs(model(layers=THREE), layout(1, 1, 2, uneven="replicate"))
    assert made["segments/0/attention/key"] == P(None, None, None, None)
    assert made["segments/0/mlp/up"] == P(None, None, "tensor")


def test_sizes_of_a_mesh():
    assert mesh_sizes(MeshConfig(data=-1, tensor=2), 8) == (4, 1, 2)
    assert mesh_sizes(MeshConfig(data=-1, expert=4), 8) == (2, 1, 1, 4)
    assert mesh_sizes(MeshConfig(fsdp=8, expert=-1), 8) == (1, 8, 1), "as if nobody had named it"
    made = layout_of(MeshConfig(data=-1), jax.devices()[:1])
    assert dict(made.mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}


THREE = (LayerWidths(kv_heads=3, q_per_kv=1, mlp=24),) * 2
SLICES = [types.SimpleNamespace(platform="tpu", slice_index=number) for number in (0, 1)]
REFUSED = {
    "mesh.rules: expected AXIS=MESH_AXIS.…, .* got 'heads=tensor'": lambda: rules_of(("heads=tensor",)),
    "mesh.rules: .* got 'mlp=pipeline'": lambda: rules_of(("mlp=pipeline",)),
    "mesh.rules: .* got 'mlp'": lambda: rules_of(("mlp",)),
    "mesh.rules: .* got 'mlp=fsdp.fsdp'": lambda: rules_of(("mlp=fsdp+fsdp",)),
    "mlp/down: axes 'mlp' and 'embed' are both on mesh axis 'fsdp'": lambda: shardings(
        model(), layout(1, 2, 1, rules=("mlp=fsdp",))
    ),
    "attention/.*: axis 'kv_heads' of size 3 is not divided by tensor = 2": lambda: shardings(
        model(layers=THREE), layout(1, 1, 2)
    ),
    "bias: no rule for axis 'heads'": lambda: partition_spec(layout(1, 2, 2), ("heads",), (4,), "bias"),
    "mesh: expected data 3 .* to make 8 devices, got": lambda: mesh_sizes(MeshConfig(data=3, fsdp=-1), 8),
    "mesh: expected data 2 .* to make 8 devices, got": lambda: mesh_sizes(MeshConfig(data=2), 8),
    "mesh: expected sizes of at least 1": lambda: MeshConfig(data=0),
    "mesh: expected sizes .* got data -2": lambda: MeshConfig(data=-2),
    "mesh: expected sizes .* got data -1, fsdp -1": lambda: MeshConfig(data=-1, fsdp=-1),
    "mesh: expected sizes .* expert 0": lambda: MeshConfig(expert=0),
    "mesh: expected devices of one TPU slice, got 2 slices; start a job a slice": lambda: layout_of(
        MeshConfig(data=2), SLICES
    ),
    "mesh.expert: expected 1 for a model without experts, got 2 for m; spread it with mesh.fsdp": lambda: check_experts(
        {"expert": 2}, False, "m"
    ),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_no_mesh_holds_is_refused(said):
    with pytest.raises(ValueError, match=said):
        REFUSED[said]()


def test_a_batch_is_a_multiple_of_its_parts(monkeypatch):
    monkeypatch.setattr("saap_jax.runtime.mesh.layout_of", lambda _: layout(2, 2, 2))
    assert layout_of_job(MeshConfig(data=2), batch_size=8) is not None
    with pytest.raises(ValueError, match=r"batch_size: expected a multiple of 4, .*\(data x fsdp\), got 6"):
        layout_of_job(MeshConfig(data=2), batch_size=6)


@pytest.mark.parametrize("given", ["model", "params", "examples", "inputs", "mesh in force"])
def test_explicit_axes_are_refused_at_every_door(given):
    def put(kind, value):
        mesh = jax.make_mesh((1,), ("data",), axis_types=(kind,), devices=jax.devices()[:1])
        return jax.device_put(value, NamedSharding(mesh, P()))

    def call(kind):
        x, y = np.ones((4, 3), np.float32), np.ones((4, 2), np.float32)
        params = {"up": np.ones((3, 5), np.float32), "down": np.ones((5, 2), np.float32)}
        if given == "model":
            return LlamaSubject(put(kind, random_model(spec_of((1, 4)))))
        if given == "params":
            return trace(mlp, put(kind, params), x)
        if given == "inputs":
            return trace(mlp, params, put(kind, x))
        if given == "mesh in force":
            with jax.set_mesh(put(kind, x).sharding.mesh):
                return trace(mlp, params, x)
        x = put(kind, x)
        return Problem(
            function=mlp, params=params, loss=lambda a, b: (a - b).mean(), calibration=(x, y), held_out=(x, y)
        )

    with pytest.raises(ValueError, match="mesh: expected Auto axes, got the Explicit ones data; make it with|in force"):
        call(AxisType.Explicit)
    assert call(AxisType.Auto) is not None, "control"


def mlp(params, x):
    return jax.nn.relu(x @ params["up"]) @ params["down"]
