"""Every format and every model: read back it computes the same, with as many zeros as are said; or it is refused."""

import re

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from saap_jax.export.hf import REMOTE
from saap_jax.export.widths import deci_widths
from saap_jax.llama.files.families import FAMILIES
from saap_jax.llama.files.layout import unread
from saap_jax.llama.files.load import load_model
from saap_jax.llama.spec import Constants
from saap_jax.structures.discovery import count_parameters
from tests.export.models import MIXTURES, PLAIN, RELATIVES, SPECS, config_of, fields_of, spec_of, types_of, written
from tests.helpers import forward, random_model
from tests.llama.conftest import assert_same

ALL = (
    SPECS
    | RELATIVES
    | MIXTURES
    | {
        "three heads": spec_of((3, 1, 8), (3, 1, 8)),
        "qwen2-narrow": spec_of((1, 2, 24), (2, 2, 17), (0, 1, 9), constants=Constants(family="qwen2")),
    }
)
FORMS = ("hf", "padded", "ragged", "nas", "gguf")
TOKENS = np.random.default_rng(0).integers(0, 300, (2, 12), np.int32)
ALIKE = {*PLAIN, "gemma3_text-apart", *(name for name in ALL if name.endswith(("-uniform", "-cut")))}
"""Layers of one width, as plain models have them."""
OWN = {"ragged": ("saap_llama", "SaapLlamaForCausalLM"), "nas": ("nemotron-nas", "DeciLMForCausalLM")}
"""Form -> model type and architecture that are not the family's."""
PER_LAYER = ("llama", "mistral", "phi3")
"""Families of whose layers llama.cpp takes a width each; the others get zeros."""


def refusal(name: str, form: str) -> str:
    """Return what a format says that cannot hold a model; nothing where it can."""
    family = ALL[name].constants.family
    if form == "hf" and name not in ALIKE:
        got = {
            "ragged": "got 1 to 3 KV heads, 5 to 24 MLP channels",
            "groups": "1 to 2 KV heads, 1 to 4 query heads a KV head",
            "three heads": "got 3 attention heads, which transformers refuses beside a hidden size of 32",
            "nothing": "got layers without heads or channels",
        }
        return "the allocation uniform" if name in MIXTURES else f"{got.get(name, '')}.*padded .*gguf"
    if form in ("padded", "ragged", "nas") and name in MIXTURES:
        return f"expected a model without experts, got a {family}; choose --format hf"
    if form == "nas" and (family in ("mistral", "qwen3", "phi3", "gemma3_text") or ALL[name].output_biases):
        return "expected no norms of heads, windows or biases of output projections.*choose --format padded"
    if form == "ragged" and family == "gemma3_text":
        return "got a gemma3_text with .* padded or gguf"
    if form == "gguf" and name in ("qwen2-ragged", "qwen2-empty"):
        return "heads of a qwen2 to be together as wide as its embeddings, 32, got at"
    return ""


CASES = [
    pytest.param(name, form, marks=() if name in PLAIN or form in ("ragged", "nas") else pytest.mark.slow)
    for form in FORMS
    for name in ALL
]


@pytest.mark.parametrize(("name", "form"), CASES)
def test_what_is_written_is_the_model(name, form, tmp_path):
    model, place = random_model(ALL[name]), tmp_path / ("x.gguf" if form == "gguf" else "x")
    if said := refusal(name, form):
        with pytest.raises(ValueError, match=f"format {form}: .*{said}") as error:
            written(model, place, form=form)
        assert "\n" not in str(error.value)
        if form == "hf" and name not in MIXTURES:
            named = re.findall(r"(padded|ragged|nas) \(", str(error.value))
            assert named == [each for each in ("padded", "ragged", "nas") if not refusal(name, each)]
        assert not place.exists() or not [*place.iterdir()]
        return
    found = written(model, place, form=form)
    loaded = load_model(place)
    constants, traits = model.constants, model.constants.traits
    if form == "gguf":
        added = found.added
        check_gguf(name, model, found, place, loaded)
    else:
        added, config = found, config_of(place)
        stored = load_file(place / "model.safetensors")
        absent = unread(loaded.spec) if form == "nas" else {}  # norms that nothing reads
        norms = sum(np.prod(shape, dtype=int) for shape in absent.values())
        assert sum(tensor.size for tensor in stored.values()) == count_parameters(model) + added - norms
        assert not stored.keys() & absent.keys()
        own = (constants.family, traits.architecture)
        own = OWN.get(form, own)
        assert (config["model_type"], *config["architectures"]) == own
        assert any("qkv_proj" in each for each in stored) == (traits.fused and form not in OWN)
        if form == "ragged":
            assert all((place / file.name).read_bytes() == file.read_bytes() for file in REMOTE.glob("*_saap_llama.py"))
        if form == "nas":
            check_blocks(model, config, stored)
    if form in ("hf", "ragged"):
        assert_same(loaded, model)
        return
    assert form == "nas" or loaded.spec.uniform or (form, constants.family in PER_LAYER) == ("gguf", True)
    assert count_parameters(loaded) == count_parameters(model) + added or model.spec.output_biases
    near = 1e-4 if constants.family == "gemma3_text" else 2e-5
    np.testing.assert_allclose(forward(loaded, TOKENS), forward(model, TOKENS), rtol=0, atol=near)
    assert np.abs(forward(loaded, TOKENS) - forward(model, TOKENS[::-1])).max() > 0.1, "control"


