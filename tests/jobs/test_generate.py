"""`saap generate` as a user meets it."""

import io
import sys

import pytest

from saap_jax.cli import main
from saap_jax.config.use import GenerateConfig
from saap_jax.contrib.serving import generate as job
from saap_jax.llama.files.load import load_model
from saap_jax.llama.files.tokenizer import load_tokenizer
from saap_jax.llama.generate import Sampling, generate
from tests.cli.test_main import refused

SHORT = ["--new-tokens", "6"]


@pytest.fixture
def words(tiny_model_directory) -> list[str]:
    return ["generate", str(tiny_model_directory)]


def expected(directory, prompts, **options) -> list[str]:
    model, tokenizer = load_model(directory), load_tokenizer(directory)
    rows = generate(model, [tokenizer.encode(p) for p in prompts], max_new_tokens=6, sampling=Sampling(**options))
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def test_several_texts_drawn(words, capsys, tiny_model_directory):
    assert main.main([*words, "the cat", "on", *SHORT, "--temperature", "1.5", "--top-k", "50", "--seed", "3"]) == 0
    first, second = expected(tiny_model_directory, ["the cat", "on"], temperature=1.5, top_k=50, seed=3)
    assert capsys.readouterr().out == f"--- 1\n{first}\n--- 2\n{second}\n"


def test_on_a_terminal_the_prompt_comes_first(words, capsys, monkeypatch, tiny_model_directory):
    first, second = expected(tiny_model_directory, ["the cat", "on"])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main.main([*words, "the cat", *SHORT]) == 0
    assert capsys.readouterr().out == f"the cat{first}\n"
    assert main.main([*words, "the cat", "on", *SHORT]) == 0
    assert capsys.readouterr().out == f"--- 1\nthe cat{first}\n--- 2\non{second}\n"


def test_a_reader_who_goes_away_is_no_error(tiny_model_directory):
    config = GenerateConfig(model=str(tiny_model_directory), prompts=("the cat",), new_tokens=6)
    texts = job.generate(config)
    next(texts)
    texts.close()  # as after a broken pipe; a generator that yields once more raises RuntimeError


def test_standard_input(words, capsys, monkeypatch, tiny_model_directory):
    monkeypatch.setattr("sys.stdin", io.StringIO("the dog"))
    assert main.main([*words, "-", *SHORT]) == 0
    assert capsys.readouterr().out == expected(tiny_model_directory, ["the dog"])[0] + "\n"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "expected one or more texts"),
        (["a", "--new-tokens", "99999"], "more than the model's 2048 positions"),
        (["a", "--temperature", "-1"], "temperature: expected a number of at least 0 (0 is greedy), got -1.0"),
        (["a", "--temperature", "1", "--top-p", "2"], "top_p: expected a probability in (0, 1], got 2.0"),
        (["a", "--temperature", "1", "--top-k", "-2"], "top_k: expected at least 1"),
        (["a", "--chat"], "chat: expected a tokenizer with a chat template"),
        (["-"], "standard input"),
        (["a", "--stop", ""], "stop: expected strings of one character or more"),
    ],
)
def test_refused(words, capsys, monkeypatch, more, message):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert message in refused(capsys, [*words, *more])
