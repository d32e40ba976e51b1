"""GGUF files: the same model as the Hugging Face directory that they would be converted from."""

import gguf
import numpy as np
import pytest

from saap_jax.llama.files.gguf import _scaling_of_factors
from saap_jax.llama.files.load import load_model
from saap_jax.llama.spec import RopeScaling
from tests.llama.conftest import assert_same, spec_of

SPEC = spec_of((2, 12), (2, 12))
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
FIELDS = {
    "block_count": 2,
    "context_length": 2048,
    "embedding_length": 16,
    "feed_forward_length": 12,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
}


def permute(weights, heads):
    """What llama.cpp's converter does to query and key rows (convert_hf_to_gguf.py)."""
    return weights.reshape(heads, 2, weights.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weights.shape)


def gguf_tensors(tensors):
    """Rename and reorder Hugging Face tensors as the converter does."""
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    result = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix(".weight")
        if stem in whole:
            result[whole[stem] + ".weight"] = tensor
            continue
        _, _, layer, rest = stem.split(".", 3)
        heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(rest)
        result[f"blk.{layer}.{NAMES[rest]}.weight"] = permute(tensor, heads) if heads else tensor
    return result


def write(path, tensors, fields=FIELDS, architecture="llama", others=()):
    """Write a GGUF file; `others` are numbers by their whole key."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in dict(others).items():
        writer.add_uint32(key, value)
    for key, value in fields.items():
        match value:
            case str():
                writer.add_string(f"llama.{key}", value)
            case int():
                writer.add_uint32(f"llama.{key}", value)
            case float():
                writer.add_float32(f"llama.{key}", value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def pair(saved, tmp_path):
    """A model loaded from its directory, its tensors under GGUF names, and where to write a file."""
    checkpoint = saved(SPEC)
    checkpoint.config |= {"bos_token_id": None, "eos_token_id": None}
    checkpoint.write_config()
    return load_model(checkpoint.directory), gguf_tensors(checkpoint.tensors), tmp_path / "model.gguf"


def test_equals_the_directory(pair):
    model, tensors, path = pair
    assert_same(load_model(write(path, tensors)), model)


@pytest.mark.parametrize("ends", [(5,), (5, 9), (5, 5, 9)])
def test_ends_of_turns_and_messages_are_ends_too(pair, ends):
    _, tensors, path = pair
    named = {f"tokenizer.ggml.{key}_token_id": end for key, end in zip(("eos", "eot", "eom"), ends, strict=False)}
    assert load_model(write(path, tensors, others=named)).spec.constants.eos_tokens == tuple(sorted(set(ends)))


def test_tied_and_half_precision(pair):
    model, tensors, path = pair
    del tensors["output.weight"]
    tensors["blk.0.ffn_up.weight"] = tensors["blk.0.ffn_up.weight"].astype(np.float16)
    loaded = load_model(write(path, tensors))
    assert loaded.spec.tied
    expected = np.asarray(model.segments[0].mlp.up[...][0]).astype(np.float16)
    np.testing.assert_array_equal(loaded.segments[0].mlp.up[...][0], expected.astype(np.float32))


def llama3_factors(factor, head_dim, theta):
    """Frequency divisors that the converter writes for Llama 3.1 (its loop, in its words)."""
    divisors = []
    for frequency in 1.0 / theta ** (np.arange(0, head_dim, 2) / head_dim):
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4:
            divisors.append(1)
        elif wavelength > 8192 / 1:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_factors_are_recognised(factor):
    """The sizes of Llama 3.1 8B; some of its divisors lie between 1 and the factor."""
    factors = llama3_factors(factor, 128, 5e5)
    assert np.sum((factors > 1) & (factors < factor)) > 3
    assert _scaling_of_factors(factors, 5e5, 128, "x", {}) == RopeScaling(kind="llama3", factor=factor)
    factors[np.argmax(factors > 1)] *= 1.01
    with pytest.raises(ValueError, match=r"rope_freqs\.weight is no llama3 scaling"):
        _scaling_of_factors(factors, 5e5, 128, "x", {})


@pytest.mark.parametrize(("theta", "scaling"), [(1e4, None), (5e7, RopeScaling(kind="llama3", factor=8.0))])
def test_llama3_factors_in_a_file(pair, theta, scaling):
    _, tensors, path = pair
    tensors["rope_freqs.weight"] = llama3_factors(8.0, 4, theta)
    assert load_model(write(path, tensors, FIELDS | {"rope.freq_base": theta})).constants.rope_scaling == scaling


@pytest.mark.parametrize(
    "fields",
    [
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        {"rope.scaling.factor": 4.0},
        {"rope.scale_linear": 4.0},
    ],
)
def test_linear_scaling(pair, fields):
    _, tensors, path = pair
    scaling = load_model(write(path, tensors, FIELDS | fields)).constants.rope_scaling
    assert scaling == RopeScaling(kind="linear", factor=4.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope.scaling.type": "yarn"}, "llama.rope.scaling.type = 'yarn' is not supported"),
        ({"rope.dimension_count": 2}, "llama.rope.dimension_count = 2 is not supported, expected head_dim 4"),
        ({"expert_count": 8}, "expected llama.expert_used_count to be a whole number from 1 to 65,536, got None"),
        ({"attention.sliding_window": 512}, "unknown attributes llama.attention.sliding_window"),
        ({"attention.head_count_kv": 3}, "no multiple of 3"),
        ({"rope.freq_base": 1e-3}, "llama.rope.freq_base to be a number from 2 to"),
        ({"block_count": 400}, "missing tensors model.layers.10.input_layernorm.weight"),
    ],
)
def test_metadata_refusals(pair, fields, message):
    _, tensors, path = pair
    with pytest.raises(ValueError, match=r"model\.gguf") as error:
        load_model(write(path, tensors, FIELDS | fields))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_other_architecture(pair):
    _, tensors, path = pair
    with pytest.raises(
        ValueError, match="expected architecture llama, deci, qwen2, qwen3, phi3, gemma3, qwen3moe, got 'gemma'"
    ):
        load_model(write(path, tensors, architecture="gemma"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blk.0.attn_q.bias": np.zeros(16, np.float32)}, "unknown tensor blk.0.attn_q.bias"),
        ({"blk.1.ffn_up.weight": None}, "missing tensors model.layers.1.mlp.up_proj.weight"),
        ({"rope_freqs.weight": np.array([1.0, 3.0], np.float32)}, "rope_freqs.weight is no llama3 scaling"),
    ],
)
def test_tensor_refusals(pair, change, message):
    _, tensors, path = pair
    with pytest.raises(ValueError, match=message):
        load_model(write(path, {name: each for name, each in (tensors | change).items() if each is not None}))


# --- where tensors lie ---------------------------------------------------------------------------


def moved(tensor, offset):
    """Make an accident that gives a tensor of a file another offset."""

    def harm(reader):
        reader.tensors[tensor].field.parts[-1][0] = offset

    return harm


def aligned(alignment):
    """Make an accident that changes the alignment which a file says."""

    def harm(reader):
        reader.fields["general.alignment"].parts[-1][0] = alignment

    return harm


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (moved(1, 2**64 - 32), "at offset 3,072, behind the one before it by the alignment of 32, got 18,446,744"),
        (moved(1, 0), "at offset 3,072, behind the one before it by the alignment of 32, got 0"),
        (moved(1, 3072 + 32), "at offset 3,072, behind the one before it by the alignment of 32, got 3,104"),
        (aligned(8), "expected the tensors to end with the file"),
        (aligned(512), "expected a whole GGUF file, which cannot be read"),
    ],
    ids=["beyond 64 bits", "overlap", "hole", "smaller alignment", "larger alignment"],
)
def test_tensors_lie_one_behind_the_other(pair, harm, message):
    model, tensors, path = pair
    write(path, tensors, others={"general.alignment": 32})
    assert_same(load_model(path), model)
    reader = gguf.GGUFReader(path, "r+")
    harm(reader)
    reader.data.flush()
    with pytest.raises(ValueError, match=r"model\.gguf: expected ") as error:
        load_model(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_ends_with_its_tensors(pair):
    model, tensors, path = pair
    content = write(path, tensors).read_bytes()
    path.write_bytes(content + bytes(8))
    with pytest.raises(ValueError, match="expected the tensors to end with the file, after"):
        load_model(path)
    path.write_bytes(content)
    assert_same(load_model(path), model)


@pytest.mark.parametrize("said", [47, 49, 48])
def test_a_vocabulary_is_as_large_as_said(pair, said):
    _, tensors, path = pair
    rows = len(tensors["token_embd.weight"])
    write(path, tensors, FIELDS | {"vocab_size": said})
    if said == rows:
        assert load_model(path).spec.vocab == said
        return
    with pytest.raises(ValueError, match=f"llama.vocab_size to be the {rows} rows of token_embd.weight, got {said}"):
        load_model(path)
