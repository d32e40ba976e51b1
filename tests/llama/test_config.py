"""What a `config.json` may say, of LLaMA and its relatives, both ways, and what is refused by name."""

import dataclasses
import json

import pytest

from saap_jax.llama.files.config import config_from_spec, quantization_from_config, spec_from_config
from saap_jax.llama.spec import Apart, Constants, LayerWidths, LlamaSpec, RopeScaling
from tests.helpers import RELATIVES

LEAST = {"vocab_size": 32000, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
LEAST |= {"num_attention_heads": 8}
LLAMA = LEAST | {"model_type": "llama"}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
THREE = LayerWidths(kv_heads=2, q_per_kv=4, mlp=96)
SLIDING, FULL = "sliding_attention", "full_attention"

# fmt: off
_COMMON = LEAST | {"num_key_value_heads": 2, "hidden_act": "silu", "initializer_range": 0.02, "attention_dropout": 0.0,
                   "use_cache": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.0"}
_QWEN = _COMMON | {"bos_token_id": 151643, "eos_token_id": 151645, "rms_norm_eps": 1e-06, "tie_word_embeddings": True,
                   "use_sliding_window": False, "rope_theta": 1000000.0}
PUBLISHED = {
    "llama": LLAMA | {"architectures": ["LLaMAForCausalLM"], "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu",
                      "max_sequence_length": 2048, "pad_token_id": -1, "rms_norm_eps": 1e-06, "torch_dtype": "float16"},
    "vicuna": LLAMA | {"_name_or_path": "vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"], "pretraining_tp": 1,
                       "max_position_embeddings": 4096, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
                       "rope_scaling": None, "tie_word_embeddings": False},
    "llama31": LLAMA | {"attention_bias": False, "mlp_bias": False, "eos_token_id": [128001, 128008, 128009],
                        "num_key_value_heads": 2, "rope_scaling": LLAMA3 | {"rope_type": "llama3"},
                        "rope_theta": 500000.0},
    "smollm2": LLAMA | {"is_llama_config": True, "num_key_value_heads": 4, "rope_interleaved": False,
                        "rope_theta": 100000, "tie_word_embeddings": True,
                        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}},
    "qwen2": _QWEN | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "max_position_embeddings": 32768,
                      "max_window_layers": 21, "sliding_window": 32768, "use_mrope": False},
    "qwen3": _QWEN | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False,
                      "head_dim": 128, "max_position_embeddings": 40960, "max_window_layers": 28, "rope_scaling": None,
                      "sliding_window": None},
    "mistral": _COMMON | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "bos_token_id": 1,
                          "eos_token_id": 2, "max_position_embeddings": 32768, "rms_norm_eps": 1e-05,
                          "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False},
    "phi3": _COMMON | {"_name_or_path": "Phi-3-mini-4k-instruct", "architectures": ["Phi3ForCausalLM"],
                       "model_type": "phi3", "attention_bias": False, "bos_token_id": 1, "embd_pdrop": 0.0,
                       "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "eos_token_id": 32000,
                       "max_position_embeddings": 4096, "original_max_position_embeddings": 4096,
                       "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": None,
                       "rope_theta": 10000.0, "sliding_window": 2047, "tie_word_embeddings": False},
    "gemma3_text": {key: value for key, value in _COMMON.items() if key != "hidden_act"} | {
        "_sliding_window_pattern": 6, "architectures": ["Gemma3ForCausalLM"], "attention_bias": False,
        "attn_logit_softcapping": None, "bos_token_id": 2, "eos_token_id": 1, "final_logit_softcapping": None,
        "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "layer_types": [SLIDING, FULL, SLIDING],
        "max_position_embeddings": 32768, "model_type": "gemma3_text", "pad_token_id": 0, "rms_norm_eps": 1e-06,
        "query_pre_attn_scalar": 256, "rope_local_base_freq": 10000.0, "rope_scaling": None, "rope_theta": 1000000.0,
        "sliding_window": 512, "use_bidirectional_attention": False},
}
"""The keys of published configs, with small sizes."""

