"""What a config.json may say, and what is refused by name."""

import json

import pytest

from saap_jax.llama import Constants, LayerWidths, LlamaSpec, RopeScaling
from saap_jax.llama.files.hf_config import config_from_spec, quantization_from_config, spec_from_config

SIZES = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# The keys of published configs, with small sizes.
LLAMA1 = SIZES | {
    "architectures": ["LLaMAForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_sequence_length": 2048,
    "pad_token_id": -1,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "float16",
    "transformers_version": "4.27.0.dev0",
    "use_cache": True,
}
VICUNA = SIZES | {
    "_name_or_path": "vicuna-7b-v1.5",
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 4096,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
LLAMA31 = SIZES | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "eos_token_id": [128001, 128008, 128009],
    "mlp_bias": False,
    "num_key_value_heads": 2,
    "rope_scaling": LLAMA3 | {"rope_type": "llama3"},
    "rope_theta": 500000.0,
}
SMOLLM2 = SIZES | {
    "is_llama_config": True,
    "num_key_value_heads": 4,
    "rope_interleaved": False,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
}


def test_old_llama_is_multi_head():
    spec = spec_from_config(LLAMA1, "x")
    assert spec.layers == (LayerWidths(kv_heads=8, q_per_kv=1, mlp=96),) * 3
    assert (spec.head_dim, spec.tied) == (8, False)
    assert spec.constants == Constants(norm_eps=1e-6, bos_token=0, eos_tokens=(1,))


def test_published_configs():
    assert spec_from_config(VICUNA, "x").constants == Constants(max_positions=4096, bos_token=1, eos_tokens=(2,))
    spec = spec_from_config(LLAMA31, "x")
    assert spec.layers[0] == LayerWidths(kv_heads=2, q_per_kv=4, mlp=96)
    assert spec.constants.rope_scaling == RopeScaling(kind="llama3", factor=8.0)
    assert (spec.constants.rope_theta, spec.constants.eos_tokens) == (500000, (128001, 128008, 128009))
    smollm2 = spec_from_config(SMOLLM2, "x")
    assert (smollm2.tied, smollm2.constants.rope_theta) == (True, 100000)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"type": "llama3"}},
        {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5}},
    ],
)
def test_old_and_new_rope_keys_agree(rope):
    constants = spec_from_config(SIZES | rope, "x").constants
    assert (constants.rope_theta, constants.rope_scaling) == (5e5, RopeScaling(kind="llama3", factor=8.0))


def test_biases_are_all_or_none():
    assert not spec_from_config(SIZES, "x").output_biases
    assert spec_from_config(SIZES | {"attention_bias": True, "mlp_bias": True}, "x").output_biases


