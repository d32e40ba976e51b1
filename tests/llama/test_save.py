"""Saving: bits survive, configs do not lie, and outputs appear under their final name complete or not at all."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from saap_jax.llama.files.layout import model_tensors
from saap_jax.llama.files.load import load_keep, load_model
from saap_jax.llama.files.write import new_output, save_model
from saap_jax.llama.spec import LayerWidths
from saap_jax.surgery.cut import cut
from tests import helpers
from tests.helpers import RELATIVES, random_model, relative
from tests.llama.conftest import assert_same, spec_of

DENSE = spec_of((2, 12), (2, 12))
CUT = spec_of((2, 12), (1, 12), (1, 12), (0, 0), (2, 4), tied=True)
BIASED = spec_of((2, 12), (2, 12), output_biases=True)


def written(model, directory, **options):
    """Save a model; return its tensors and its config."""
    place = save_model(model, directory, **options)
    return load_file(place / "model.safetensors"), json.loads((place / "config.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("spec", [DENSE, CUT, BIASED], ids=["dense", "cut", "biased"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_round_trip_is_bitwise(spec, dtype, tmp_path):
    model = random_model(spec, dtype=dtype)
    first = save_model(model, tmp_path / "first")
    loaded = load_model(first, dtype)
    assert_same(loaded, model)
    second = save_model(loaded, tmp_path / "second")
    for name in ("model.safetensors", "config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("family", RELATIVES)
@pytest.mark.parametrize(
    "widths", [((2, 6), (2, 6)), ((2, 6), (1, 3), (0, 5)), ((2, 6), (1, 0))], ids=["dense", "ragged", "empty"]
)
def test_relatives_come_back(family, widths, tmp_path):
    model = relative(family, *widths)
    tensors, _ = written(model, tmp_path / "m")
    assert_same(load_model(tmp_path / "m"), model)
    fused = [name for name in tensors if "qkv_proj" in name or "gate_up" in name]
    assert len(fused) == (4 if family == "phi3" and widths[0] == widths[1] else 0)


def test_cut_and_compensated_relatives_come_back(tmp_path):
    """Of a Qwen2 with output biases, those of query, key and value are its own: nothing drops or refuses them."""
    spec = helpers.spec_of((2, 6), (2, 6), output_biases=True, constants=RELATIVES["qwen2"])
    biased = random_model(spec)
    assert_same(load_model(save_model(biased, tmp_path / "biased")), biased)
    keep = {"attention": np.array([[True, False], [True, True], [False, True]]), "mlp": np.ones((3, 6), bool)}
    pruned = cut(relative("qwen2", *[(2, 6)] * 3), keep)
    assert_same(load_model(save_model(pruned, tmp_path / "m", keep=keep)), pruned)


def test_output_biases_have_names_like_those_of_hugging_face(tmp_path):
    """Names of the families are held by transformers itself, in `test_parity`."""
    model = random_model(BIASED)
    tensors, config = written(model, tmp_path / "biased")
    assert (config["model_type"], config["output_biases"]) == ("saap_llama", True)
    attention, mlp = model.segments[0].attention, model.segments[0].mlp
    np.testing.assert_array_equal(tensors["model.layers.1.self_attn.o_proj.bias"], attention.output_bias[...][1])
    np.testing.assert_array_equal(tensors["model.layers.0.mlp.down_proj.bias"], mlp.down_bias[...][0])
    assert not [name for name in written(random_model(DENSE), tmp_path / "d")[0] if name.endswith("bias")]


def test_dtype_converts(tmp_path):
    model = random_model(DENSE)
    tensors, config = written(model, tmp_path / "half", dtype="bfloat16")
    assert {tensor.dtype for tensor in tensors.values()} == {jnp.dtype(jnp.bfloat16)}
    expected = np.asarray(model.unembedding[...]).T.astype(jnp.bfloat16)
    np.testing.assert_array_equal(tensors["lm_head.weight"], expected)
    assert config["torch_dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="dtype: expected float64, float32"):
        save_model(model, tmp_path / "other", dtype="int8")
    assert os.listdir(tmp_path) == ["half"]


@pytest.mark.parametrize("own", [jnp.float32, jnp.bfloat16])
def test_values_beyond_a_dtype_are_refused(own, tmp_path):
    model = jax.tree.map(lambda leaf: (leaf * 1e6).astype(own), random_model(DENSE))
    with pytest.raises(ValueError, match="beyond the range of float16"):
        save_model(model, tmp_path / "half", dtype="float16")


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


# --- tensors on their way ----------------------------------------------------------------------------


def test_widened_tensors_hold_the_model_and_zeros():
    model = random_model(spec_of((2, 6), (1, 3)))
    wide = LayerWidths(kv_heads=3, q_per_kv=4, mlp=7)
    plain = {tensor.name: tensor.read() for tensor in model_tensors(model)}
    for tensor in model_tensors(model, [wide] * 2):
        values, before = tensor.read(), plain[tensor.name]
        assert values.shape == tensor.shape
        assert np.count_nonzero(values) == np.count_nonzero(before)
        if tensor.name == "model.layers.1.self_attn.q_proj.weight":  # rows: kv_heads, q_per_kv, head_dim
            np.testing.assert_array_equal(
                values.reshape(3, 4, 4, 16)[:1, :2], before.reshape(1, 2, 4, 16), err_msg="groups move apart"
            )
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn.* or wider"):
        model_tensors(model, [LayerWidths(kv_heads=1, q_per_kv=2, mlp=6)] * 2)


# --- outputs ---------------------------------------------------------------------------------------


def test_existing_target_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("empty", "dangling"):
        with pytest.raises(FileExistsError, match="never overwritten"):
            save_model(random_model(DENSE), tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["dangling", "empty"]
    assert not os.listdir(tmp_path / "empty")


@pytest.mark.parametrize("suffix", [None, ".bin"])
def test_an_output_appears_when_it_is_complete(tmp_path, suffix):
    target = tmp_path / "deep" / "out"
    with new_output(target, "it", suffix=suffix) as place:
        (place if suffix else place / "file").write_text("x")
        assert not target.exists()
    assert target.is_file() if suffix else (target / "file").is_file()
    assert os.listdir(target.parent) == ["out"]
    (tmp_path / "plain").mkdir()
    assert suffix or target.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("suffix", [None, ".bin"])
@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt(), FileNotFoundError("ours")])
def test_nothing_is_left_behind(tmp_path, suffix, error):
    def fail():
        with new_output(tmp_path / "out", "it", suffix=suffix) as place:
            (place if suffix else place / "file").write_text("half")
            raise error

    with pytest.raises(type(error)) as raised:
        fail()
    assert raised.value is error
    assert os.listdir(tmp_path) == []