READ = {
    "llama": ((8, False), Constants(norm_eps=1e-6, bos_token=0, eos_tokens=(1,))),
    "vicuna": ((8, False), Constants(max_positions=4096, bos_token=1, eos_tokens=(2,))),
    "llama31": ((8, False), Constants(norm_eps=1e-6, rope_theta=5e5, bos_token=1, eos_tokens=(128001, 128008, 128009),
                                      rope_scaling=RopeScaling(kind="llama3", factor=8.0))),
    "smollm2": ((8, True), Constants(norm_eps=1e-6, rope_theta=1e5, bos_token=1, eos_tokens=(2,))),
    "qwen2": ((8, True), Constants(norm_eps=1e-6, rope_theta=1e6, max_positions=32768, bos_token=151643,
                                   eos_tokens=(151645,), family="qwen2")),
    "qwen3": ((128, True), Constants(norm_eps=1e-6, rope_theta=1e6, max_positions=40960, bos_token=151643,
                                     eos_tokens=(151645,), family="qwen3")),
    "mistral": ((8, False), Constants(max_positions=32768, bos_token=1, eos_tokens=(2,), family="mistral",
                                      sliding_window=4096)),
    "phi3": ((8, False), Constants(max_positions=4096, bos_token=1, eos_tokens=(32000,), family="phi3",
                                   sliding_window=2047)),
    "gemma3_text": ((256, True), Constants(norm_eps=1e-6, rope_theta=1e6, max_positions=32768, bos_token=2,
                                           eos_tokens=(1,), family="gemma3_text",
                                           apart=Apart(layers=(0, 2), sliding_window=512, rope_theta=10_000.0))),
}
# fmt: on


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name):
    spec, kv_heads = spec_from_config(PUBLISHED[name], "x"), {"llama": 8, "vicuna": 8, "smollm2": 4}.get(name, 2)
    assert ((spec.head_dim, spec.tied), spec.constants) == READ[name]
    assert spec.layers == (LayerWidths(kv_heads=kv_heads, q_per_kv=8 // kv_heads, mlp=96),) * 3
    assert not spec.output_biases


FAMILIES = ("qwen2", "qwen3", "mistral", "phi3", "gemma3_text")
MIXED = {"num_experts_per_tok": 2}
FEWEST = {family: LEAST | {"num_key_value_heads": 2} for family in FAMILIES}
FEWEST["mixtral"] = FEWEST["qwen2"] | MIXED | {"num_local_experts": 4}
FEWEST["qwen3_moe"] = FEWEST["qwen2"] | MIXED | {"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 8}


@pytest.mark.parametrize("family", FEWEST)
def test_missing_keys_have_the_defaults_of_transformers(family):
    theirs = pytest.importorskip("transformers").AutoConfig.for_model(family, **FEWEST[family])
    spec = spec_from_config(FEWEST[family] | {"model_type": family}, "x")
    ours = spec.constants
    assert (theirs.max_position_embeddings, theirs.rms_norm_eps) == (ours.max_positions, ours.norm_eps)
    assert theirs.bos_token_id == ours.bos_token
    assert ours.eos_tokens == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    assert theirs.tie_word_embeddings == spec.tied
    if family in FAMILIES:
        assert theirs.sliding_window == (ours.apart or ours).sliding_window
    if family == "gemma3_text":  # of three layers none is each sixth: all are local
        assert (ours.rope_theta, ours.sliding_window, ours.apart, spec.head_dim) == (10_000.0, 4096, None, 256)
    else:
        theta = getattr(theirs, "rope_theta", None) or theirs.rope_parameters["rope_theta"]
        assert ours.rope_theta == theta
    assert spec.head_dim == (getattr(theirs, "head_dim", None) or 8)


ROPE = {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}}


@pytest.mark.parametrize(
    ("change", "theta", "scaling"),
    [
        (ROPE, 5e5, RopeScaling(kind="llama3", factor=8.0)),
        (ROPE | {"rope_scaling": LLAMA3 | {"type": "llama3"}}, 5e5, RopeScaling(kind="llama3", factor=8.0)),
        (
            {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5}},
            5e5,
            RopeScaling(kind="llama3", factor=8.0),
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 1e4, RopeScaling(kind="linear", factor=2.0)),
    ],
)
def test_old_and_new_rope_keys_agree(change, theta, scaling):
    constants = spec_from_config(LLAMA | change, "x").constants
    assert (constants.rope_theta, constants.rope_scaling) == (theta, scaling)


def test_biases_are_all_or_none_and_a_head_may_have_its_size():
    spec = spec_from_config(LLAMA | {"attention_bias": True, "mlp_bias": True, "head_dim": 16}, "x")
    assert (spec.output_biases, spec.head_dim) == (True, 16)


ON = {"use_sliding_window": True, "sliding_window": 16, "max_position_embeddings": 64}
ROPES = {FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}
ROPES |= {SLIDING: {"rope_type": "default", "rope_theta": 5e3}}
GEMMA = {"sliding_window": 32768}
SCALED = {"max_position_embeddings": 32, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}


@pytest.mark.parametrize(
    ("family", "change", "window", "apart"),
    [
        ("qwen2", ON | {"max_window_layers": 0}, 16, None),
        ("qwen2", ON | {"max_window_layers": 3}, None, None),
        ("qwen2", ON | {"layer_types": [SLIDING] * 3}, 16, None),
        ("qwen2", ON | {"max_window_layers": 1}, None, Apart(layers=(1, 2), sliding_window=16, rope_theta=1e6)),
        ("qwen3", ON | {"layer_types": [FULL] * 3}, None, None),
        ("qwen3", ON | {"max_window_layers": 1, "sliding_window": 64}, None, None),
        (
            "qwen3",
            ON | {"layer_types": [SLIDING, FULL, FULL]},
            None,
            Apart(layers=(0,), sliding_window=16, rope_theta=1e6),
        ),
        ("mistral", {"sliding_window": None}, None, None),
        ("mistral", {"sliding_window": 32768}, None, None),
        ("mistral", SCALED | {"sliding_window": 63}, 63, None),
        ("mistral", SCALED | {"sliding_window": 64}, None, None),
        ("phi3", {"sliding_window": 5}, 5, None),
        ("gemma3_text", GEMMA, None, Apart(layers=(0, 2))),
        ("gemma3_text", GEMMA | {"rope_local_base_freq": 1e6}, None, None),
        ("gemma3_text", {"layer_types": [FULL] * 3}, None, None),
        ("gemma3_text", {"layer_types": None}, 512, None),  # three layers, none of them each sixth
        (
            "gemma3_text",
            {"layer_types": None, "_sliding_window_pattern": 2},
            None,
            Apart(layers=(0, 2), sliding_window=512),
        ),
        (
            "gemma3_text",
            {"rope_parameters": ROPES, "rope_local_base_freq": None},
            None,
            Apart(layers=(0, 2), sliding_window=512, rope_theta=5e3),
        ),
    ],
)
def test_windows_and_layers_apart(family, change, window, apart):
    """Layers with a window, or with another base; where all layers have them, none is apart."""
    constants = spec_from_config(PUBLISHED[family] | change, "x").constants
    assert (constants.sliding_window, constants.apart) == (window, apart)
    assert (constants.rope_scaling is not None) == ("rope_parameters" in change)


LONGROPE = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
WHOLE = PUBLISHED | {"llama": LLAMA, "qwen3_moe": FEWEST["qwen3_moe"] | {"model_type": "qwen3_moe"}}
"""What is taken before something in it is changed."""


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", {"model_type": "gemma"}, "got 'gemma'; not a LLaMA"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures = "),
        ("llama", {"attention_bias": True}, "attention_bias = True with mlp_bias = False is not supported"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported, expected 'silu'"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"sliding_window": 4096}, "sliding_window = 4096"),
        ("llama", {"logits_scaling": 8, "auto_map": None}, "unknown attributes auto_map, logits_scaling"),
        ("llama", {"query_heads_per_kv_head": [1, 1, 1]}, "unknown attributes query_heads_per_kv_head"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type 'yarn' is not supported"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "expected factor, high_freq_factor"),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "rope_type": "llama3"}},
            "one rope_type, got 'linear' and",
        ),
        ("llama", {"rope_parameters": {"factor": 8.0}}, "expected no settings for rope type 'default', got factor"),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 1e4}, "rope_theta": 5e5},
            "one rope_theta, got 10000.0 and 5",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "expected one rope_type, got 'default' and 'linear'",
        ),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 1e9}}, "factor to be a number from 1e-06 to"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "expected factor >= 1, got 0.5"),
        ("llama", {"num_key_value_heads": 3}, "layer 0 has 8 attention heads"),
        ("llama", {"num_attention_heads": 7}, "a multiple of num_attention_heads, got hidden_size 64 and 7 heads"),
        ("llama", {"hidden_size": None}, "expected hidden_size to be a whole number from 1 to 1,048,576, got None"),
        ("llama", {"num_hidden_layers": True}, "num_hidden_layers to be a whole number from 1 to 16,384, got True"),
        ("llama", {"rope_theta": 1e300}, "rope_theta to be a number from 2 to 1e+12"),
        ("llama", {"head_dim": 3}, "even head_dim, got 3"),
        ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings to be true or false, got 'yes'"),
        ("llama", {f"key{i}": 0 for i in range(10**4)}, "unknown attributes key0, key1, key10 and 9997 more"),
        ("llama", {"x" * 10**6: 0}, "unknown attributes 'xxx"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not supported"),
        ("gemma3_text", {"hidden_activation": "gelu"}, "hidden_activation = 'gelu' is not supported"),
        ("gemma3_text", {"rope_parameters": {SLIDING: {"rope_type": "linear", "factor": 2.0}}}, "rope_parameters of"),
        ("qwen2", {"layer_types": ["linear_attention"] * 3}, "expected layer_types to be 3 of full_attention"),
        ("qwen3", {"layer_types": [SLIDING] * 3}, "expected a sliding_window beside layer_types of sliding_attention"),
        ("qwen3", {"attention_bias": True}, "attention_bias = True is not supported"),
        ("qwen3", {"num_experts": 8}, "unknown attributes num_experts"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "expected num_experts_per_tok of at most 4 experts, got 9"),
        ("qwen3_moe", {"num_local_experts": 5}, "expected one number of experts in num_experts and num_local"),
        ("qwen3_moe", {"num_experts": None}, "expected num_experts to be a whole number from"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2 is not supported, expected 1"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers = [0] is not supported"),
        ("mistral", {"layer_types": [SLIDING] * 3}, "unknown attributes layer_types"),
        ("phi3", {"rope_scaling": LONGROPE}, "rope type 'longrope' is not supported, expected default"),
        ("phi3", {"partial_rotary_factor": 0.75}, "partial_rotary_factor = 0.75 is not supported"),
    ],
)
def test_refusals(family, change, message):
    assert spec_from_config(WHOLE[family], "here")
    with pytest.raises(ValueError, match=r"^here: ") as error:
        spec_from_config(WHOLE[family] | change, "here")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("family", FAMILIES)
