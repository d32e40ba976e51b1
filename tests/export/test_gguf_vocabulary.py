"""Tokenizers in GGUF files: the tokenizer rebuilt from the file encodes as the one that was written."""

import itertools

import gguf
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from saap_jax.export.gguf_file import write_gguf
from saap_jax.export.gguf_vocabulary import lost, no_vocabulary, vocabulary_of
from saap_jax.llama.files.load import load_model
from saap_jax.llama.files.tokenizer import NORMALIZERS, PRE_TOKENIZERS, load_tokenizer
from saap_jax.llama.spec import Constants
from tests.export.models import fields_of, spec_of
from tests.helpers import random_model

TEXTS = [
    "the cat sat on the mat, 1234 times; DON'T 'S it's",
    "  two  spaces,\ttabs\n\n\nand new lines \r\n ",
    "naïve café — 東京 🙂 e\u0301",
    "<|begin|>the<|user|> dog",
]


def trained(pre: str, *, bos: bool = False, eos: bool = False, **changes) -> PreTrainedTokenizerFast:
    """Return a tokenizer with the named pre-tokenizer, trained on a line of text."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[pre]())
    if pre in NORMALIZERS:
        backend.normalizer = NORMALIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the cat sat on the mat and the dog's 12 logs sat on the log, it's 1999"] * 3, trainer)
    backend.add_tokens([AddedToken("<|user|>", special=False, normalized=False)])
    backend.model.ignore_merges = changes.pop("ignore_merges", pre == "llama-bpe")
    for name, value in changes.items():
        setattr(backend, name, value)
    if bos or eos:
        template = " ".join(["<|begin|>"] * bos + ["$A"] + ["<|end|>"] * eos)
        ends = [(token, backend.token_to_id(token)) for token in ("<|begin|>", "<|end|>")]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|end|>", chat_template="{{ messages }}"
    )


def pairs_of(tokenizer, vocab=None, constants=None):
    return {key: value for key, value, _ in vocabulary_of(tokenizer, vocab or len(tokenizer), constants or Constants())}


def through_a_file(tokenizer, path, vocab):
    model = random_model(spec_of((1, 1, 4), vocab=vocab))
    write_gguf(model, path, "float16", name="x", vocabulary=vocabulary_of(tokenizer, vocab, Constants()))
    return load_tokenizer(path)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
@pytest.mark.parametrize("ends", [(False, False), (True, False), (True, True)])
def test_round_trip(pre, ends, tmp_path):
    tokenizer = trained(pre, bos=ends[0], eos=ends[1])
    assert pairs_of(tokenizer)["tokenizer.ggml.pre"] == pre
    rebuilt = through_a_file(tokenizer, tmp_path / "x.gguf", len(tokenizer) + 3)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert rebuilt.encode(text) == ids
        assert rebuilt.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids, skip_special_tokens=True)
    assert rebuilt.chat_template == tokenizer.chat_template
    assert (rebuilt.bos_token, rebuilt.eos_token) == (tokenizer.bos_token, tokenizer.eos_token)


def test_of_several_chat_templates_the_default_one_is_written():
    tokenizer = trained("gpt-2")
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    assert pairs_of(tokenizer)["tokenizer.chat_template"] == "{{ messages }}"


def test_the_pre_tokenizers_differ():
    """Negative control: with another name, text comes out otherwise."""
    ids = [trained(pre).backend_tokenizer.pre_tokenizer.pre_tokenize_str("it's 1234 IT'S") for pre in PRE_TOKENIZERS]
    assert all(one != other for one, other in itertools.combinations(ids, 2))


def test_ids_and_types():
    tokenizer = trained("gpt-2")
    constants = Constants(bos_token=5, eos_tokens=(7, 8, 9))
    pairs = pairs_of(tokenizer, len(tokenizer) + 2, constants)
    ids = {key: pairs[f"tokenizer.ggml.{key}_token_id"] for key in ("bos", "eos", "eot", "eom")}
    assert ids == {"bos": 5, "eos": 7, "eot": 8, "eom": 9}
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(9)  # as Llama 3's, whose model names another end first
    named = pairs_of(tokenizer, len(tokenizer) + 2, constants)
    assert [named[f"tokenizer.ggml.{key}_token_id"] for key in ("eos", "eot", "eom")] == [9, 7, 8]
    tokens, types = pairs["tokenizer.ggml.tokens"], pairs["tokenizer.ggml.token_type"]
    assert tokens[-2:] == [f"[PAD{len(tokenizer)}]", f"[PAD{len(tokenizer) + 1}]"]
    assert types[:2] == [gguf.TokenType.CONTROL] * 2
    assert types[-3:] == [gguf.TokenType.USER_DEFINED, gguf.TokenType.UNUSED, gguf.TokenType.UNUSED]
    assert pairs["tokenizer.ggml.add_bos_token"] is False


def test_what_has_no_place_in_the_file_is_said(tmp_path):
    tokenizer, ends = trained("gpt-2"), Constants(eos_tokens=(1, 7, 8, 9))
    assert lost(tokenizer, Constants(eos_tokens=ends.eos_tokens[:3])) == (), "control"
    assert lost(tokenizer, ends)[0].endswith("end no text there: 9")
    tokenizer.add_tokens([AddedToken("<|mask|>", lstrip=True, special=True, normalized=False)])
    (said,) = lost(tokenizer, Constants())
    assert said.endswith("stand for whole words, as these do: <|mask|>")
    rebuilt = through_a_file(tokenizer, tmp_path / "x.gguf", len(tokenizer))
    assert len(rebuilt.encode("the <|mask|>")) == len(tokenizer.encode("the <|mask|>")) + 1, "a blank"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre_tokenizer": pre_tokenizers.Whitespace()}, "got BPE with pre-tokenizer Whitespace"),
        (
            {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
            "pre-tokenizer ByteLevel, normalizer None",
        ),
        ({"normalizer": normalizers.NFKC()}, "normalizer NFKC"),
        ({"normalizer": normalizers.NFC()}, "normalizer NFC"),
        ({"ignore_merges": True}, "ignore_merges True"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        pairs_of(trained("gpt-2", **changes))
    assert "--format hf, padded or ragged instead" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ends", [(), (7,), (7, 8, 9), (9, 7, 8, 5), tuple(range(12))])
@pytest.mark.parametrize("named", [False, True], ids=["without a tokenizer", "with one"])
def test_all_end_tokens_come_back(ends, named, tmp_path):
    tokenizer = trained("gpt-2")
    constants = Constants(eos_tokens=ends)
    model = random_model(spec_of((2, 2, 24), vocab=len(tokenizer), constants=constants))
    vocabulary = vocabulary_of(tokenizer, len(tokenizer), constants) if named else no_vocabulary()
    write_gguf(model, tmp_path / "x.gguf", "float32", name="test", vocabulary=vocabulary)
    found = load_model(tmp_path / "x.gguf").constants.eos_tokens
    own = (tokenizer.eos_token_id,) if named else ()
    assert set(found) == set(ends or own)
    assert ("saap.eos_token_ids" in fields_of(tmp_path / "x.gguf")) == (len(ends) > (3 if named else 0))
