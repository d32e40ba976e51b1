"""Gemma 3 270M itself: what llama.cpp computes and how it splits text; through every command, and back in llama.cpp."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.cli import main
from saap_jax.llama.files.load import load_keep, load_model
from saap_jax.llama.files.sources import resolve
from saap_jax.llama.files.tokenizer import load_tokenizer
from saap_jax.llama.segments import masks
from tests.export.test_gguf_vocabulary import TEXTS
from tests.helpers import forward
from tests.test_relatives import RECOVER

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


def test_the_whole_way(tokenizer, tmp_path, capsys):
    def run(*words: str) -> str:
        assert main.main([*map(str, words)]) == 0
        return re.sub(r"\s+", " ", capsys.readouterr().out)

    calibration = ["--calibration.examples", "8", "--calibration.length", "64", "--calibration.batch-size", "2"]
    runs = str(tmp_path / "runs")
    judged = ["--evaluation.windows", "4", "--evaluation.length", "64", "--methods", "random", "gate_fisher"]
    text = run("compare", "--model.name", NAME, *calibration, "--runs", runs, "--ratios", "0.2", *judged)
    assert "gate_fisher" in text
    pruned = tmp_path / "pruned"
    method = "fused > within(protect=(0.13, -0.07)) > uniform > least_squares"
    words = ["--ratio", "0.2", "--out", pruned, "--method", method]
    assert "asked 20.00%" in run("prune", "--model.name", NAME, *calibration, *words)
    whole, small = load_model(NAME), load_model(pruned)
    assert small.constants == whole.constants
    assert masks(load_keep(pruned))["mlp"].shape == (18, 2048)
    data = tmp_path / "text.txt"
    data.write_text(PROSE * 40)
    recovery = ["--method.name", "lora", "--data.sources", f"text:{data}", *RECOVER]
    run("recover", "--model", pruned, "--dense", NAME, "--runs", runs, "--name", "lora", *recovery)
    recovered = tmp_path / "runs" / "lora" / "model"
    assert "ppl@64" in run("evaluate", recovered, "--windows", "4", "--length", "64")
    assert run("generate", recovered, "The river", "--new-tokens", "8")
    out = tmp_path / "pruned.gguf"
    assert "architecture gemma3" in run("export", recovered, out, "--format", "gguf")
    tokens = tokenizer.encode(PROSE)
    expected = np.asarray(forward(load_model(recovered), jnp.asarray([tokens], jnp.int32)))[0, -1]
    got = last_logits(runtime(out), tokens)
    np.testing.assert_allclose(got, expected, rtol=0, atol=5e-3 * np.abs(expected).max())
    assert np.abs(got - our_logits(whole, tokens)).max() > 0.1
