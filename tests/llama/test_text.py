"""Text as it comes: whole characters only, stop strings never shown, no second BOS."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from saap_jax.data import chat
from saap_jax.data.chat import encode_chat
from saap_jax.llama.generate import Sampling, TextOutput, encode_prompt, generate, stream, stream_texts
from saap_jax.llama.spec import LayerWidths, LlamaSpec
from tests.helpers import random_model

TEXT = "naïve café — 東京 🙂👩‍👩‍👧 the cat\n\nsat on the mat"


def pieces_of(tokenizer, tokens, stops=()) -> list[str]:
    output = TextOutput(tokenizer, stops)
    pieces = [output.push(token) for token in tokens]
    pieces.append(output.finish())
    assert output.text == "".join(pieces)
    return pieces


def test_characters_are_never_cut(tokenizer):
    """This tokenizer splits every character beyond ASCII into its bytes."""
    tokens = tokenizer.encode(TEXT)
    pieces = pieces_of(tokenizer, tokens)
    assert "".join(pieces) == TEXT
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert "".join(tokenizer.decode([token]) for token in tokens) != TEXT  # what a naive stream would show


@pytest.mark.parametrize("text", [TEXT, "  two  spaces,\ttabs", "1234 + 5.6"])
def test_the_packaged_tokenizer(smollm2_tokenizer, text):
    assert "".join(pieces_of(smollm2_tokenizer, smollm2_tokenizer.encode(text))) == text


def test_a_decoder_that_drops_the_first_space():
    """As SentencePiece models do: each token decoded alone would lose its space."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁the": 0, "▁cat": 1, "s": 2}, unk_token="s"))
    backend.decoder = tokenizers.decoders.Metaspace()
    words = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert pieces_of(words, [0, 1, 2, 0]) == ["the", " cat", "s", " the", ""]
    assert "".join(words.decode([token]) for token in [0, 1, 2, 0]) == "thecatsthe"
    behind = TextOutput(words, [" cat"], [0])  # of a prompt whose last token that is
    assert [behind.push(1), behind.finish(), behind.stopped] == ["", "", True]


def test_a_special_token_stops_as_a_text_does(tokenizer, model):
    """It is never printed, so it is looked for among the tokens."""
    words, count = copy.deepcopy(tokenizer), len(tokenizer)
    options = {"max_new_tokens": 12, "sampling": Sampling(temperature=1.5, seed=3)}
    (plain,) = joined(stream_texts(model, words, ["the"], **options), 1)
    drawn = [token for _, token in stream(model, [words.encode("the")], **options)]
    assert len(set(drawn)) > 2, "control"
    special = words.convert_ids_to_tokens(drawn[2])
    words.add_special_tokens({"additional_special_tokens": [special]})
    assert len(words) == count
    (stopped,) = joined(stream_texts(model, words, ["the"], stop_strings=[special], **options), 1)
    assert plain.startswith(stopped)
    assert len(stopped) < len(plain)
    words.chat_template = "{% for m in messages %}{{ m.content }}{% if loop.last and messages[1:] %}" + special
    words.chat_template += "{% endif %}{% endfor %}"  # a chat ends where its template ends an answer
    assert joined(stream_texts(model, words, ["the"], chat=True, **options), 1) == [stopped]


