"""What a model is trained on: pieces of tokens, of which some are to be predicted.

A document of text becomes pieces of at most `length` tokens, all of which are predicted but the first. An instruction
with its response becomes one piece; the response is predicted, with the token that ends it, and the prompt is not.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from saap_jax.data.chat import encode_chat
from saap_jax.data.instruct import Exchange
from saap_jax.data.sources import Document, parse_source, read_exchanges, read_texts
from saap_jax.data.windows import beginning, tokenize

Template = Literal["alpaca", "chat"]


class Piece(NamedTuple):
    """Tokens that belong together, and which of them are to be predicted from those before; never the first one."""

    name: str
    tokens: Int32[np.ndarray, " tokens"]
    targets: Bool[np.ndarray, " tokens"]


class Pieces(NamedTuple):
    """All pieces of some sources, shuffled by document, and what became of the documents."""

    pieces: tuple[Piece, ...]
    documents: int
    cut: int
    """Responses that lost their end because prompt and response are longer than `length`."""
    left_out: int
    """Pieces without a token to predict: empty responses, prompts of `length` tokens or more, rests of one token."""


def read_pieces(sources: Sequence[str], tokenizer: Any, *, length: int, template: Template, seed: int) -> Pieces:
    """Read text and instruction sources (of built-in ones the calibration part) as pieces of at most `length` tokens.

    Documents of all sources are shuffled together; the pieces of a document stay neighbours, in order.

    Raises:
        ValueError: bad input, or nothing to predict in all of it.
    """
    documents = [(source, each) for source in sources for each in _documents(source)]
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(documents))
    pieces, cut, left_out = [], 0, 0
    begin, end = beginning(tokenizer), tokenizer.eos_token_id
    for source, document in (documents[place] for place in order):
        if isinstance(document, Document):
            found = list(text_pieces(f"{source} {document.name}", tokenize(document.text, tokenizer), length))
        else:
            if end is None:
                raise ValueError(
                    f"data source {source!r}: expected a tokenizer with an end-of-text token, which ends a response, "
                    "got one without; give text sources, or name the token in tokenizer_config.json"
                )
            prompt, response = encode_exchange(document, tokenizer, template, begin)
            found = [response_piece(f"{source} {document.name}", prompt, response, end, length)]
            cut += len(prompt) + len(response) + 1 > length and bool(found[0].targets.any())
        whole = [piece for piece in found if piece.targets.any()]
        left_out += len(found) - len(whole)
        pieces += whole
    if not pieces:
        raise ValueError(f"data: expected something to predict in {', '.join(sources)}, got none; give more text")
    return Pieces(tuple(pieces), len(documents), cut, left_out)


def text_pieces(name: str, tokens: Int32[np.ndarray, " tokens"], length: int) -> Iterator[Piece]:
    """Cut a document into pieces of `length` tokens, the last one shorter; all but the first token are targets."""
    for start in range(0, len(tokens), length):
        piece = tokens[start : start + length]
        yield Piece(f"{name} from {start}", piece, np.arange(len(piece)) > 0)


def response_piece(name: str, prompt: Sequence[int], response: Sequence[int], end: int, length: int) -> Piece:
    """Join prompt, response and end token, cut to `length`; what is not prompt is a target."""
    tokens = np.asarray([*prompt, *response, end], np.int32)[:length]
    targets = (np.arange(len(tokens)) >= max(len(prompt), 1)) & (len(response) > 0)
    return Piece(name, tokens, targets)


def encode_exchange(
    exchange: Exchange, tokenizer: Any, template: Template, begin: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Return the tokens of the prompt and of the response, as they come when a model answers.

    Text of the data is spelled out, never read as a special token, in Alpaca's template. A chat template writes special
    tokens itself, so that none is added.

    Args:
        begin: the tokens that a text begins with.

    Raises:
        ValueError: the tokenizer has no chat template, or one that fails.
    """
    response = tokenize(exchange.response, tokenizer).tolist()
    if template == "alpaca":
        return [*begin, *tokenize(exchange.prompt, tokenizer).tolist()], response
    if not tokenizer.chat_template:
        raise ValueError("data.template: expected a tokenizer with a chat template, got one without; take alpaca")
    return encode_chat(tokenizer, exchange.said), response


def _documents(source: str) -> Sequence[Document | Exchange]:
    if parse_source(source).format == "instruct":
        return read_exchanges(source)
    return read_texts(source, "calibration")
