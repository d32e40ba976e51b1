"""Exported GGUF files in llama.cpp itself, one thread: the same logits, the same greedy text, the same tokens."""

import contextlib
import unicodedata

import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.config.use import ExportConfig
from saap_jax.export import gguf_file
from saap_jax.export.command import export_model
from saap_jax.export.gguf_file import write_gguf
from saap_jax.export.gguf_vocabulary import vocabulary_of
from saap_jax.llama.files.load import load_model
from saap_jax.llama.files.tokenizer import NORMALIZERS, load_tokenizer
from saap_jax.llama.files.write import save_model
from saap_jax.llama.segments import existing_units
from saap_jax.llama.spec import Constants
from saap_jax.surgery.cut import cut
from tests.export.models import MIXTURES, SPECS, spec_of, written
from tests.export.test_contract import ALL, refusal
from tests.export.test_gguf_vocabulary import TEXTS, trained
from tests.helpers import forward, random_keep, random_model

pytestmark = pytest.mark.llamacpp
llama_cpp = pytest.importorskip("llama_cpp_py_sync")

TOKENS = np.random.default_rng(0).integers(0, 300, 24, np.int32).tolist()


@contextlib.contextmanager
def opened(path):
    """Open a file in llama.cpp: one thread, keys and values kept in float32."""
    runtime = llama_cpp.Llama(str(path), n_ctx=256, n_threads=1, type_k="f32", type_v="f32")
    try:
        yield runtime
    finally:
        runtime.close()


def last_logits(runtime):
    """Return the logits of the last position, float32 [vocab]."""
    pointer = runtime._lib.llama_get_logits_ith(runtime._ctx, -1)
    return np.frombuffer(runtime._ffi.buffer(pointer, 4 * runtime.n_vocab), np.float32).copy()


def logits_of(path, tokens):
    """Return llama.cpp's logits after each token, float32 [seq, vocab]: the first half at once, then one by one."""
    half, rows = len(tokens) // 2, []
    with opened(path) as runtime:
        past = runtime._eval_tokens(tokens[:half], 0)
        rows.append(last_logits(runtime))
        for token in tokens[half:]:
            past = runtime._eval_tokens([token], past)
            rows.append(last_logits(runtime))
    return np.stack(rows)


