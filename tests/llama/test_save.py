"""Saving: bits survive, configs do not lie, and nothing incomplete appears under a final name."""

import errno
import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from saap_jax.llama import load_keep, load_model, save_model
from saap_jax.llama.files import save as save_module
from tests.llama.conftest import assert_same, random_model, spec_of

DENSE = spec_of((2, 12), (2, 12))
CUT = spec_of((2, 12), (1, 12), (1, 12), (0, 0), (2, 4), tied=True)
BIASED = spec_of((2, 12), (2, 12), output_biases=True)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [DENSE, CUT, BIASED], ids=["dense", "cut", "biased"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_round_trip_is_bitwise(spec, dtype, tmp_path):
    model = random_model(spec, dtype)
    first = save_model(model, tmp_path / "first")
    loaded = load_model(first, dtype)
    assert_same(loaded, model)
    second = save_model(loaded, tmp_path / "second")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert (first / "config.json").read_bytes() == (second / "config.json").read_bytes()


def test_empty_layer_keeps_its_query_heads(tmp_path):
    model = random_model(CUT)
    config = json.loads((save_model(model, tmp_path / "cut") / "config.json").read_text())
    assert config["model_type"] == "saap_llama"
    assert config["num_key_value_heads"] == [2, 1, 1, 0, 2]
    assert config["num_attention_heads"] == [4, 2, 2, 0, 4]
    assert config["query_heads_per_kv_head"] == [2, 2, 2, 2, 2]
    assert config["intermediate_size"] == [12, 12, 12, 0, 4]
    assert load_model(tmp_path / "cut").spec.layers[3].q_per_kv == 2


def test_output_biases_are_stored_under_their_names_and_said_in_the_config(tmp_path):
    model = random_model(BIASED)
    directory = save_model(model, tmp_path / "biased")
    tensors, config = load_file(directory / "model.safetensors"), json.loads((directory / "config.json").read_text())
    assert (config["model_type"], config["output_biases"]) == ("saap_llama", True)
    np.testing.assert_array_equal(
        tensors["model.layers.1.self_attn.o_proj.bias"], model.segments[0].attention.output_bias[...][1]
    )
    np.testing.assert_array_equal(tensors["model.layers.0.mlp.down_proj.bias"], model.segments[0].mlp.down_bias[...][0])
    assert not [
        name
        for name in load_file(save_model(random_model(DENSE), tmp_path / "d") / "model.safetensors")
        if name.endswith("bias")
    ]


def test_names_and_shapes_are_hugging_face(tmp_path):
    tensors = load_file(save_model(random_model(CUT), tmp_path / "cut") / "model.safetensors")
    assert len(tensors) == 2 + 5 * 9
    assert tensors["model.layers.1.self_attn.q_proj.weight"].shape == (8, 16)
    assert tensors["model.layers.1.self_attn.k_proj.weight"].shape == (4, 16)
    assert tensors["model.layers.1.self_attn.o_proj.weight"].shape == (16, 8)
    assert tensors["model.layers.3.mlp.down_proj.weight"].shape == (16, 0)
    assert tensors["model.layers.4.mlp.gate_proj.weight"].shape == (4, 16)


def test_dtype_converts(tmp_path):
    model = random_model(DENSE)
    directory = save_model(model, tmp_path / "half", dtype="bfloat16")
    tensors = load_file(directory / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {jnp.dtype(jnp.bfloat16)}
    expected = np.asarray(model.unembedding[...]).T.astype(jnp.bfloat16)
    np.testing.assert_array_equal(tensors["lm_head.weight"], expected)
    assert json.loads((directory / "config.json").read_text())["torch_dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="dtype: expected float64, float32"):
        save_model(model, tmp_path / "other", dtype="int8")
    assert os.listdir(tmp_path) == ["half"]


def test_keep_round_trip(tmp_path):
    model = random_model(spec_of((2, 3), (0, 2)))
    keep = {
        "attention": np.array([[True, False, True], [False, False, False]]),
        "mlp": np.array([[True, True, False, True], [False, False, True, True]]),
    }
    directory = save_model(model, tmp_path / "cut", keep=keep)
    record = json.loads((directory / "keep.json").read_text())
    assert record["mlp"] == {"units": 4, "kept": [[0, 1, 3], [2, 3]]}
    loaded = load_keep(directory)
    for structure in keep:
        np.testing.assert_array_equal(loaded[structure], keep[structure])
    keep["mlp"][0, 2] = True
    with pytest.raises(ValueError, match=r"keep: expected mlp units a layer \[3, 2\], as in the model, got \[4, 2\]"):
        save_model(model, tmp_path / "other", keep=keep)


def test_existing_target_is_refused(tmp_path):
    model = random_model(DENSE)
    for name in ("empty", "dangling"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        (tmp_path / "dangling").unlink(missing_ok=True)
        (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
        with pytest.raises(FileExistsError, match="never overwritten"):
            save_model(model, tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["dangling", "empty"]
    assert not os.listdir(tmp_path / "empty")


@pytest.mark.parametrize("failing", ["write_tensors", "write_json"])
def test_full_disk_leaves_nothing(tmp_path, monkeypatch, failing):
    model = random_model(DENSE)

    def full(content, path, *rest):
        path.write_bytes(b"half")
        assert sorted(os.listdir(tmp_path)) == [".model.lock", ".model.partial"]
        assert not (tmp_path / "model").exists()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(save_module, failing, full)
        with pytest.raises(OSError, match=r"model: the model was not saved \(No space left on device") as error:
            save_model(model, tmp_path / "model")
    assert error.value.errno == errno.ENOSPC
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []
    save_model(model, tmp_path / "model")


def test_interruption_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(save_module, "write_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_model(random_model(DENSE), tmp_path / "model")
    assert os.listdir(tmp_path) == []


def test_parents_are_made_and_permissions_are_ordinary(tmp_path):
    directory = save_model(random_model(DENSE), tmp_path / "a" / "b")
    (tmp_path / "plain").mkdir()
    assert directory.stat().st_mode == (tmp_path / "plain").stat().st_mode
