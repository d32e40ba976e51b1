"""GGUF files of mixtures of experts: a matrix an expert, the channels of narrower layers zeros, the rest refused."""

import dataclasses

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.export.gguf_file import architecture_of
from saap_jax.llama import Constants, load_model
from saap_jax.llama.files.families import FAMILIES
from tests.export.models import MIXTURES
from tests.export.test_gguf import fields_of, rewritten, types_of, written
from tests.helpers import changed, forward, parameters_by_path, random_model
from tests.llama.conftest import assert_same

TOKENS = np.random.default_rng(0).integers(0, 300, (2, 9), np.int32)
ARCHITECTURES = {"qwen3_moe": "qwen3moe", "mixtral": "llama"}


def test_every_family_with_experts_is_here():
    assert {family for family, traits in FAMILIES.items() if traits.experts} == set(ARCHITECTURES)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_each_expert_is_a_matrix(family, tmp_path):
    """As llama.cpp's converter stacks them, `[experts, outputs, inputs]`; the router is float32 whatever else is."""
    model, path, architecture = random_model(MIXTURES[f"{family}-uniform"]), tmp_path / "x.gguf", ARCHITECTURES[family]
    assert written(model, path) == (architecture, 0, 0)
    fields = fields_of(path)
    channels = "expert_feed_forward_length" if family == "qwen3_moe" else "feed_forward_length"
    for key, value in (("expert_count", 6), ("expert_used_count", 2), (channels, 24)):
        assert fields[f"{architecture}.{key}"] == value
    tensors, mlp = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}, model.segments[0].mlp
    for name, ours, order in (("gate", mlp.gate, (1, 2, 0)), ("up", mlp.up, (1, 2, 0)), ("down", mlp.down, (0, 2, 1))):
        expected = np.asarray(ours[...][1]).transpose(order)  # ours: embed, experts, channels; experts, channels, embed
        np.testing.assert_array_equal(tensors[f"blk.1.ffn_{name}_exps.weight"], expected)
    np.testing.assert_array_equal(tensors["blk.0.ffn_gate_inp.weight"], np.asarray(mlp.router[...][0]).T)
    assert_same(load_model(path), model)
    written(model, tmp_path / "half.gguf", "float16")
    assert types_of(tmp_path / "half.gguf")["blk.0.ffn_gate_inp.weight"] == "F32"
    assert types_of(tmp_path / "half.gguf")["blk.0.ffn_gate_exps.weight"] == "F16"


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_narrower_experts_get_zeros(family, tmp_path):
    """Channels and heads of a layer may be fewer; zeros beside them change nothing, and are counted."""
    model, path = random_model(MIXTURES[f"{family}-ragged"]), tmp_path / "x.gguf"
    result = written(model, path)
    channels = 6 * 3 * 32 * (24 - 17)
    heads = 2 * 32 * 8 * (1 + 2)
    assert (result.architecture, result.added) == (ARCHITECTURES[family], channels + heads)
    loaded = load_model(path)
    assert loaded.spec.uniform
    np.testing.assert_allclose(forward(loaded, TOKENS), forward(model, TOKENS), rtol=0, atol=2e-5)
    assert np.abs(forward(loaded, TOKENS) - forward(model, TOKENS[::-1])).max() > 0.1


def test_experts_of_zeros_are_refused():
    """Negative control of it: an expert of zeros, with a score of zero, takes tokens from others."""
    spec = MIXTURES["qwen3_moe-uniform"]
    fewer = (spec.layers[0], dataclasses.replace(spec.layers[1], mlp=5))
    with pytest.raises(ValueError, match="expected as many experts in each layer, at least 2, got 5 to 6; prune with"):
        architecture_of(dataclasses.replace(spec, layers=fewer))
    none = tuple(dataclasses.replace(layer, mlp=0) for layer in spec.layers)
    with pytest.raises(ValueError, match="at least 2, got 0 to 0"):
        architecture_of(dataclasses.replace(spec, layers=none))
    model = random_model(spec)
    wider = random_model(dataclasses.replace(spec, layers=(dataclasses.replace(spec.layers[0], mlp=7),) * 2))
    for path, ours in parameters_by_path(model).items():
        zeros = [(0, wide - size) for wide, size in zip(parameters_by_path(wider)[path].shape, ours.shape, strict=True)]
        wider = changed(wider, path, lambda _, ours=ours, zeros=zeros: jnp.pad(ours[...], zeros))
    assert np.abs(forward(wider, TOKENS) - forward(model, TOKENS)).max() > 1e-3


def test_routing_that_llama_cpp_has_not_is_refused():
    spec = MIXTURES["qwen3_moe-uniform"]
    kept = Constants(family="qwen3_moe", experts_per_token=2, route_scale="kept")
    with pytest.raises(ValueError, match=r"by their sum, .* got others \(norm_topk_prob false\); choose"):
        architecture_of(dataclasses.replace(spec, constants=kept))


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("qwen3moe", {"expert_count": None}, "expected qwen3moe.expert_count to be a positive integer, got None"),
        ("qwen3moe", {"expert_count": 5}, r"has shape \[32, 144\], expected \[32, 120\]"),
        ("qwen3moe", {"expert_used_count": 7}, "expected qwen3moe.expert_used_count of at most 6 experts, got 7"),
        ("qwen3moe", {"expert_feed_forward_length": 12}, r"has shape \[32, 144\], expected \[32, 72\]"),
        ("qwen3", {}, "expected qwen3.expert_count to be none, got 6"),
    ],
)
def test_files_that_contradict_themselves(architecture, fields, message, tmp_path):
    written(random_model(MIXTURES["qwen3_moe-uniform"]), tmp_path / "x.gguf")
    path = rewritten(tmp_path / "x.gguf", tmp_path / "y.gguf", architecture, fields)
    with pytest.raises(ValueError, match=message) as error:
        load_model(path)
    assert "y.gguf" in str(error.value)
    assert "\n" not in str(error.value)
