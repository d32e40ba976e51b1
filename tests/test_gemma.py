"""Gemma 3 270M itself: what llama.cpp computes and how it splits text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.llama import load_model, load_tokenizer
from saap_jax.llama.files.sources import resolve
from tests.export.test_gguf_vocabulary import TEXTS

pytestmark = pytest.mark.gemma
NAME = "gemma3-270m"
PROSE = (
    "The valley was settled late, and for a long time nobody asked to whom the river belonged. Then came a mill, and "
    "with the mill a weir, and with the weir a quarrel that outlived everyone who had begun it. "
)


@pytest.fixture(scope="module")
def model():
    return load_model(NAME)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(NAME)


def runtime(path, context=1024):
    llama_cpp = pytest.importorskip("llama_cpp_py_sync")
    return llama_cpp.Llama(str(path), n_ctx=context, n_threads=2, type_k="f32", type_v="f32")


def last_logits(opened, tokens):
    opened._eval_tokens(tokens, 0)
    pointer = opened._lib.llama_get_logits_ith(opened._ctx, -1)
    return np.frombuffer(opened._ffi.buffer(pointer, 4 * opened.n_vocab), np.float32).copy()


def our_logits(model, tokens):
    hidden = jax.jit(lambda m, t: m.hidden(t)[0])(model, jnp.asarray([tokens], jnp.int32))
    return np.asarray(model.logits(hidden[:, -1:]))[0, 0]


def test_words_are_llama_cpps(tokenizer):
    opened = runtime(resolve(NAME))
    for text in (*TEXTS, PROSE, "  two  blanks\n\n\tand more   ", "日本語 🙂 éèü"):
        assert tokenizer.encode(text) == opened.tokenize(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == tokenizer.bos_token + text


def test_logits_are_llama_cpps(model, tokenizer):
    """Behind the window of the local layers too; without the window, or with one base for all, they are others."""
    opened, tokens = runtime(resolve(NAME)), tokenizer.encode(PROSE * 20)[:700]
    expected, got = last_logits(opened, tokens), our_logits(model, tokens)
    assert np.corrcoef(expected, got)[0, 1] > 0.998  # llama.cpp rounds activations to eight bits here
    assert expected.argmax() == got.argmax()