def check_blocks(model, config, stored):
    """Hold tensors against the shapes that vLLM 0.33 allocates of such a config, by the rules of its `nemotron_nas`."""
    heads, head_dim, embed = (config[key] for key in ("num_attention_heads", "head_dim", "hidden_size"))
    expected = {"model.embed_tokens.weight": (config["vocab_size"], embed), "model.norm.weight": (embed,)}
    expected |= {} if config["tie_word_embeddings"] else {"lm_head.weight": expected["model.embed_tokens.weight"]}
    for layer, (block, widths) in enumerate(zip(config["block_configs"], model.spec.layers, strict=True)):
        at, attention, ffn = f"model.layers.{layer}.", block["attention"], block["ffn"]
        assert "ffn_mult" not in ffn, "which would be read first"
        assert attention["no_op"] == (layer > 0 and not widths.kv_heads), "the first norm opens the residual stream"
        if not attention["no_op"]:
            kv = heads // attention["n_heads_in_group"] * head_dim
            sizes = {"q": heads * head_dim, "k": kv, "v": kv}
            expected |= {f"{at}self_attn.{part}_proj.weight": (size, embed) for part, size in sizes.items()}
            expected |= {f"{at}self_attn.o_proj.weight": (embed, heads * head_dim)}
            expected |= {f"{at}input_layernorm.weight": (embed,)}
            if config["qkv_bias"]:
                expected |= {f"{at}self_attn.{part}_proj.bias": (size,) for part, size in sizes.items()}
        if not ffn["no_op"]:
            assert ffn["intermediate_size"] == widths.mlp, "MLPs are as they are"
            wide = (ffn["intermediate_size"], embed)
            expected |= {f"{at}mlp.gate_proj.weight": wide, f"{at}mlp.up_proj.weight": wide}
            expected |= {f"{at}mlp.down_proj.weight": wide[::-1], f"{at}post_attention_layernorm.weight": (embed,)}
    assert {name: tensor.shape for name, tensor in stored.items()} == expected


def check_gguf(name, model, found, path, loaded):
    """Hold a file against the architecture that llama.cpp computes a family by."""
    family, gguf_traits, fields = model.constants.family, model.constants.traits.gguf, fields_of(path)
    deci = name not in (*ALIKE, "three heads") and family in PER_LAYER
    like_llama = family == "mistral" or name == "phi3-cut"
    assert found.architecture == ("deci" if deci else "llama" if like_llama else gguf_traits.architecture)
    assert found.wider == 0
    like = "mistral" if model.constants.sliding_window else "llama"
    assert loaded.constants.family == (like if deci or like_llama else family)
    assert loaded.constants.sliding_window == model.constants.sliding_window
    assert loaded.constants.positions == model.constants.positions
    assert fields[f"{found.architecture}.context_length"] == (
        model.constants.max_positions if gguf_traits.windows else model.constants.sliding_window or
        model.constants.max_positions
    )  # fmt: skip
    if deci:
        widths = deci_widths(model.spec)
        assert fields["deci.feed_forward_length"] == [layer.mlp for layer in widths]
        assert fields["deci.attention.head_count_kv"] == [layer.kv_heads for layer in widths]
        assert fields["deci.attention.head_count"] == [layer.kv_heads * layer.q_per_kv for layer in widths]
    else:
        assert (found.added > 0) == (name not in (*ALIKE, "three heads") or name == "qwen2-cut")
    names = types_of(path)
    assert ("blk.0.attn_q.bias" in names) == (family == "qwen2")
    assert ("blk.0.attn_k_norm.weight" in names) == (family in ("qwen3", "gemma3_text", "qwen3_moe"))
    assert ("blk.1.attn_qkv.weight" in names) == (name == "phi3-uniform")
    if name in MIXTURES:
        check_experts(model, {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}, fields, found)


def check_experts(model, tensors, fields, found):
    """As llama.cpp's converter stacks them, `[experts, outputs, inputs]`, with zeros beside narrower ones."""
    family, mlp, layers = model.constants.family, model.segments[-1].mlp, model.spec.layers
    channels = "expert_feed_forward_length" if family == "qwen3_moe" else "feed_forward_length"
    for key, value in (("expert_count", 6), ("expert_used_count", 2), (channels, 24)):
        assert fields[f"{found.architecture}.{key}"] == value
    wide = layers[-1].channels
    for name, ours, order in (("gate", mlp.gate, (1, 2, 0)), ("up", mlp.up, (1, 2, 0)), ("down", mlp.down, (0, 2, 1))):
        expected = np.asarray(ours[...][-1]).transpose(order)  # ours: embed, experts, channels; or experts first
        got = tensors[f"blk.1.ffn_{name}_exps.weight"]
        np.testing.assert_array_equal(got[:, :, :wide] if name == "down" else got[:, :wide], expected)
    np.testing.assert_array_equal(tensors["blk.1.ffn_gate_inp.weight"], np.asarray(mlp.router[...][-1]).T)
    assert found.added == (6 * 3 * 32 * (24 - 17) + 2 * 32 * 8 * (1 + 2) if wide == 17 else 0)


def test_every_family_with_experts_is_here():
    assert {family for family, traits in FAMILIES.items() if traits.experts} == {
        spec.constants.family for spec in MIXTURES.values()
    }
