"""How text becomes examples: one token stream, cut into windows of equal length; scenarios are named sets of them."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from saap_jax.data.sources import join_texts, parse_source, read_texts
from saap_jax.types import Bos

_HEADING = re.compile(r"(?m)^ = [^=\n]+ = $")

Cut = Callable[[np.ndarray, int], np.ndarray]
"""Cuts windows of a length from a stream."""


class Windows(NamedTuple):
    """Examples of equal length, in host memory; `check_windows` says where they are no such.

    Padding is on the right and counts in no mean. A window may be padding throughout: it is left out.
    """

    tokens: Int32[np.ndarray, "examples seq"]
    """Numbers of words of the vocabulary, under padding too; any type of integer."""
    mask: Bool[np.ndarray, "examples seq"]
    """True on real tokens, False on padding."""


def check_windows(windows: Windows, vocab: int) -> None:
    """Raise ValueError for windows that a model of so many words does not read as they are meant, with the place."""
    tokens, mask = map(np.asarray, windows)
    integers = np.issubdtype(tokens.dtype, np.integer) and mask.dtype == bool
    if not (integers and tokens.ndim == 2 and tokens.shape == mask.shape):
        got = f"{tokens.dtype} of {list(tokens.shape)} and {mask.dtype} of {list(mask.shape)}"
        raise ValueError(
            f"windows: expected tokens, integers, and their mask, bool, both of [examples, length], got {got}; "
            "give Windows(tokens, mask)"
        )
    if not mask[:, 1:].any():
        raise ValueError(
            "windows: expected at least one window of two real tokens or more, in which one is predicted, got none of "
            f"{len(mask)}; give more text"
        )
    holes = np.argwhere(mask[:, 1:] & ~mask[:, :-1])
    if len(holes):
        row, place = holes[0]
        raise ValueError(
            f"windows: expected real tokens first and then padding, got padding at {place} before a real token at "
            f"{place + 1} of window {row}, from 0; move the padding to the end"
        )
    strange = np.argwhere((tokens < 0) | (tokens >= vocab))
    if len(strange):
        row, place = strange[0]
        raise ValueError(
            f"windows: expected tokens in 0 … {vocab - 1}, the model's vocabulary, under padding too, got "
            f"{tokens[row, place]} at {place} of window {row}, from 0; use the model's tokenizer, and 0 for padding"
        )


def tokenize(text: str, tokenizer: Any) -> Int32[np.ndarray, " tokens"]:
    """Tokenise a whole text at once, as plain text, by a tokenizer as `transformers` has it.

    No token is added (windows begin with one of their own, see `beginning`), and none is read out of the text: the
    `<unk>` of the Penn Treebank or an `<|endoftext|>` on a web page is spelled like any other word. Raises ValueError
    when the tokenizer does not honour that.
    """
    plain = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
    encoded = tokenizer(text, **plain, verbose=False)  # no warning that the stream is longer than the model's context
    tokens = np.asarray(encoded["input_ids"], np.int32).reshape(-1)
    special = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special and t.content in text}
    if (parsed := tokens[np.isin(tokens, list(special))]).size:
        raise ValueError(
            f"tokenizer: expected {special[int(parsed[0])]!r} in the text to be spelled out, got the special token "
            f"{parsed[0]}; use a tokenizer that honours split_special_tokens (a fast one)"
        )
    return tokens


def beginning(tokenizer: Any, bos: Bos = "auto") -> list[int]:
    """List the token that each window begins with, if any: the tokenizer's beginning of text.

    Args:
        bos: `auto`, where the tokenizer puts one in front of every text; `always`; or `never`.

    Raises:
        ValueError: `always`, of a tokenizer that has none.
    """
    token = getattr(tokenizer, "bos_token_id", None)
    if bos == "always" and token is None:
        raise ValueError(
            "bos: expected a tokenizer with a token for the beginning of text, got one without; take never"
        )
    if bos == "never" or token is None:
        return []
    if bos == "always" or list(tokenizer("a")["input_ids"])[:1] == [token]:
        return [token]
    return []


def consecutive_windows(
    stream: Int32[np.ndarray, " tokens"], length: int, limit: int | None = None
) -> Int32[np.ndarray, "examples seq"]:
    """Cut a stream into neighbouring windows, at most `limit` from the start; the tail is dropped.

    Raises ValueError when the stream is shorter than one window.
    """
    _check_long(stream, 1 if limit is None else min(limit, 1), length)
    if limit is None:
        count = stream.size // length
    else:
        count = min(stream.size // length, limit)
    return stream[: count * length].reshape(count, length)


def random_windows(
    stream: Int32[np.ndarray, " tokens"], examples: int, length: int, seed: int
) -> Int32[np.ndarray, "examples seq"]:
    """Draw windows that share no position: a random phase, then slots of the grid that starts there.

    Deterministic in `seed` (Philox). Raises ValueError when the stream is shorter than `examples` windows.
    """
    _check_long(stream, examples, length)
    random = np.random.Generator(np.random.Philox(seed))
    phase = int(random.integers(min(stream.size - examples * length, length - 1), endpoint=True))
    slots = random.choice((stream.size - phase) // length, size=examples, replace=False)
    return stream[phase + slots[:, None] * length + np.arange(length)]


def stratified_windows(
    stream: Int32[np.ndarray, " tokens"], examples: int, length: int, seed: int
) -> Int32[np.ndarray, "examples seq"]:
    """Draw windows that are spread over a stream: one in each of `examples` stretches of equal length.

    So whatever the stream is made of is met in proportion, up to one window. Deterministic in `seed` (Philox). Raises
    ValueError when the stream is shorter than `examples` windows.
    """
    _check_long(stream, examples, length)
    ends = np.arange(examples + 1) * stream.size // examples
    random = np.random.Generator(np.random.Philox(seed))
    starts = ends[:-1] + random.integers(np.diff(ends) - length, endpoint=True)
    return stream[starts[:, None] + np.arange(length)]


def _check_long(stream: Int32[np.ndarray, " tokens"], examples: int, length: int) -> None:
    if examples < 1 or length < 2:
        raise ValueError(f"expected 1 window or more of 2 tokens of text or more, got {examples} of {length}")
    if stream.size < examples * length:
        raise ValueError(
            f"expected at least {examples * length} tokens for {examples} x {length}, got {stream.size}; "
            "ask for less or give a longer text"
        )


def evaluation_windows(
    source: str, tokenizer: Any, length: int, limit: int | None = None, *, bos: Bos = "auto", drawn: int | None = None
) -> Windows:
    """Cut the windows that perplexity is measured on: those of the source's evaluation part, in order.

    Documents are joined by a blank line and tokenised once; see `consecutive_windows`, and with a seed `drawn`
    `stratified_windows`, which takes a `limit`. With a `beginning` each window has that many tokens of text less.

    >>> evaluation_windows("builtin:descriptions", tokenizer, length=16, limit=4).tokens.shape
    (4, 16)
    """
    tokens = tokenize(join_texts(read_texts(source, "evaluation")), tokenizer)
    return _windows(source, tokens, tokenizer, length, bos, _evaluated(limit, drawn))


def _evaluated(limit: int | None, drawn: int | None) -> Cut:
    """Make what cuts the windows of an evaluation: the first ones, or with a seed those that are drawn."""
    if drawn is None:
        return lambda stream, length: consecutive_windows(stream, length, limit)
    return lambda stream, length: stratified_windows(stream, limit or 0, length, drawn)


def window_articles(
    source: str, tokenizer: Any, length: int, limit: int | None = None, *, bos: Bos = "auto", drawn: int | None = None
) -> list[int]:
    """Number the article of each window that `evaluation_windows` cuts, which its middle is of.

    Articles are the documents of a source, and of WikiText what begins with a heading ` = Title = `. Empty where there
    is one alone, or a tokenizer does not tell where its tokens are.
    """
    documents = read_texts(source, "evaluation")
    text, ends = join_texts(documents), np.cumsum([len(document.text) + 2 for document in documents])
    if source.startswith("wikitext:"):
        heads = [found.start() for found in _HEADING.finditer(text)]
    else:
        heads = [0, *ends[:-1]]
    if len(heads) < 2 or not tokenizer.is_fast:
        return []
    plain: Any = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    places = np.array(tokenizer(text, return_offsets_mapping=True, **plain)["offset_mapping"])[:, 0]
    numbers = np.arange(len(places), dtype=np.int32)
    begun = len(beginning(tokenizer, bos))
    windows = _windows(source, numbers, tokenizer, length, bos, _evaluated(limit, drawn))
    middles = windows.tokens[:, begun + (length - begun) // 2]
    return np.searchsorted(heads, places[middles], side="right").tolist()


def calibration_windows(
    source: str, tokenizer: Any, examples: int, length: int, seed: int, *, bos: Bos = "auto"
) -> Windows:
    """Draw windows at random from the source's calibration part; see `random_windows`, and `beginning`.

    Batching comes later, so the batch size changes nothing.

    >>> calibration_windows("builtin:descriptions", tokenizer, examples=4, length=16, seed=0).tokens.shape
    (4, 16)
    """
    tokens = tokenize(join_texts(read_texts(source, "calibration")), tokenizer)
    return _windows(
        source, tokens, tokenizer, length, bos, lambda stream, size: random_windows(stream, examples, size, seed)
    )


def _windows(
    source: str, stream: Int32[np.ndarray, " tokens"], tokenizer: Any, length: int, bos: Bos, cut: Cut
) -> Windows:
    """Cut windows of a stream, each with what it begins with in front."""
    begin = beginning(tokenizer, bos)
    try:
        text = cut(stream, length - len(begin))
    except ValueError as error:
        raise ValueError(f"data source {source!r}: {error}") from None
    if begin:
        tokens = np.pad(text, ((0, 0), (len(begin), 0)), constant_values=begin[0])
    else:
        tokens = text
    return Windows(tokens, np.ones(tokens.shape, bool))


def pairs(windows: Windows, batch_size: int, vocab: int | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
    """List the windows as microbatches (tokens, mask) of one shape, so that one compiled program serves all.

    The last one is filled up with rows of token 0 that are masked throughout. Windows pass here on their way to a
    model, so here they are checked.

    Args:
        vocab: how many words the model knows that reads them; None: what they hold is not looked at.

    Raises:
        ValueError: windows that such a model does not read as they are meant, see `check_windows`.
    """
    if batch_size < 1:
        raise ValueError(f"batches: expected batch_size >= 1, got {batch_size}")
    if vocab is not None:
        check_windows(windows, vocab)
        windows = Windows(np.asarray(windows.tokens, np.int32), np.asarray(windows.mask))
    size = min(batch_size, len(windows.tokens))
    tokens, mask = (np.pad(array, ((0, -len(array) % size), (0, 0))) for array in windows)
    return [(tokens[start : start + size], mask[start : start + size]) for start in range(0, len(tokens), size)]


# --- scenarios ---------------------------------------------------------------------------------------


class Scenario(NamedTuple):
    """A calibration set: the name that results carry, and the source of its text."""

    name: str
    source: str


def parse_scenario(text: str) -> Scenario:
    """Read `name=source`, or a bare source, which is named after its file or its built-in name.

    Raises ValueError for an unknown source.

    >>> parse_scenario("web=jsonl:c4.jsonl#text")
    Scenario(name='web', source='jsonl:c4.jsonl#text')
    >>> parse_scenario("builtin:reference").name, parse_scenario("tfds:wiki40b/en@train#text").name
    ('reference', 'wiki40b-en')
    """
    named = re.fullmatch(r"([\w.-]+)=(.+)", text)
    source = named[2] if named else text
    parsed = parse_source(source)
    tfds = parsed.format == "tfds"
    if tfds:
        stem = re.split("[:@]", parsed.path)[0].replace("/", "-")
    else:
        stem = Path(parsed.path).stem
    return Scenario(named[1] if named else stem, source)


def load_scenarios(
    scenarios: Sequence[Scenario], tokenizer: Any, examples: int, length: int, seed: int, *, bos: Bos = "auto"
) -> dict[str, Windows]:
    """Draw each scenario's calibration windows: `examples` of `length` tokens.

    All are drawn with the same seed, so adding, renaming or reordering scenarios changes no other one's windows.
    Raises ValueError for no scenario at all and for a name or a source that comes twice.
    """
    if not scenarios:
        raise ValueError("scenarios: expected at least one, got none; give name=source")
    for field, values in zip(Scenario._fields, zip(*scenarios, strict=True), strict=True):
        if twice := [value for value in values if values.count(value) > 1]:
            raise ValueError(
                f"scenarios: expected each {field} once, got {twice[0]!r} twice; give name=source with another one"
            )
    return {name: calibration_windows(source, tokenizer, examples, length, seed, bos=bos) for name, source in scenarios}
