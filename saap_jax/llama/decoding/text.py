"""Continue texts instead of tokens: prompts and chats encoded, tokens turned into text as they come, stop strings."""

from collections.abc import Iterator, Sequence

from saap_jax.data.chat import check_text, encode_chat
from saap_jax.llama.decoding.generate import stream
from saap_jax.llama.decoding.sample import Sampling
from saap_jax.llama.files.tokenizer import Tokenizer
from saap_jax.llama.model import Llama

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for bytes that are not (yet) a character."""


class TextOutput:
    """Turns the tokens of one row into text, piece by piece.

    A character whose bytes come in several tokens is held back until it is whole; so is text that may be the beginning
    of a stop string. The pieces together are the decoded text up to the first stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()) -> None:
        self.text = ""
        """All that was returned so far."""
        self.stopped = False
        """True once a stop string came."""
        self._tokenizer, self._stops = tokenizer, tuple(stop_strings)
        self._tokens: list[int] = []
        self._first, self._read = 0, 0  # tokens before `_first` are done with; those before `_read` were returned
        self._held = ""

    def push(self, token: int) -> str:
        """Take a token; return the text that is sure by now, often none."""
        self._tokens.append(token)
        before, now = self._decode(self._first, self._read), self._decode(self._first, len(self._tokens))
        if len(now) <= len(before) or now.endswith(_INCOMPLETE):
            return ""
        # The last tokens returned are decoded again with the next ones: some decoders drop the space of a first token.
        self._first, self._read = self._read, len(self._tokens)
        return self._release(now[len(before) :], final=False)

    def finish(self) -> str:
        """Return what was held back, when no more tokens come."""
        before, now = self._decode(self._first, self._read), self._decode(self._first, len(self._tokens))
        self._first = self._read = len(self._tokens)
        return self._release(now[len(before) :], final=True)

    def _decode(self, first: int, stop: int) -> str:
        return self._tokenizer.decode(
            self._tokens[first:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _release(self, new: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += new
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            sure = min(found)
        else:
            sure = len(self._held) - (0 if final else _begun(self._held, self._stops))
        piece, self._held = self._held[:sure], self._held[sure:]
        self.text += piece
        return piece


def stream_texts(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    stop_strings: Sequence[str] = (),
    sampling: Sampling = Sampling(),
    chat: bool = False,
    batch_size: int = 8,
) -> Iterator[tuple[int, str]]:
    """Yield (row, piece of text) as it comes; the pieces of a row make its continuation, without its stop string.

    Args:
        chat: take each prompt as what a user says, and give it to the model in its chat template.

    Raises:
        ValueError: as `stream`; no prompt, an empty stop string, no chat template, an empty prompt without BOS token.
    """
    if not prompts:
        raise ValueError("prompts: expected one or more texts, got none")
    if "" in stop_strings:
        raise ValueError("stop: expected strings of one character or more, got an empty one")
    rows = [encode_chat(tokenizer, prompt) if chat else encode_prompt(tokenizer, prompt) for prompt in prompts]
    outputs = [TextOutput(tokenizer, stop_strings) for _ in rows]
    tokens = stream(
        model,
        rows,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        batch_size=batch_size,
        finished=lambda row, _: outputs[row].stopped,
    )
    return _pieces(tokens, outputs)


def _pieces(tokens: Iterator[tuple[int, int]], outputs: list[TextOutput]) -> Iterator[tuple[int, str]]:
    for row, token in tokens:
        if piece := outputs[row].push(token):
            yield row, piece
    for row, output in enumerate(outputs):
        if piece := output.finish():
            yield row, piece


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens of a text to continue; of an empty one, the BOS token.

    Raises:
        ValueError: the text is empty and the tokenizer has no BOS token.
    """
    check_text("prompt", text)
    tokens = list(tokenizer.encode(text, verbose=False))  # who is asked for too many positions says so
    if not tokens and tokenizer.bos_token_id is None:
        raise ValueError("prompt: expected some text, got none, and the tokenizer has no BOS token to begin with")
    return tokens or [tokenizer.bos_token_id]


def _begun(text: str, stops: Sequence[str]) -> int:
    """Return the length of the longest end of a text that begins a stop string.

    >>> _begun("one\\n", ["\\n\\n", "Q:"])
    1
    """
    longest = max((len(stop) - 1 for stop in stops), default=0)
    sizes = range(min(longest, len(text)), 0, -1)
    return next((size for size in sizes if any(stop.startswith(text[-size:]) for stop in stops)), 0)
