"""Files of LLaMA's relatives: what their configs may say, how their tensors lie, and that what is saved is loaded."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from saap_jax.llama import Constants, LayerWidths, LlamaSpec, load_model, save_model
from saap_jax.llama.files.hf_config import config_from_spec, spec_from_config
from saap_jax.llama.files.hf_layout import stored_parameters
from saap_jax.llama.files.load import _open_directory, _read_part
from saap_jax.llama.spec import Apart, RopeScaling
from saap_jax.surgery.cut import cut
from tests.helpers import RELATIVES, random_model, relative, spec_of
from tests.llama.conftest import assert_same
from tests.llama.test_load import refuse

SIZES = {
    "vocab_size": 32000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "use_cache": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0",
}
# The keys of published configs, with small sizes.
PUBLISHED = {
    "qwen2": SIZES
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "max_position_embeddings": 32768,
        "max_window_layers": 21,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_mrope": False,
        "use_sliding_window": False,
    },
    "qwen3": SIZES
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    "mistral": SIZES
    | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
    },
    "phi3": SIZES
    | {
        "_name_or_path": "Phi-3-mini-4k-instruct",
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "attention_bias": False,
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "bos_token_id": 1,
        "embd_pdrop": 0.0,
        "eos_token_id": 32000,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "pad_token_id": 32000,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": 2047,
        "tie_word_embeddings": False,
    },
    "gemma3_text": {key: value for key, value in SIZES.items() if key != "hidden_act"}
    | {
        "_sliding_window_pattern": 6,
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "max_position_embeddings": 32768,
        "model_type": "gemma3_text",
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": 512,
        "use_bidirectional_attention": False,
    },
}


def test_published_configs():
    specs = {family: spec_from_config(config, "x") for family, config in PUBLISHED.items()}
    assert {spec.layers for spec in specs.values()} == {(LayerWidths(kv_heads=2, q_per_kv=4, mlp=96),) * 3}
    assert {family: spec.head_dim for family, spec in specs.items()} == {
        "qwen2": 8,
        "qwen3": 128,
        "mistral": 8,
        "phi3": 8,
        "gemma3_text": 256,
    }
    assert {family: spec.constants.sliding_window for family, spec in specs.items()} == {
        "qwen2": None,
        "qwen3": None,
        "mistral": 4096,
        "phi3": 2047,
        "gemma3_text": None,
    }
    assert [family for family, spec in specs.items() if spec.tied] == ["qwen2", "qwen3", "gemma3_text"]
    assert specs["gemma3_text"].constants == Constants(
        norm_eps=1e-6,
        rope_theta=1e6,
        max_positions=32768,
        bos_token=2,
        eos_tokens=(1,),
        family="gemma3_text",
        apart=Apart(layers=(0, 2), sliding_window=512, rope_theta=10_000.0),
    )
    assert specs["phi3"].constants == Constants(
        max_positions=4096, bos_token=1, eos_tokens=(32000,), family="phi3", sliding_window=2047
    )
    assert specs["qwen2"].constants == Constants(
        norm_eps=1e-6,
        rope_theta=1e6,
        max_positions=32768,
        bos_token=151643,
        eos_tokens=(151645,),
        family="qwen2",
    )


def test_missing_keys_have_the_defaults_of_the_family():
    least = {key: SIZES[key] for key in list(SIZES)[:6]}
    read = {family: spec_from_config(least | {"model_type": family}, "x") for family in PUBLISHED}
    ours = {
        family: (s.constants.max_positions, s.constants.norm_eps, s.constants.bos_token) for family, s in read.items()
    }
    assert ours == {
        "qwen2": (32768, 1e-6, None),
        "qwen3": (32768, 1e-6, None),
        "mistral": (131072, 1e-6, 1),
        "phi3": (4096, 1e-5, 1),
        "gemma3_text": (131072, 1e-6, 2),
    }
    gemma = read["gemma3_text"]  # of three layers none is each sixth: all are local
    assert (gemma.tied, gemma.head_dim, gemma.constants.rope_theta) == (True, 256, 10_000.0)
    assert (gemma.constants.sliding_window, gemma.constants.apart) == (4096, None)
    assert read["mistral"].constants.sliding_window == 4096
    assert {read[family].constants.sliding_window for family in ("qwen2", "qwen3", "phi3")} == {None}
    assert (read["qwen3"].head_dim, read["mistral"].head_dim) == (128, 8)
    transformers = pytest.importorskip("transformers")
    for family, spec in read.items():
        theirs = transformers.AutoConfig.for_model(family, **least)
        assert theirs.max_position_embeddings == spec.constants.max_positions
        assert theirs.rms_norm_eps == spec.constants.norm_eps
        assert theirs.bos_token_id == spec.constants.bos_token
        assert theirs.sliding_window == (spec.constants.apart or spec.constants).sliding_window
        eos = () if theirs.eos_token_id is None else (theirs.eos_token_id,)
        assert eos == spec.constants.eos_tokens


MIXTURES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8},
}


@pytest.mark.parametrize("family", MIXTURES)
def test_missing_keys_of_mixtures_have_the_defaults_of_the_family(family):
    least = {key: SIZES[key] for key in list(SIZES)[:6]} | MIXTURES[family]
    ours = spec_from_config(least | {"model_type": family}, "x").constants
    theirs = pytest.importorskip("transformers").AutoConfig.for_model(family, **least)
    theta = getattr(theirs, "rope_theta", None) or theirs.rope_parameters["rope_theta"]
    assert ours.rope_theta == theta == {"mixtral": 1e6, "qwen3_moe": 1e4}[family]
    assert (ours.norm_eps, ours.max_positions) == (theirs.rms_norm_eps, theirs.max_position_embeddings)


ON = {"use_sliding_window": True, "sliding_window": 16, "max_position_embeddings": 64}
SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("family", "change", "window"),
    [
        ("qwen2", ON | {"max_window_layers": 0}, 16),
        ("qwen2", ON | {"max_window_layers": 3}, None),
        ("qwen2", ON | {"layer_types": [SLIDING] * 3}, 16),
        ("qwen3", ON | {"layer_types": [FULL] * 3}, None),
        ("qwen3", ON | {"max_window_layers": 1, "sliding_window": 64}, None),
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {"sliding_window": 32768}, None),
        ("phi3", {"sliding_window": 5}, 5),
    ],
)
def test_windows(family, change, window):
    assert spec_from_config(PUBLISHED[family] | change, "x").constants.sliding_window == window


@pytest.mark.parametrize(
    ("family", "change", "apart"),
    [
        ("qwen2", ON | {"max_window_layers": 1}, Apart(layers=(1, 2), sliding_window=16, rope_theta=1e6)),
        ("qwen3", ON | {"layer_types": [SLIDING, FULL, FULL]}, Apart(layers=(0,), sliding_window=16, rope_theta=1e6)),
        ("gemma3_text", {"sliding_window": 32768}, Apart(layers=(0, 2))),
        ("gemma3_text", {"sliding_window": 32768, "rope_local_base_freq": 1e6}, None),
        ("gemma3_text", {"layer_types": [FULL] * 3}, None),
        ("gemma3_text", {"layer_types": None}, None),
        ("gemma3_text", {"layer_types": None, "_sliding_window_pattern": 2}, Apart(layers=(0, 2), sliding_window=512)),
        (
            "gemma3_text",
            {"rope_parameters": {FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                                 SLIDING: {"rope_type": "default", "rope_theta": 5e3}}, "rope_local_base_freq": None},
            Apart(layers=(0, 2), sliding_window=512, rope_theta=5e3),
        ),
    ],
)  # fmt: skip
def test_layers_apart(family, change, apart):
    """Those with a window, or with another base; where all layers have them, none is apart."""
    constants = spec_from_config(PUBLISHED[family] | change, "x").constants
    assert constants.apart == apart
    if change.get("layer_types", ()) is None and apart is None:  # three layers, none of them each sixth
        assert (constants.sliding_window, constants.rope_theta) == (512, 10_000.0)
    if "rope_parameters" in change:
        assert constants.rope_scaling == RopeScaling(kind="linear", factor=8.0)


LONGROPE = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("qwen3", {"layer_types": [SLIDING] * 3}, "expected a sliding_window beside layer_types of sliding_attention"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not supported"),
        ("gemma3_text", {"hidden_activation": "gelu"}, "hidden_activation = 'gelu' is not supported"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True is not supported"),
        ("gemma3_text", {"_sliding_window_pattern": 0, "layer_types": None}, "sliding_window_pattern to be a"),
        ("gemma3_text", {"query_pre_attn_scalar": 0}, "expected query_pre_attn_scalar to be a positive integer"),
        ("gemma3_text", {"rope_parameters": {SLIDING: {"rope_type": "linear", "factor": 2.0}}}, "rope_parameters of"),
        ("qwen2", {"layer_types": ["linear_attention"] * 3}, "expected layer_types to be 3 of full_attention"),
        ("qwen2", {"use_sliding_window": "no"}, "expected use_sliding_window to be true or false, got 'no'"),
        ("qwen2", ON | {"max_window_layers": -1}, "expected max_window_layers to be a non-negative integer, got -1"),
        ("qwen2", {"use_mrope": True}, "use_mrope = True is not supported"),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type 'yarn' is not supported"),
        ("qwen2", {"architectures": ["Qwen2ForSequenceClassification"]}, "architectures = "),
        ("qwen3", {"attention_bias": True}, "attention_bias = True is not supported"),
        ("qwen3", {"num_experts": 8}, "unknown attributes num_experts"),
        ("mistral", {"sliding_window": 0}, "expected sliding_window to be a positive integer or null, got 0"),
        ("mistral", {"layer_types": [SLIDING] * 3}, "unknown attributes layer_types"),
        ("mistral", {"num_key_value_heads": None, "num_attention_heads": 7}, "hidden_size 64 is no multiple"),
        ("phi3", {"rope_scaling": LONGROPE}, "rope type 'longrope' is not supported, expected default"),
        ("phi3", {"rope_scaling": LONGROPE | {"type": "su"}}, "rope type 'su' is not supported"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear' is not supported"),
        ("phi3", {"partial_rotary_factor": 0.75}, "partial_rotary_factor = 0.75 is not supported"),
        ("phi3", {"attention_bias": True}, "attention_bias = True is not supported"),
        ("llama", {"sliding_window": 4096, "auto_map": None, "embd_pdrop": 0.0}, "unknown attributes"),
    ],
)
def test_refusals(family, change, message):
    config = PUBLISHED.get(family, SIZES | {"model_type": "llama"})
    with pytest.raises(ValueError, match=r"^here: ") as error:
        spec_from_config(config | change, "here")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_kv_heads_that_would_be_a_surprise_must_be_said():
    """transformers would take 8 or 32 of them, whatever the number of heads."""
    for family, config in PUBLISHED.items():
        left = {key: value for key, value in config.items() if key != "num_key_value_heads"}
        if family == "phi3":
            assert spec_from_config(left, "x").layers[0].kv_heads == 8
            continue
        with pytest.raises(ValueError, match="expected num_key_value_heads, got none"):
            spec_from_config(left, "x")


@pytest.mark.parametrize("family", RELATIVES)
@pytest.mark.parametrize("widths", [((2, 8), (2, 8)), ((2, 8), (1, 8)), ((2, 8), (0, 0))])
@pytest.mark.parametrize("biases", [False, True])
def test_config_round_trip(family, widths, biases):
    channels = 5 if RELATIVES[family].traits.experts else None
    layers = tuple(LayerWidths(kv_heads=heads, q_per_kv=3, mlp=mlp, channels=channels) for heads, mlp in widths)
    for window in {RELATIVES[family].sliding_window, None}:
        constants = dataclasses.replace(RELATIVES[family], sliding_window=window)
        if (apart := constants.apart) is not None:
            layers_apart = dataclasses.replace(apart, sliding_window=window if window is None else apart.sliding_window)
            constants = dataclasses.replace(constants, apart=layers_apart)
        spec = LlamaSpec(
            vocab=7, embed=8, head_dim=4, layers=layers, tied=True, output_biases=biases, constants=constants
        )
        config = json.loads(json.dumps(config_from_spec(spec, "float32")))
        assert spec_from_config(config, "x") == spec
        assert config["model_type"] == ("saap_llama" if biases or not spec.uniform else family)
        assert "auto_map" not in config


def test_a_config_per_layer_of_an_unknown_family_is_refused():
    config = config_from_spec(spec_of((2, 8), (1, 8), constants=RELATIVES["qwen2"]), "float32")
    with pytest.raises(ValueError, match=r"^x: expected family llama, .*, got 'gemma'"):
        spec_from_config(config | {"family": "gemma"}, "x")
    with pytest.raises(ValueError, match="expected sliding_window to be a positive integer"):
        spec_from_config(config | {"sliding_window": 0}, "x")


# --- tensors -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", RELATIVES)
@pytest.mark.parametrize("widths", [((2, 6), (2, 6)), ((2, 6), (1, 3), (0, 5))], ids=["dense", "ragged"])
def test_save_and_load(family, widths, tmp_path):
    model = relative(family, *widths)
    save_model(model, tmp_path / "m")
    assert_same(load_model(tmp_path / "m"), model)
    fused = [
        name for name in load_file(tmp_path / "m" / "model.safetensors") if "qkv_proj" in name or "gate_up" in name
    ]
    assert len(fused) == (4 if family == "phi3" and len(widths) == 2 else 0)


def test_layout_of_biases_and_norms_is_hugging_face(tmp_path):
    """Head h of layer l: entries h·head_dim … of q_proj.bias are query_bias[l, h // q_per_kv, h % q_per_kv]."""
    model = relative("qwen2")
    tensors = load_file(save_model(model, tmp_path / "qwen2") / "model.safetensors")
    attention = model.segments[0].attention
    for layer, head in itertools.product(range(2), range(4)):
        prefix, rows = f"model.layers.{layer}.self_attn.", slice(4 * head, 4 * head + 4)
        np.testing.assert_array_equal(
            tensors[f"{prefix}q_proj.bias"][rows], attention.query_bias[...][layer, head // 2, head % 2]
        )
        if head < 2:
            np.testing.assert_array_equal(tensors[f"{prefix}k_proj.bias"][rows], attention.key_bias[...][layer, head])
            np.testing.assert_array_equal(tensors[f"{prefix}v_proj.bias"][rows], attention.value_bias[...][layer, head])
    qwen3 = relative("qwen3")
    tensors = load_file(save_model(qwen3, tmp_path / "qwen3") / "model.safetensors")
    norm = qwen3.segments[0].attention.query_norm[...]
    np.testing.assert_array_equal(tensors["model.layers.1.self_attn.q_norm.weight"], norm[1])


def test_fused_tensors_are_the_separate_ones_below_each_other(tmp_path):
    model = relative("phi3")
    tensors = load_file(save_model(model, tmp_path / "m") / "model.safetensors")
    attention, mlp = model.segments[0].attention, model.segments[0].mlp
    parts = [np.asarray(p[...][1]).reshape(8, -1).T for p in (attention.query, attention.key, attention.value)]
    np.testing.assert_array_equal(tensors["model.layers.1.self_attn.qkv_proj.weight"], np.concatenate(parts))
    parts = [np.asarray(p[...][1]).T for p in (mlp.gate, mlp.up)]
    np.testing.assert_array_equal(tensors["model.layers.1.mlp.gate_up_proj.weight"], np.concatenate(parts))


def test_fused_tensors_that_are_wrong_are_refused(tmp_path):
    directory = save_model(relative("phi3"), tmp_path / "m")
    path, name = directory / "model.safetensors", "model.layers.1.self_attn.qkv_proj.weight"
    tensors = load_file(path)

    def write(changes):
        save_file({key: value for key, value in (tensors | changes).items() if value is not None}, path)

    write({name: None})
    refuse(directory, f"missing tensors {name}")
    write({name: tensors[name][:-4].copy()})
    refuse(directory, f"{name} has shape [28, 8], expected [32, 8]")
    extra = "model.layers.0.mlp.up_proj.weight"
    write({extra: np.ones((6, 8), np.float32)})
    refuse(directory, f"unknown tensors {extra}; expected their rows in model.layers.0.mlp.gate_up_proj.weight")
    write({})
    assert_same(load_model(directory), relative("phi3"))


def test_missing_and_unknown_biases_are_refused(tmp_path):
    directory = save_model(relative("qwen2"), tmp_path / "m")
    path, name = directory / "model.safetensors", "model.layers.0.self_attn.k_proj.bias"
    tensors = load_file(path)
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    refuse(directory, f"missing tensors {name}")
    extra = "model.layers.0.self_attn.o_proj.bias"
    save_file(tensors | {extra: np.zeros(8, np.float32)}, path)
    refuse(directory, f"unknown tensors {extra}; not a plain LLaMA model of family qwen2")


@pytest.mark.parametrize("family", ["qwen2", "phi3"])
def test_parts_are_read_as_of_the_whole(family, tmp_path):
    """What each device of a mesh reads: half of the heads, of the channels, of the width."""
    model = relative(family)
    checkpoint = _open_directory(save_model(model, tmp_path / "m"))
    blocks = 0
    for item in stored_parameters(model)[0]:
        for position, size in enumerate(item.variable.shape):
            part = [slice(None)] * len(item.variable.shape)
            part[position] = slice(size // 2, size)
            got = _read_part(checkpoint, item, tuple(part))
            np.testing.assert_array_equal(got, np.asarray(item.variable[...])[tuple(part)])
            blocks += item.stored_part(tuple(part[1:] if item.stacked else part)) is not None
    assert blocks > 20


def test_bias_compensated_relatives_keep_both_kinds_of_biases(tmp_path):
    """Of a Qwen2 with output biases, those of query, key and value are its own: nothing drops or refuses them."""
    model = random_model(spec_of((2, 6), (2, 6), output_biases=True, constants=RELATIVES["qwen2"]))
    assert_same(load_model(save_model(model, tmp_path / "m")), model)


def test_a_cut_relative_loads_as_it_was(tmp_path):
    model = relative("qwen2", *[(2, 6)] * 3)
    keep = {"attention": np.array([[True, False], [True, True], [False, True]]), "mlp": np.ones((3, 6), bool)}
    pruned = cut(model, keep)
    assert_same(load_model(save_model(pruned, tmp_path / "m", keep=keep)), pruned)