def test_kv_heads_that_would_be_a_surprise_must_be_said(family):
    """transformers would take 8 or 32 of them, whatever the number of heads."""
    left = {key: value for key, value in PUBLISHED[family].items() if key != "num_key_value_heads"}
    if family == "phi3":
        assert spec_from_config(left, "x").layers[0].kv_heads == 8
    else:
        with pytest.raises(ValueError, match=r"expected num_key_value_heads to be .*, got None"):
            spec_from_config(left, "x")


# --- both ways -------------------------------------------------------------------------------------


def windows_of(constants: Constants) -> list[Constants]:
    """Return constants with their window, and without."""
    apart = constants.apart and dataclasses.replace(constants.apart, sliding_window=None)
    return [constants, dataclasses.replace(constants, sliding_window=None, apart=apart)]


OTHER = Constants(norm_eps=1e-6, rope_theta=1e6, max_positions=99)
SCALINGS = (RopeScaling(kind="linear", factor=2.5), RopeScaling(kind="llama3", factor=32.0, low_freq_factor=2.0))
CONSTANTS = [dataclasses.replace(OTHER, rope_scaling=scaling) for scaling in SCALINGS]
CONSTANTS += [dataclasses.replace(OTHER, eos_tokens=ends) for ends in ((), (2,), (2, 3))]
CONSTANTS += [each for relative in RELATIVES.values() for each in windows_of(relative)]
CONSTANTS += windows_of(dataclasses.replace(RELATIVES["gemma3_text"], rope_scaling=SCALINGS[0]))


