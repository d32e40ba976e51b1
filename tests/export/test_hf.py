"""Hugging Face directories: plain, padded and ragged ones compute what their source computes."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from saap_jax.export.hf import write_hf
from saap_jax.llama.files.load import load_model
from saap_jax.llama.spec import Constants
from tests.export.models import RELATIVES, SPECS, UNIFORM, config_of, spec_of
from tests.helpers import random_model
from tests.llama.conftest import assert_same

FLOAT32 = np.dtype(np.float32)


def test_biases_of_other_projections_are_refused(tmp_path):
    write_hf(random_model(SPECS["biased"]), tmp_path, "hf", FLOAT32)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.self_attn.v_proj.bias"
    assert not tensors[name].any()
    tensors[name] = tensors[name] + 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.v_proj\.bias is not zero, expected biases of o_proj"):
        load_model(tmp_path)


def test_generation_settings_travel_or_are_made(tokenizer, tmp_path):
    model = random_model(UNIFORM)
    (tmp_path / "made").mkdir()
    write_hf(model, tmp_path / "made", "hf", FLOAT32, tokenizer=tokenizer)
    assert json.loads((tmp_path / "made" / "generation_config.json").read_text()) == {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    theirs = tmp_path / "theirs.json"
    theirs.write_text('{"eos_token_id": [1, 2], "temperature": 0.7}')
    (tmp_path / "copied").mkdir()
    write_hf(model, tmp_path / "copied", "hf", FLOAT32, generation=theirs)
    assert (tmp_path / "copied" / "generation_config.json").read_bytes() == theirs.read_bytes()
    ends = dataclasses.replace(UNIFORM, constants=Constants(bos_token=1, eos_tokens=(2, 3)))
    (tmp_path / "ends").mkdir()
    write_hf(random_model(ends), tmp_path / "ends", "padded", FLOAT32)
    assert json.loads((tmp_path / "ends" / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
    }


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral", "phi3"])
def test_output_biases_have_no_place_in_a_plain_relative(family, tmp_path):
    spec = dataclasses.replace(RELATIVES[f"{family}-uniform"], output_biases=True)
    for form in ("hf", "padded"):
        with pytest.raises(ValueError, match=rf"format {form}: expected no biases .* family {family}.* ragged"):
            write_hf(random_model(spec), tmp_path, form, FLOAT32)
    assert not list(tmp_path.iterdir())
    write_hf(random_model(spec), tmp_path, "ragged", FLOAT32)
    assert_same(load_model(tmp_path), random_model(spec))


def test_transformers_reads_the_sizes_of_layers(tmp_path):
    from transformers import LlamaConfig

    if not hasattr(LlamaConfig, "per_layer_config"):
        pytest.skip("transformers before 5.14 knows no per_layer_config")
    write_hf(random_model(spec_of((2, 2, 24), (2, 2, 17), (0, 2, 8), (2, 2, 0))), tmp_path, "ragged", FLOAT32)
    said = {key: value for key, value in config_of(tmp_path).items() if key not in ("model_type", "architectures")}
    theirs = [
        (each.num_key_value_heads, each.intermediate_size, each.skip) for each in LlamaConfig(**said).per_layer_config
    ]
    assert theirs == [(2, 24, []), (2, 17, []), (2, 8, ["attention"]), (2, 24, ["mlp"])]
    assert not LlamaConfig(**said | {"per_layer_config": None}).is_heterogeneous, "control"
