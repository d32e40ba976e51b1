"""GGUF files: what was written is read back as the same model, in llama.cpp's layout."""

import gguf
import numpy as np
import pytest

from saap_jax.export import gguf_file
from saap_jax.export.gguf_file import write_gguf
from saap_jax.export.gguf_vocabulary import no_vocabulary
from saap_jax.export.widths import deci_widths
from saap_jax.llama import load_model
from tests.export.models import EMPTY, LLAMA3, PLAIN, RAGGED, SPECS, UNIFORM, spec_of
from tests.helpers import changed, forward, random_model
from tests.llama.conftest import assert_same

TOKENS = np.random.default_rng(0).integers(0, 300, (2, 12), np.int32)


def written(model, path, dtype="float32"):
    return write_gguf(model, path, dtype, name="test", vocabulary=no_vocabulary())


def fields_of(path):
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def types_of(path):
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def rewritten(source, target, architecture, fields=None):
    """Copy a GGUF file with other fields, None for one that is left out."""
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(target, architecture)
    old, fields = reader.fields["general.architecture"].contents(), dict(fields or {})
    for key, field in reader.fields.items():
        if key.startswith(("GGUF.", "general.architecture")):
            continue
        name = key.removeprefix(f"{old}.")
        if (value := fields.pop(name, field.contents())) is not None:
            writer.add_key_value(key.replace(old, architecture), value, *(*field.types, None)[:2])
    for name, value in fields.items():
        if value is not None:
            writer.add_uint32(f"{architecture}.{name}", value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize("name", PLAIN)
def test_equal_layers_are_a_llama(name, tmp_path):
    model = random_model(PLAIN[name])
    result = written(model, tmp_path / "x.gguf")
    assert result == ("llama", 0, 0)
    assert_same(load_model(tmp_path / "x.gguf"), model)
    assert fields_of(tmp_path / "x.gguf")["llama.attention.head_count"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SPECS if name not in PLAIN])
def test_other_models_are_a_deci(name, tmp_path):
    model = random_model(SPECS[name])
    result = written(model, tmp_path / "x.gguf")
    assert (result.architecture, result.wider) == ("deci", 0)
    fields = fields_of(tmp_path / "x.gguf")
    layers = deci_widths(model.spec)
    assert fields["deci.feed_forward_length"] == [layer.mlp for layer in layers]
    assert fields["deci.attention.head_count_kv"] == [layer.kv_heads for layer in layers]
    assert fields["deci.attention.head_count"] == [layer.kv_heads * layer.q_per_kv for layer in layers]
    loaded = load_model(tmp_path / "x.gguf")
    assert loaded.spec.constants == model.spec.constants
    assert (result.added == 0) == (layers == model.spec.layers)
    if result.added:
        np.testing.assert_allclose(forward(loaded, TOKENS), forward(model, TOKENS), rtol=0, atol=2e-5)
    else:
        assert_same(loaded, model)


def test_a_llama_with_per_layer_numbers_is_refused(tmp_path):
    """Negative control for the architecture's name, and a file that llama.cpp would misread."""
    written(random_model(RAGGED), tmp_path / "x.gguf")
    content = (tmp_path / "x.gguf").read_bytes()
    for before in (b"deci.attention", b"deci.feed"):
        assert before in content
    rewritten(tmp_path / "x.gguf", tmp_path / "y.gguf", "llama")
    with pytest.raises(ValueError, match="expected layers of equal widths for architecture 'llama'"):
        load_model(tmp_path / "y.gguf")


def test_rows_are_permuted(tmp_path):
    """Negative control: rotary rows left as they are would be another model, here and in llama.cpp."""
    model = random_model(UNIFORM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_file, "permute", lambda values, heads: values)
        written(model, tmp_path / "x.gguf")
    assert np.abs(forward(load_model(tmp_path / "x.gguf"), TOKENS) - forward(model, TOKENS)).max() > 1e-2


def test_q8_0(tmp_path):
    model = random_model(spec_of((2, 2, 64), (2, 2, 40)))
    assert written(model, tmp_path / "x.gguf", "q8_0") == ("deci", 0, 1)
    kinds = types_of(tmp_path / "x.gguf")
    assert kinds["blk.0.ffn_down.weight"] == "Q8_0"
    assert kinds["blk.1.ffn_down.weight"] == "F16", "rows of 40 are no blocks of 32"
    assert kinds["blk.1.ffn_up.weight"] == kinds["token_embd.weight"] == "Q8_0"
    loaded, weights = load_model(tmp_path / "x.gguf"), np.asarray(model.embedding[...])
    step = np.abs(weights.reshape(-1, 32)).max(axis=1) / 127
    error = np.abs(np.asarray(loaded.embedding[...]) - weights).reshape(-1, 32).max(axis=1)
    assert (error <= step * 0.51 + 1e-3 * step * 127).all()
    assert error.max() > 0


def test_values_beyond_float16_are_refused(tmp_path):
    model = changed(random_model(UNIFORM), "segments/0/mlp/up", lambda value: value * 1e6)
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_up\.weight: holds values up to .* beyond the range of float16"):
        written(model, tmp_path / "x.gguf", "float16")
    written(model, tmp_path / "y.gguf", "bfloat16")


def test_scaling_settings_are_kept_beside_the_divisors(tmp_path):
    model = random_model(PLAIN["llama3"])
    written(model, tmp_path / "x.gguf")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    divisors = tensors["rope_freqs.weight"]
    wavelengths = 2 * np.pi * 10_000.0 ** (np.arange(0, 8, 2) / 8)
    assert divisors[wavelengths < 64 / 4] == pytest.approx(1)
    assert divisors[wavelengths > 64 / 1] == pytest.approx(8)
    assert load_model(tmp_path / "x.gguf").constants.rope_scaling == LLAMA3
    without = random_model(UNIFORM)
    written(without, tmp_path / "y.gguf")
    assert "rope_freqs.weight" not in types_of(tmp_path / "y.gguf")


def test_layers_without_heads_have_no_tensors_that_nothing_reads(tmp_path):
    model = random_model(EMPTY)
    written(model, tmp_path / "x.gguf")
    names = types_of(tmp_path / "x.gguf")
    assert "blk.2.attn_norm.weight" not in names
    assert "blk.2.attn_q.weight" not in names
    assert {"blk.2.ffn_norm.weight", "blk.0.attn_norm.weight", "blk.0.attn_q.weight"} <= names.keys()
    changed_norm = changed(model, "segments/4/attention_norm", lambda value: value * 5)
    np.testing.assert_array_equal(forward(changed_norm, TOKENS), forward(model, TOKENS))
