"""What a model is trained on: pieces of tokens, packed into rows of equal length; batches of rows.

A document of text becomes pieces of at most `length` tokens, all of which are predicted but the first. An instruction
with its response becomes one piece; the response is predicted, with the token that ends it, and the prompt is not. A
row holds several pieces. `segments` tells them apart, so that none sees another, and `positions` start anew in each:

    tokens      The  cat  sat  |  Dogs  bark  |  -
    segments     1    1    1       2     2      -1
    positions    0    1    2       0     1       0
    targets      F    T    T       F     T       F
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from saap_jax.data.chat import Exchange, around_answer, encode_chat
from saap_jax.data.sources import parse_source, read_exchanges, read_texts
from saap_jax.data.windows import beginning, tokenize
from saap_jax.recovery.shuffle import shuffled

Template = Literal["alpaca", "chat"]

OPEN = 128
"""Rows that are looked at for room, the newest ones."""

FIELDS = ("tokens", "segments", "positions", "targets")


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
    documents = []
    blank = ""
    end = tokenizer.eos_token_id
    for source in sources:
        if (instruct := parse_source(source).format == "instruct") and template == "chat":
            blank, end = around_answer(tokenizer)
        documents += [(source, each) for each in (read_exchanges if instruct else read_texts)(source, "calibration")]
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(documents))
    pieces = []
    cut = 0
    left_out = 0
    begin = beginning(tokenizer)
    for source, document in (documents[place] for place in order):
        name = f"{source} {document.name}"
        if isinstance(document, Exchange):
            if end is None:
                raise ValueError(
                    f"data source {source!r}: expected a tokenizer with an end-of-text token, which ends a response, "
                    "got one without; give text sources, or name the token in tokenizer_config.json"
                )
            prompt, response = encode_exchange(document, tokenizer, template, begin, blank)
            found = [response_piece(name, prompt, response, end, length)]
            cut += len(prompt) + len(response) + 1 > length and bool(found[0].targets.any())
        else:
            found = list(text_pieces(name, tokenize(document.text, tokenizer), length, begin))
        whole = [piece for piece in found if piece.targets.any()]
        left_out += len(found) - len(whole)
        pieces += whole
    if not pieces:
        raise ValueError(f"data: expected something to predict in {', '.join(sources)}, got none; give more text")
    return Pieces(tuple(pieces), len(documents), cut, left_out)


def text_pieces(
    name: str, tokens: Int32[np.ndarray, " tokens"], length: int, begin: Sequence[int] = ()
) -> Iterator[Piece]:
    """Cut a document into pieces of `length` tokens, the last one shorter; all but the first token are targets.

    Each begins with `begin`, as windows of evaluation do.
    """
    for start in range(0, len(tokens), size := length - len(begin)):
        piece = np.asarray([*begin, *tokens[start : start + size]], np.int32)
        yield Piece(f"{name} from {start}", piece, np.arange(len(piece)) > 0)


def response_piece(name: str, prompt: Sequence[int], response: Sequence[int], end: int, length: int) -> Piece:
    """Join prompt, response and end token, cut to `length`; what is not prompt is a target."""
    tokens = np.asarray([*prompt, *response, end], np.int32)[:length]
    targets = (np.arange(len(tokens)) >= max(len(prompt), 1)) & (len(response) > 0)
    return Piece(name, tokens, targets)


def encode_exchange(
    exchange: Exchange, tokenizer: Any, template: Template, begin: Sequence[int], blank: str = ""
) -> tuple[list[int], list[int]]:
    """Tokenise prompt and response, as they come when a model answers; `begin` is what a text begins with.

    Text of the data is spelled out, never read as a special token, in Alpaca's template. A chat template writes special
    tokens itself, so that none is added.

    The response has the tokens that it has behind the last token of the prompt, as generation decodes it: SentencePiece
    puts a blank before a text of its own.

    Args:
        blank: white space that the chat template writes before a response.

    Raises:
        ValueError: the tokenizer has no chat template, or one that fails.
    """
    response = exchange.response
    if template == "alpaca":
        prompt = [*begin, *tokenize(exchange.prompt, tokenizer).tolist()]
    else:
        prompt = encode_chat(tokenizer, exchange.said)
        response = response and blank + response
    last = tokenizer.decode(prompt[-1:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    before, whole = (tokenize(text, tokenizer).tolist() for text in (last, last + response))
    if whole[: len(before)] != before:  # they have a token in common
        return prompt, tokenize(response, tokenizer).tolist()
    return prompt, whole[len(before) :]


def split_pieces(pieces: Sequence[Piece], share: float) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """Split off the last `share` of the pieces, which is held out (at least one, if the share is not 0).

    The pieces of a document are neighbours, so at most one document has pieces in both.

    Raises:
        ValueError: one of the two would be empty.
    """
    held = 0
    if share != 0:
        held = max(1, round(share * len(pieces)))
    if held >= len(pieces):
        raise ValueError(
            f"data: expected two pieces of text or more, to hold {share:.1%} of them out, got {len(pieces)}; give more "
            "text, or data.held_out 0"
        )
    return tuple(pieces[: len(pieces) - held]), tuple(pieces[len(pieces) - held :])


# --- rows --------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Packed rows in host memory; padding is on the right, has segment -1 and is never a target."""

    tokens: Int32[np.ndarray, "rows seq"]
    segments: Int32[np.ndarray, "rows seq"]
    positions: Int32[np.ndarray, "rows seq"]
    targets: Bool[np.ndarray, "rows seq"]
    names: tuple[tuple[str, ...], ...]
    """The pieces of each row."""

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name."""
        return dict(zip(FIELDS, self[:4], strict=True))

    def first(self, count: int) -> "Rows":
        """The first rows, at most so many."""
        return self._replace(**{name: value[:count] for name, value in self._asdict().items()})

    @property
    def predicted(self) -> int:
        """Tokens that are predicted in all rows."""
        return int(self.targets.sum())


def pack(pieces: Sequence[Piece], length: int) -> Rows:
    """Put each piece into the first of the newest rows that has room for it (first fit), or into a row of its own.

    Rows have `length` tokens; no piece is longer.
    """
    rows: list[list[Piece]] = []
    room = np.zeros(len(pieces), np.int64)
    for piece in pieces:
        size = len(piece.tokens)
        oldest = max(0, len(rows) - OPEN)
        fits = np.flatnonzero(room[oldest : len(rows)] >= size)
        place = oldest + int(fits[0]) if len(fits) else len(rows)
        if place == len(rows):
            rows.append([])
            room[place] = length
        rows[place].append(piece)
        room[place] -= size
    tokens, segments, positions = np.zeros((3, len(rows), length), np.int32)
    segments[:] = -1
    targets = np.zeros((len(rows), length), bool)
    for place, row in enumerate(rows):
        start = 0
        for segment, piece in enumerate(row, start=1):
            here = place, slice(start, start + len(piece.tokens))
            tokens[here] = piece.tokens
            segments[here] = segment
            targets[here] = piece.targets
            positions[here] = np.arange(len(piece.tokens))
            start = here[1].stop
    return Rows(tokens, segments, positions, targets, tuple(tuple(piece.name for piece in row) for row in rows))


def padded_rows(rows: dict[str, np.ndarray], size: int) -> dict[str, np.ndarray]:
    """Fill up to `size` rows with padding; `row` is -1 there."""
    missing = size - len(rows["tokens"])
    blank = {"segments": -1, "row": -1}
    return {
        name: np.pad(value, [(0, missing)] + [(0, 0)] * (value.ndim - 1), constant_values=blank.get(name, 0))
        for name, value in rows.items()
    }


class Feed(Iterator[dict[str, np.ndarray]]):
    """Batches of rows, `{field: [batch, seq]}` with `row: [batch]`, the number of each.

    All rows come once an epoch, in an order drawn from seed and epoch; batches run on from one epoch to the next, and
    only the last can be short, where it is filled with padding.
    """

    def __init__(self, rows: Rows, *, batch_size: int, epochs: int, seed: int) -> None:
        self._count = len(rows.tokens)
        self._fields = rows.arrays() | {"row": np.arange(self._count, dtype=np.int32)}
        self._places = range(self._count * epochs)
        self._batch_size = batch_size
        self._next = 0
        # A batch lies in one epoch or two, where rows are not fewer than it has.
        self._order = functools.lru_cache(maxsize=2)(functools.partial(shuffled, self._count, seed))

    def __next__(self) -> dict[str, np.ndarray]:
        first = self._next * self._batch_size
        places = self._places[first : first + self._batch_size]
        if not places:
            raise StopIteration
        self._next += 1
        chosen = np.array([self._order(place // self._count)[place % self._count] for place in places])
        return padded_rows({name: value[chosen] for name, value in self._fields.items()}, self._batch_size)

    def get_state(self) -> dict[str, int]:
        """Return the place, for JSON."""
        return {"next_index": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        """Go on at a place."""
        self._next = state["next_index"]


def count_batches(rows: Rows, *, batch_size: int, epochs: int) -> int:
    """Count the batches that `Feed` gives."""
    return -(-len(rows.tokens) * epochs // batch_size)
