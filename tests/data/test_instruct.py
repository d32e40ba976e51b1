"""Instruction data: fields of Alpaca and Dolly, prompts to the letter, and what of it is to be predicted."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from saap_jax.data.chat import around_answer, exchange_of
from saap_jax.llama.generate import TextOutput
from saap_jax.recovery.packing import encode_exchange, read_pieces, response_piece, text_pieces

ALPACA = {"instruction": "Add the numbers.", "input": "1 and 2", "output": "3"}
DOLLY = {"instruction": "Say hello.", "context": "", "response": "hello", "category": "open_qa"}
CHAT = "{% for m in messages %}<|endoftext|>{{ m.role }}:{{ m.content }}{% endfor %}<|endoftext|>assistant:"


def exchanges(*records):
    return [exchange_of(f"line {number}", record, "a") for number, record in enumerate(records, start=1)]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in (ALPACA, DOLLY, {**ALPACA, "output": "  "})))
    return f"instruct:{path}"


def test_the_prompts_are_those_of_alpaca():
    alpaca, dolly = exchanges(ALPACA, DOLLY)
    assert (alpaca.response, dolly.response) == ("3", "hello")
    assert alpaca.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd the numbers.\n\n### Input:\n"
        "1 and 2\n\n### Response:\n"
    )
    assert dolly.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nSay hello.\n\n### Response:\n"
    )
    assert (alpaca.said, dolly.said) == ("Add the numbers.\n\n1 and 2", "Say hello.")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, r"line 1: expected a string field 'instruction', found fields: text \(str\)"),
        ({"instruction": "a", "output": 3}, "expected a string field 'output' or 'response'"),
        ({"instruction": "a", "input": 3, "output": "b"}, "expected a string field 'input' or 'context'"),
    ],
)
def test_other_data_is_refused_with_its_line(record, message):
    with pytest.raises(ValueError, match=message) as error:
        exchanges(record)
    assert "\n" not in str(error.value)


def test_the_response_is_predicted_and_nothing_else(source, tokenizer):
    """Counted: the tokens of the response and the one that ends it."""
    found = read_pieces([source], tokenizer, length=400, template="alpaca", seed=0)
    assert (found.documents, found.cut, found.left_out) == (3, 0, 1)  # the empty response
    assert len(found.pieces) == 2
    for piece in found.pieces:
        wanted = "3" if "line 1" in piece.name else "hello"
        learned = piece.tokens[piece.targets]
        assert learned[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(learned[:-1]) == wanted
        assert piece.targets.sum() == len(tokenizer.encode(wanted)) + 1
        assert tokenizer.decode(piece.tokens[~piece.targets]).endswith("### Response:\n")


def test_a_long_response_is_cut_and_a_long_prompt_left_out(source, tokenizer):
    whole = read_pieces([source], tokenizer, length=400, template="alpaca", seed=0)
    shorter = min(len(piece.tokens) for piece in whole.pieces)
    found = read_pieces([source], tokenizer, length=shorter - 1, template="alpaca", seed=0)
    assert (found.cut, found.left_out, len(found.pieces)) == (1, 2, 1)
    assert found.pieces[0].tokens[-1] != tokenizer.eos_token_id
    with pytest.raises(ValueError, match="expected something to predict"):
        read_pieces([source], tokenizer, length=20, template="alpaca", seed=0)


def test_special_tokens_in_the_data_are_spelled_out(tokenizer):
    (exchange,) = exchanges({**DOLLY, "response": "a<|endoftext|>b"})
    prompt, response = encode_exchange(exchange, tokenizer, "alpaca", [])
    assert tokenizer.eos_token_id not in response
    assert tokenizer.eos_token_id not in prompt


def test_a_chat_template_writes_its_own_special_tokens_once(tokenizer, monkeypatch):
    (exchange,) = exchanges(ALPACA)
    with pytest.raises(ValueError, match="expected a tokenizer with a chat template, .* data.template alpaca"):
        encode_exchange(exchange, tokenizer, "chat", [])
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    prompt, response = encode_exchange(exchange, tokenizer, "chat", [7])
    assert prompt.count(tokenizer.eos_token_id) == 2
    assert tokenizer.decode(prompt) == "<|endoftext|>user:Add the numbers.\n\n1 and 2<|endoftext|>assistant:"
    assert tokenizer.decode(response) == "3"


def sentence_pieces(template: str | None) -> PreTrainedTokenizerFast:
    """Return a tokenizer that puts a blank before every text, as those of Llama 2 and Mistral do."""
    (exchange,) = exchanges(DOLLY)
    letters = sorted(set(exchange.prompt.replace(" ", "▁") + "[/INST]<s>▁"))
    backend = Tokenizer(models.Unigram([(each, -9.0) for each in letters] + [("hello", -1.0), ("▁hello", -1.0)], 0))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template)


TURNS = "{% for m in messages %} {{ m.content }}<end_of_turn>\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "end"), [(TURNS, "<end_of_turn>"), (TURNS.replace("<", "&lt;"), "</s>")], ids=["a token", "plain text"]
)
def test_a_response_ends_as_the_chat_template_ends_it(template, end, tmp_path):
    """Of Gemma not by the end of text. An empty one is left out, whatever the template writes around it."""
    words = sentence_pieces(template)
    words.add_special_tokens({"additional_special_tokens": ["<end_of_turn>"]})
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(DOLLY | {"response": each}) + "\n" for each in ("hello", "")))
    for template, expected in (("chat", end), ("alpaca", "</s>")):
        found = read_pieces([f"instruct:{path}"], words, length=400, template=template, seed=0)
        assert (len(found.pieces), found.left_out) == (1, 1)
        assert words.convert_ids_to_tokens(int(found.pieces[0].tokens[-1])) == expected
        assert found.pieces[0].targets[-1]


SAID, ANSWER = "{{ messages[0].content }}", "{{ messages[1].content }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "behind", "answer"),
    [
        (None, "\n", "hello"),
        (f"[INST] {SAID} [/INST]{{% if messages[1:] %}} {ANSWER}", "]", " hello"),
        (f"{SAID}{{{{ bos_token }}}}{{% if messages[1:] %}}{ANSWER}", "<s>", "hello"),
        (f"{SAID}\n{{% if messages[1:] %}}<s> {ANSWER}", "\n", "hello"),
    ],
    ids=["alpaca", "blank of the template", "behind a special token", "more than a blank"],
)
def test_a_response_goes_on_from_its_prompt(template, behind, answer):
    """No blank that a tokenizer has before a text alone; what generation prints of the tokens is the response."""
    words, (exchange,) = sentence_pieces(template), exchanges(DOLLY)
    blank = around_answer(words)[0] if template else ""
    prompt, response = encode_exchange(exchange, words, "chat" if template else "alpaca", [], blank)
    assert words.decode(prompt).endswith(behind)
    output = TextOutput(words, behind=prompt[-1:])
    assert "".join([*map(output.push, response), output.finish()]) == answer
    assert words.tokenize("hello") == ["▁hello"]
    assert words.convert_ids_to_tokens(response) == (["hello"] if behind == "\n" else ["▁hello"])


def test_pieces_of_text_hold_every_token_once_and_a_first_token_is_never_a_target():
    tokens = np.arange(10, dtype=np.int32)
    pieces = list(text_pieces("a", tokens, 4))
    np.testing.assert_array_equal(np.concatenate([piece.tokens for piece in pieces]), tokens)
    assert [piece.targets.tolist() for piece in pieces] == [[False] + [True] * 3] * 2 + [[False, True]]
    begun = list(text_pieces("a", tokens, 4, [77]))
    assert [piece.tokens.tolist() for piece in begun] == [[77, 0, 1, 2], [77, 3, 4, 5], [77, 6, 7, 8], [77, 9]]
    assert not any(piece.targets[0] for piece in begun)
    assert response_piece("a", [], [5, 6], 9, 8).targets.tolist() == [False, True, True]
