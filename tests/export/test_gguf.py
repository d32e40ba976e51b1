"""GGUF files: what was written is read back as the same model, in llama.cpp's layout."""

import gguf
import numpy as np
import pytest

from saap_jax.export import gguf_file
from saap_jax.llama import load_model
from tests.export.models import EMPTY, LLAMA3, PLAIN, RAGGED, UNIFORM, rewritten, spec_of, types_of, written
from tests.helpers import changed, forward, random_model

TOKENS = np.random.default_rng(0).integers(0, 300, (2, 12), np.int32)


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