def test_linear_rope_and_explicit_head_dim():
    spec = spec_from_config(SIZES | {"rope_scaling": {"type": "linear", "factor": 2}, "head_dim": 16}, "x")
    assert (spec.constants.rope_scaling, spec.head_dim) == (RopeScaling(kind="linear", factor=2.0), 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma"}, "got 'gemma'; not a LLaMA"),
        ({"model_type": None}, "got None; not a LLaMA"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures = "),
        ({"attention_bias": True}, "attention_bias = True with mlp_bias = False is not supported"),
        ({"mlp_bias": True}, "attention_bias = False with mlp_bias = True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported, expected 'silu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"sliding_window": 4096}, "sliding_window = 4096"),
        ({"rope_interleaved": True}, "rope_interleaved = True"),
        ({"residual_multiplier": 0.2, "logits_scaling": 8}, "unknown attributes logits_scaling, residual_multiplier"),
        ({"query_heads_per_kv_head": [1, 1, 1]}, "unknown attributes query_heads_per_kv_head"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type 'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "rope type 'dynamic' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "expected factor for rope type 'linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "expected factor, high_freq_factor"),
        ({"rope_scaling": {"type": "linear", "rope_type": "llama3"}}, "both type 'linear' and rope_type 'llama3'"),
        ({"rope_parameters": {"factor": 8.0}}, "expected no settings for rope type 'default', got factor"),
        ({"rope_parameters": {"rope_theta": 1e4}, "rope_theta": 5e5}, "rope_theta is given more than once"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_parameters and rope_scaling disagree",
        ),
        ({"num_key_value_heads": 3}, "8 is no multiple of num_key_value_heads 3"),
        ({"num_attention_heads": 7}, "hidden_size 64 is no multiple of num_attention_heads 7"),
        ({"hidden_size": None}, "expected hidden_size to be a positive integer, got None"),
        ({"num_hidden_layers": True}, "num_hidden_layers to be a positive integer, got True"),
        ({"intermediate_size": 0}, "intermediate_size to be a positive integer, got 0"),
        ({"intermediate_size": [96, 96, 96]}, "intermediate_size to be a positive integer"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps to be a positive number, got 'small'"),
        ({"rms_norm_eps": 1e30}, "rms_norm_eps: expected epsilon from 1e-15 to 0.1"),
        ({"rope_theta": 1e-3}, "rope_theta: expected theta from 2 to"),
        ({"rope_theta": 1e300}, "rope_theta: expected theta from 2 to"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: expected layers from 1 to 16,384, got 1,000,000,000"),
        ({"vocab_size": 2**62}, "vocab_size: expected vocabulary from 1 to"),
        ({"hidden_size": 2**40}, "hidden_size: expected width from 1 to"),
        ({"intermediate_size": 10**200}, "intermediate_size: expected channels from 1 to"),
        ({"num_attention_heads": 2**30}, "num_attention_heads: expected heads from 1 to"),
        ({"max_position_embeddings": 2**40}, "max_position_embeddings: expected positions from 1 to"),
        ({"head_dim": 3}, "even head_dim, got 3"),
        ({"head_dim": 2**40}, "head_dim: expected head size from 2 to"),
        ({"num_hidden_layers": True}, "expected num_hidden_layers to be a positive integer, got True"),
        ({"num_hidden_layers": [[1] * 10**5] * 10}, "expected num_hidden_layers to be a positive integer, got [[1, 1,"),
        (
            {"model_type": ["llama"]},
            "expected model_type llama, mistral, qwen2, qwen3, qwen3_moe, mixtral, phi3, gemma3_text, got ['llama']",
        ),
        ({"model_type": {"llama": 1}}, "got {'llama': 1}"),
        ({"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}}, "rope type ['linear'] is not supported"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 1e9}}, "factor: expected factor from 1e-06 to"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "expected factor >= 1, got 0.5"),
        ({"eos_token_id": 10**18}, "expected eos_token_id to be a token id or some"),
        ({"bos_token_id": "1"}, "bos_token_id to be a token id, got '1'"),
        ({f"key{i}": 0 for i in range(10**4)}, "unknown attributes key0, key1, key10 and 9997 more"),
        ({"x" * 10**6: 0}, "unknown attributes 'xxx"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings to be true or false, got 'yes'"),
        ({"eos_token_id": "</s>"}, "eos_token_id to be a token id or some, got '</s>'"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=r"^here: ") as error:
        spec_from_config(SIZES | change, "here")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


SCALINGS = [None, RopeScaling(kind="linear", factor=2.5), RopeScaling(kind="llama3", factor=32.0, low_freq_factor=2.0)]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("widths", [((2, 8), (2, 8)), ((2, 8), (1, 8)), ((2, 8), (0, 0)), ((0, 8), (0, 8)), ((2, 0),)])
@pytest.mark.parametrize("eos", [(), (2,), (2, 3)])
def test_round_trip(scaling, widths, eos):
    layers = tuple(LayerWidths(kv_heads=heads, q_per_kv=3, mlp=mlp) for heads, mlp in widths)
    constants = Constants(rope_scaling=scaling, eos_tokens=eos, norm_eps=1e-6, rope_theta=1e6, max_positions=99)
    spec = LlamaSpec(vocab=7, embed=8, head_dim=4, layers=layers, tied=True, constants=constants)
    config = json.loads(json.dumps(config_from_spec(spec, "float32")))
    assert spec_from_config(config, "x") == spec
    plain = spec.uniform and 0 not in widths[0]
    assert config["model_type"] == ("llama" if plain else "saap_llama")
    assert ("architectures" in config) == plain


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": [4, 3]}, "layer 1 has 3 attention heads, expected 1 x 2"),
        ({"intermediate_size": [8]}, "expected intermediate_size to be 2 non-negative integers"),
        ({"intermediate_size": 8}, "expected intermediate_size to be 2 non-negative integers"),
        ({"query_heads_per_kv_head": None}, "expected query_heads_per_kv_head to be 2 non-negative integers, got None"),
        ({"head_dim": None}, "expected an explicit head_dim"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: expected layers from 1 to"),
        ({"intermediate_size": [8, 2**40]}, "intermediate_size: expected channels from 1 to"),
        ({"intermediate_size": [8, -1]}, "expected intermediate_size to be .* non-negative integers"),
        ({"intermediate_size": [8, [8]]}, "expected intermediate_size to be .* non-negative integers"),
        ({"sliding_window": 8}, "^x: .*sliding_window: expected none in family 'llama', got 8"),
        ({"family": ["llama"]}, "expected family llama"),
        (
            {"saap_quantization": {"bits": [4], "group_size": 32, "matrices": ["query"]}},
            "expected saap_quantization to have bits",
        ),
        (
            {"saap_quantization": {"bits": 3, "group_size": 4, "matrices": ["query"]}},
            "expected a group_size of whole bytes at 3 bits, got 4",
        ),
        ({"attention_bias": True}, "attention_bias = True is not supported, expected False"),
        ({"architectures": ["LlamaForCausalLM"]}, "architectures = .* is not supported"),
    ],
)
def test_per_layer_refusals(change, message):
    layers = tuple(LayerWidths(kv_heads=heads, q_per_kv=2, mlp=8) for heads in (2, 1))
    config = config_from_spec(LlamaSpec(vocab=7, embed=8, head_dim=4, layers=layers, tied=True), "float32") | change
    with pytest.raises(ValueError, match=message):
        _ = spec_from_config(config, "x"), quantization_from_config(config, "x")