def expected_logits(model, tokens):
    return np.asarray(forward(model, jnp.asarray([tokens], jnp.int32)))[0, len(tokens) // 2 - 1 :]


def file_of(model, path, dtype="float32"):
    written(model, path, dtype)
    return path


@pytest.mark.parametrize("name", [name for name in ALL if not refusal(name, "gguf")])
def test_logits(name, tmp_path):
    """Of as many tokens as the window has, where that is the context of the file; experts are chosen and weighed alike,
    in any order of the experts, and another routing would be another model."""
    model = random_model(ALL[name])
    constants, traits = model.constants, model.constants.traits
    tokens = TOKENS if traits.gguf.windows else TOKENS[: constants.sliding_window]
    expected = expected_logits(model, tokens)
    near = 1e-4 if traits.activation == "silu" else 1e-3 * np.abs(expected).max()  # a table in float16
    got = logits_of(file_of(model, tmp_path / "x.gguf"), tokens)
    np.testing.assert_allclose(got, expected, rtol=0, atol=near)
    assert np.abs(got - expected_logits(model, tokens[::-1])).max() > 0.1
    if name in MIXTURES:
        for segment in model.segments:
            segment.mlp.router[...] = segment.mlp.router[...][..., ::-1]
        assert np.abs(got - expected_logits(model, tokens)).max() > 0.1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
@pytest.mark.parametrize("name", ["uniform", "empty", "empty_biased"])
def test_other_types_run(name, dtype, tmp_path):
    """llama.cpp rounds activations too, so only near; the logits of another model would be off by their spread."""
    model = random_model(SPECS[name])
    expected = expected_logits(model, TOKENS)
    difference = logits_of(file_of(model, tmp_path / "x.gguf", dtype), TOKENS) - expected
    assert np.sqrt(np.mean(difference**2)) < 0.1 * expected.std()


class TestLayersThatDeciCannotHold:
    """Negative controls for the zeros that are added: what llama.cpp does with such layers as they are."""

    def test_attention_without_channels_is_left_out(self, tmp_path, monkeypatch):
        model = random_model(spec_of((2, 2, 24), (1, 2, 0), (2, 2, 24)))
        without = cut(model, existing_units(model.segments) | {"attention": np.array([[1, 1], [0, 0], [1, 1]], bool)})
        norm = "model.layers.1.post_attention_layernorm.weight"  # llama.cpp has none in such a layer
        tensors = gguf_file.gguf_tensors
        monkeypatch.setattr("saap_jax.export.widths.deci_widths", lambda spec: spec.layers)
        monkeypatch.setattr(gguf_file, "gguf_tensors", lambda *args: [t for t in tensors(*args) if t.name != norm])
        got = logits_of(file_of(model, tmp_path / "x.gguf"), TOKENS)
        np.testing.assert_allclose(got, expected_logits(without, TOKENS), rtol=0, atol=1e-4)
        assert np.abs(got - expected_logits(model, TOKENS)).max() > 1e-2

    def test_a_first_layer_without_heads_is_refused(self, tmp_path, monkeypatch):
        model = random_model(spec_of((0, 2, 24), (2, 2, 24)))
        monkeypatch.setattr("saap_jax.export.widths.deci_widths", lambda spec: spec.layers)
        path = file_of(model, tmp_path / "x.gguf")
        with pytest.raises(RuntimeError, match="Failed to load model"):
            logits_of(path, TOKENS)


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "smollm"])
@pytest.mark.parametrize("bos", [False, True])
def test_tokenizers_agree(pre, bos, tmp_path):
    tokenizer = trained(pre, bos=bos)
    model = random_model(spec_of((1, 1, 4), vocab=len(tokenizer) + 3))
    vocabulary = vocabulary_of(tokenizer, model.spec.vocab, Constants())
    write_gguf(model, tmp_path / "x.gguf", "float32", name="x", vocabulary=vocabulary)
    with opened(tmp_path / "x.gguf") as runtime:
        for text in TEXTS:
            text = unicodedata.normalize("NFC", text) if pre in NORMALIZERS else text
            assert runtime.tokenize(text, add_special=True, parse_special=True) == tokenizer.encode(text)


@pytest.fixture(scope="module")
def sources(smollm2, smollm2_tokenizer, tmp_path_factory):
    """SmolLM2 whole, and cut to layers of different widths, two of them without heads and two without channels."""
    keep = random_keep(existing_units(smollm2.segments), 0.95)
    keep["attention"][[5, 7]] = False
    keep["mlp"][[6, 29]] = False
    directory = tmp_path_factory.mktemp("smollm2") / "cut"
    return {"dense": "smollm2-135m", "cut": str(save_model(cut(smollm2, keep), directory, tokenizer=smollm2_tokenizer))}


@pytest.mark.parametrize("name", ["dense", "cut"])
def test_real_model(name, sources, tmp_path):
    """32 greedy tokens are those of our model, and text is split alike."""
    source = sources[name]
    exported = export_model(ExportConfig(model=source, out=str(tmp_path / "x.gguf"), format="gguf"))
    assert exported.kind == ("GGUF, architecture llama" if name == "dense" else "GGUF, architecture deci")
    model, tokenizer = load_model(source), load_tokenizer(source)
    prompt = tokenizer.encode("The capital of France is")
    tokens, rows = list(prompt), []
    with opened(tmp_path / "x.gguf") as runtime:
        past = runtime._eval_tokens(prompt, 0)
        for _ in range(32):
            rows.append(last_logits(runtime))
            tokens.append(int(rows[-1].argmax()))
            past = runtime._eval_tokens(tokens[-1:], past)
        text = "In 1912 it cost 1234.56 —  naïve café 東京 🙂\n\n\tx = y ** 2\n<|im_start|>user\nHi<|im_end|>"
        assert runtime.tokenize(text, add_special=True, parse_special=True) == tokenizer.encode(text)
    ours = np.asarray(forward(model, jnp.asarray([tokens[:-1]], jnp.int32)))[0, len(prompt) - 1 :]
    assert ours.argmax(-1).tolist() == tokens[len(prompt) :]
    np.testing.assert_allclose(np.stack(rows), ours, rtol=0, atol=2e-3)