@pytest.mark.parametrize("widths", [((2, 8), (2, 8)), ((2, 8), (1, 8)), ((2, 8), (0, 0)), ((0, 8), (0, 8)), ((2, 0),)])
@pytest.mark.parametrize("biases", [False, True])
def test_round_trip(widths, biases):
    for constants in CONSTANTS:
        if constants.apart is not None and len(widths) == 1:
            continue  # its one layer has no rest that it is apart from
        channels = 5 if constants.traits.experts else None
        layers = tuple(LayerWidths(kv_heads=h, q_per_kv=3, mlp=mlp, channels=channels) for h, mlp in widths)
        spec = LlamaSpec(
            vocab=7, embed=8, head_dim=4, layers=layers, tied=True, output_biases=biases, constants=constants
        )
        config = json.loads(json.dumps(config_from_spec(spec, "float32")))
        assert spec_from_config(config, "x") == spec
        plain = spec.uniform and 0 not in widths[0] and not biases
        assert config["model_type"] == (constants.family if plain else "saap_llama")
        assert ("architectures" in config) == plain
        assert "auto_map" not in config


def test_fewer_experts_than_a_token_asks_for_are_written_by_layer():
    for constants in (each for each in CONSTANTS if each.traits.experts):
        layers = (LayerWidths(kv_heads=2, q_per_kv=2, mlp=1, channels=5),) * 2
        spec = LlamaSpec(vocab=7, embed=8, head_dim=4, layers=layers, tied=True, constants=constants)
        assert constants.experts_per_token > 1
        assert spec_from_config(config_from_spec(spec, "float32"), "x") == spec