def test_bytes_that_never_become_a_character_are_shown_at_the_end(tokenizer):
    tokens = tokenizer.encode("ab🙂")[:-1]
    assert "".join(pieces_of(tokenizer, tokens)) == tokenizer.decode(tokens)
    assert tokenizer.decode(tokens).startswith("ab\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize("stop", ["\n\n", "cat\n\nsat", "the", "東京", "t on the m"])
def test_text_ends_before_a_stop_string(tokenizer, stop):
    pieces = pieces_of(tokenizer, tokenizer.encode(TEXT), [stop, "never there"])
    assert "".join(pieces) == TEXT[: TEXT.index(stop)]


def test_the_beginning_of_a_stop_string_is_shown_after_all(tokenizer):
    text = "one\ntwo\n"
    pieces = pieces_of(tokenizer, tokenizer.encode(text), ["\n\n"])
    assert "".join(pieces) == text
    assert pieces[tokenizer.encode(text).index(tokenizer.encode("\n")[0])] == ""


def with_bos(tokenizer, template):
    """Return a copy whose `encode` adds a BOS token."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|endoftext|>", chat_template=template)


def test_a_chat_has_one_bos(tokenizer):
    template = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    adds = with_bos(tokenizer, template)
    tokens = encode_chat(adds, "the cat")
    assert tokens.count(adds.bos_token_id) == 1
    assert adds.decode(tokens) == "<|endoftext|>user: the cat\nassistant: "
    twice = adds.encode(adds.apply_chat_template([{"role": "user", "content": "the cat"}], tokenize=False))
    assert twice.count(adds.bos_token_id) == 2  # the trap


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{", "TemplateSyntaxError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ '\\ud800' }}", r"got half of a character, '\\ud800', at 0"),
    ],
)
def test_a_template_that_fails_is_refused_in_a_line(tokenizer, template, message):
    with pytest.raises(ValueError, match=message) as caught:
        encode_chat(with_bos(tokenizer, template), "the cat")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


LONG = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
MANY = "{% for a in range(99999) %}{{ range(99999) | map('string') | join | length }}{% endfor %}"


@pytest.mark.parametrize("thread", [False, True], ids=["main thread", "another thread"])
@pytest.mark.parametrize("template", [LONG, MANY], ids=["loops", "filters"])
def test_a_template_that_does_not_end_is_refused(tokenizer, monkeypatch, template, thread):
    monkeypatch.setattr(chat, "SECONDS", 0.3)
    before = sys.gettrace()
    endless = with_bos(tokenizer, template)
    here = lambda function, *given: function(*given)  # noqa: E731
    there = lambda function, *given: ThreadPoolExecutor().submit(function, *given).result()  # noqa: E731
    run = there if thread else here
    with pytest.raises(ValueError, match=r"chat template of .*has not ended after 0\.3 seconds") as caught:
        run(encode_chat, endless, "the cat")
    assert "\n" not in str(caught.value)
    assert sys.gettrace() is before
    assert encode_chat(with_bos(tokenizer, "{{ messages[0].content }}"), "the cat") == tokenizer.encode("the cat")


def test_prompts(tokenizer):
    with pytest.raises(ValueError, match="prompt: expected text, got half of a character"):
        encode_prompt(tokenizer, "a\udc80")
    assert encode_prompt(tokenizer, "the cat") == tokenizer.encode("the cat")
    assert encode_prompt(tokenizer, "") == [tokenizer.bos_token_id]
    adds = with_bos(tokenizer, None)
    assert encode_prompt(adds, "ab")[0] == adds.bos_token_id
    with pytest.raises(ValueError, match="chat: expected a tokenizer with a chat template"):
        encode_chat(adds, "ab")
    nothing = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="expected some text, got none"):
        encode_prompt(nothing, "")


@pytest.fixture(scope="module")
def model(tokenizer):
    layers = (LayerWidths(kv_heads=2, q_per_kv=2, mlp=8), LayerWidths(kv_heads=0, q_per_kv=2, mlp=4))
    return random_model(LlamaSpec(vocab=len(tokenizer), embed=8, head_dim=4, layers=layers, tied=True))


PROMPTS = ["the cat sat", "東京", "on"]


def joined(pieces, count=3) -> list[str]:
    texts = [""] * count
    for row, piece in pieces:
        texts[row] += piece
    return texts


@pytest.mark.slow
def test_texts_are_the_decoded_tokens(model, tokenizer):
    sampling = Sampling(temperature=1.5, seed=3)
    rows = generate(model, [tokenizer.encode(p) for p in PROMPTS], max_new_tokens=12, sampling=sampling)
    ours = joined(stream_texts(model, tokenizer, PROMPTS, max_new_tokens=12, sampling=sampling))
    assert ours == [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    assert len(set(ours)) == 3
    stop = ours[0][2:4]
    stopped = joined(stream_texts(model, tokenizer, PROMPTS, max_new_tokens=12, sampling=sampling, stop_strings=[stop]))
    assert stopped == [text.partition(stop)[0] for text in ours]


def test_refused_at_the_call(model, tokenizer):
    for options, message in (
        ({"prompts": []}, "expected one or more texts"),
        ({"stop_strings": ["a", ""]}, "got an empty one"),
        ({"chat": True}, "chat template"),
        ({"max_new_tokens": 5000}, "positions"),
    ):
        with pytest.raises(ValueError, match=message):
            stream_texts(model, tokenizer, **{"prompts": ["a"], "max_new_tokens": 3, **options})