LISTS = {"num_key_value_heads": [2, 1], "query_heads_per_kv_head": [2, 2], "per_layer_config": None}
"""Sizes of layers as versions before `per_layer_config` wrote them."""


def test_lists_of_earlier_versions_are_read():
    layers = tuple(LayerWidths(kv_heads=heads, q_per_kv=2, mlp=mlp) for heads, mlp in ((2, 8), (0, 9), (1, 0)))
    spec = LlamaSpec(vocab=7, embed=8, head_dim=4, layers=layers, tied=True)
    now = config_from_spec(spec, "float32")
    assert now["per_layer_config"] == {
        "0": {"intermediate_size": 8},
        "1": {"skip": ["attention"]},
        "2": {"num_key_value_heads": 1, "num_attention_heads": 2, "skip": ["mlp"]},
    }
    heads = {"num_key_value_heads": [2, 0, 1], "num_attention_heads": [4, 0, 2], "query_heads_per_kv_head": [2, 2, 2]}
    then = now | heads | {"intermediate_size": [8, 9, 0], "per_layer_config": None}
    assert spec_from_config(then, "x") == spec_from_config(now, "x") == spec
    wrong = now | {"per_layer_config": now["per_layer_config"] | {"2": {}}}
    assert spec_from_config(wrong, "x") != spec, "control"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": [4, 3]} | LISTS, "layer 1 has 3 attention heads .* 1 x 2"),
        ({"intermediate_size": [8]} | LISTS, "expected intermediate_size to be 2 numbers, one a layer"),
        ({"intermediate_size": [8, 2**40]} | LISTS, "expected intermediate_size to be a whole number"),
        ({"per_layer_config": {"2": {}}}, "expected per_layer_config of a layer below 2 .*, got {2: {}}"),
        ({"per_layer_config": {"1": {"head_dim": 4}}}, "some of .*intermediate_size, .* got .*head_dim"),
        ({"per_layer_config": {"1": {"skip": ["norm"]}}}, "to skip attention or mlp, got .*norm"),
        (
            {"per_layer_config": {"1": {"intermediate_size": "8"}}},
            "layer 1: expected intermediate_size to be a whole",
        ),
        ({"sliding_window": 8}, "^x: .*sliding_window: expected none in family 'llama', got 8"),
        ({"family": "gemma"}, "expected family llama, .*, got 'gemma'"),
        ({"saap_quantization": {"bits": 3, "group_size": 4, "matrices": ["query"]}}, "group_size of whole bytes"),
        ({"saap_quantization": {"bits": 4, "group_size": 4, "matrices": ["key", "query"]}}, "in this order"),
        ({"attention_bias": True}, "attention_bias = True is not supported, expected False"),
        ({"architectures": ["LlamaForCausalLM"]}, "architectures = .* is not supported"),
    ],
)
def test_refusals_of_a_config_per_layer(change, message):
    layers = tuple(LayerWidths(kv_heads=heads, q_per_kv=2, mlp=8) for heads in (2, 1))
    config = config_from_spec(LlamaSpec(vocab=7, embed=8, head_dim=4, layers=layers, tied=True), "float32") | change
    with pytest.raises(ValueError, match=message):
        _ = spec_from_config(config, "x"), quantization_from_config(config, "x")
