"""Continue prompts: two compiled programs, `prefill` for the prompts and `decode_steps` for the tokens after them.

Each compiles once a shape. Prompt lengths, cache sizes and batches are rounded up to few sizes, so that few programs
are needed; how tokens are drawn and which ones stop are inputs. Many tokens are made in one call of `decode_steps`,
where nobody has to see each of them at once. Below, the same for texts: stop strings, and characters of several tokens.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from saap_jax.data.chat import around_answer, check_text, encode_chat
from saap_jax.llama.decoder import Cache, Sampling, Settings, draw, empty_cache, extend, fused_layers, settings_of
from saap_jax.llama.files.tokenizer import Tokenizer
from saap_jax.llama.model import Llama
from saap_jax.runtime.gather import fetched
from saap_jax.runtime.mesh import mesh_of, settled

STEPS = 32
"""The most tokens that one call of `decode_steps` makes."""

_NONE = -1
"""In place of a token, where a row has ended."""

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for bytes that are not (yet) a character."""

Finished = Callable[[int, list[int]], bool]
"""Says of a row (its place among the prompts) and its new tokens whether it is to end there."""

# --- compiled programs -----------------------------------------------------------------------------


class DecodingState(NamedTuple):
    """What decoding goes on from."""

    cache: Cache
    start: Int[Array, "batch"]
    """Slot of each row's first token: what is before it is padding."""
    token: Int[Array, "batch"]
    """The last token drawn, not in the cache yet."""
    done: Bool[Array, "batch"]
    keys: Key[Array, "batch"]
    slot: Int[Array, ""]
    """Where the next token goes in the cache."""
    drawn: Int[Array, ""]
    """How many tokens each row has had."""


@functools.partial(jax.jit, static_argnames="slots")
def prefill(
    model: Llama,
    inputs: "Padded",
    keys: Key[Array, "batch"],
    settings: Settings,
    stops: Int[Array, "stops"],
    *,
    slots: int,
) -> tuple[Int[Array, "batch"], DecodingState]:
    """Read the prompts, padded on the left, and draw the first token of each row (-1 where it stops or is done)."""
    tokens, start, done = inputs
    batch, seq = tokens.shape
    slot = jnp.int32(0)
    hidden, cache = extend(model, tokens, empty_cache(model, batch, slots), start, slot, empty=True)
    state = DecodingState(cache, start, tokens[:, -1], done, keys, slot + seq, jnp.int32(0))
    return _next(model, hidden[:, -1:], state, settings, stops)


@functools.partial(jax.jit, donate_argnames="state")
def decode_steps(
    model: Llama, state: DecodingState, settings: Settings, stops: Int[Array, "stops"], steps: Int[Array, ""]
) -> tuple[Int[Array, "batch steps"], DecodingState]:
    """Make `steps` more tokens, at most `STEPS`, or fewer if all rows end; -1 where a row has none. Reuses `state`."""

    def going(carry: tuple[Array, Array, DecodingState]) -> Array:
        made, _, state = carry
        return (made < steps) & ~jnp.all(state.done)

    def step(carry: tuple[Array, Array, DecodingState]) -> tuple[Array, Array, DecodingState]:
        made, tokens, state = carry
        hidden, cache = extend(model, state.token[:, None], state.cache, state.start, state.slot, empty=False)
        token, state = _next(model, hidden, state._replace(cache=cache, slot=state.slot + 1), settings, stops)
        return made + 1, jax.lax.dynamic_update_index_in_dim(tokens, token, made, axis=1), state

    tokens = jnp.full((state.token.shape[0], STEPS), _NONE, jnp.int32)
    _, tokens, state = jax.lax.while_loop(going, step, (jnp.int32(0), tokens, state))
    return tokens, state


def _next(
    model: Llama, hidden: Array, state: DecodingState, settings: Settings, stops: Array
) -> tuple[Array, DecodingState]:
    """Draw each row's next token from its last hidden state."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.drawn)
    token = draw(model.logits(hidden)[:, 0], settings, keys)
    done = state.done | jnp.any(token[:, None] == stops[None], axis=1)
    return jnp.where(done, _NONE, token), state._replace(token=token, done=done, drawn=state.drawn + 1)


# --- tokens --------------------------------------------------------------------------------------


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    batch_size: int = 8,
    finished: Finished | None = None,
) -> list[list[int]]:
    """Continue each prompt: its new tokens, without the stop token, in the order of the prompts.

    Args:
        model: dense or cut. On a CPU `decoder_of(model)` is made of it; where memory counts, or calls are many, do
            that once and drop `model`.
        prompts: token ids, one or more a prompt; special tokens are up to the caller.
        max_new_tokens: the most tokens that a row gets.
        sampling: how tokens are drawn, greedily by default, and which end a row. Row i draws from a stream of its own,
            whatever else is in its batch.
        batch_size: rows decoded at once. Changes speed and memory, and a row only where logits agree to within
            rounding.
        finished: called with a row and its new tokens, at the latest every eighth token; True ends the row there.

    Raises:
        ValueError: an empty prompt, an unknown token, or more tokens than the model has positions for.
    """
    rows: list[list[int]] = [[] for _ in prompts]
    options: dict = {"max_new_tokens": max_new_tokens, "sampling": sampling}
    options |= {"batch_size": batch_size, "finished": finished, "steps": STEPS if finished is None else 8}
    for row, token in stream(model, prompts, **options):
        rows[row].append(token)
    return rows


def stream(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    batch_size: int = 8,
    finished: Finished | None = None,
    steps: int = 1,
) -> Iterator[tuple[int, int]]:
    """Yield (row, token) as tokens are made, `steps` a call of the device; the rows of a batch take turns.

    Arguments and errors are those of `generate`; errors come from the call, not from the first token.
    """
    check_prompts(model, prompts, max_new_tokens)
    if batch_size < 1 or not 1 <= steps <= STEPS:
        raise ValueError(f"expected batch_size >= 1 and steps in 1 … {STEPS}, got {batch_size} and {steps}")
    stops = stops_of(model.constants.eos_tokens if sampling.stop_tokens is None else sampling.stop_tokens)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))  # equal lengths together: less padding
    settings = settings_of(sampling)
    root = jax.random.key(sampling.seed)
    mesh = mesh_of(model)

    def of_batch(decoder: Llama, rows: list[int]) -> Iterator[tuple[int, int]]:
        inputs = padded([prompts[row] for row in rows], min(batch_size, power_of_two(len(rows))))
        numbers = jnp.asarray(rows + [0] * (len(inputs.done) - len(rows)), jnp.uint32)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(root, numbers)
        inputs, data, *others = settled([inputs, jax.random.key_data(keys), settings, stops], mesh)
        keys = jax.random.wrap_key_data(data)
        slots = rounded(inputs.tokens.shape[1] + max_new_tokens)
        first, state = prefill(decoder, inputs, keys, *others, slots=slots)
        ended = fetched(inputs.done).copy()
        texts = [[] for _ in rows]
        tokens = fetched(first)[:, None]
        made = 1
        while True:
            for column in tokens.T:
                for place, token in enumerate(column[: len(rows)].tolist()):
                    if token == _NONE or ended[place]:
                        continue
                    texts[place].append(token)
                    yield rows[place], token
                    ended[place] = finished is not None and finished(rows[place], texts[place])
            state = state._replace(done=state.done | settled(jnp.asarray(ended), mesh))
            if made >= max_new_tokens or fetched(state.done).all():
                return
            count = min(steps, max_new_tokens - made)
            tokens, state = decode_steps(decoder, state, *others, settled(jnp.int32(count), mesh))
            tokens = fetched(tokens)[:, :count]
            made = made + count

    def of_all() -> Iterator[tuple[int, int]]:
        decoder = decoder_of(model)
        for first in range(0, len(order), batch_size):
            yield from of_batch(decoder, order[first : first + batch_size])

    return of_all()


class Padded(NamedTuple):
    """Prompts as one batch."""

    tokens: Int[Array, "batch seq"]
    start: Int[Array, "batch"]
    done: Bool[Array, "batch"]
    """True in the rows that only fill the batch."""


def padded(prompts: Sequence[Sequence[int]], batch: int) -> Padded:
    """Pad prompts on the left to one rounded length, and the batch with rows that are done."""
    seq = rounded(max(map(len, prompts)))
    tokens = np.zeros((batch, seq), np.int32)
    start = np.zeros(batch, np.int32)
    for row, prompt in enumerate(prompts):
        start[row] = seq - len(prompt)
        tokens[row, start[row] :] = prompt
    return Padded(jnp.asarray(tokens), jnp.asarray(start), jnp.arange(batch) >= len(prompts))


def rounded(length: int) -> int:
    """Round a length up to 16, 32, or a power of two from 64 on or half as much again, so that few programs compile.

    >>> [rounded(length) for length in (1, 17, 40, 65, 97, 129, 300)]
    [16, 32, 64, 96, 128, 192, 384]
    """
    power = power_of_two(length)
    if power <= 64:
        return max(power, 16)
    if length <= 3 * power // 4:
        return 3 * power // 4
    return power


def power_of_two(count: int) -> int:
    """Round up to a power of two."""
    return 1 << (count - 1).bit_length()


def stops_of(tokens: Sequence[int]) -> Int[Array, "stops"]:
    """Fill the tokens that end a row up to a multiple of eight, so that their number compiles nothing."""
    return jnp.asarray([*tokens, *[-2] * (8 - len(tokens) % 8)], jnp.int32)


def decoder_of(model: Llama) -> Llama:
    """Put a model into the form that decodes fastest where it is: on a CPU, single layers with fused matrices."""
    platforms = {device.platform for device in model.embedding[...].devices()}
    if platforms == {"cpu"}:
        return fused_layers(model)
    return model


def check_prompts(model: Llama, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise ValueError unless every prompt and what follows it fit the model."""
    vocab = model.embedding.shape[0]
    most = model.constants.positions
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {row}: expected at least one token, got none; begin it with the BOS token")
        if min(prompt) < 0 or max(prompt) >= vocab:
            raise ValueError(f"prompt {row}: expected tokens in 0 … {vocab - 1}, got {min(prompt)} … {max(prompt)}")
        if len(prompt) + max_new_tokens > most:
            raise ValueError(
                f"prompt {row}: {len(prompt)} tokens and {max_new_tokens} new ones make {len(prompt) + max_new_tokens}"
                f", more than the model's {most} positions; shorten the prompt or ask for fewer"
            )


# --- texts ---------------------------------------------------------------------------------------


class TextOutput:
    """Turns the tokens of one row into text, piece by piece.

    A character whose bytes come in several tokens is held back until it is whole; so is text that may be the beginning
    of a stop string. The pieces together are the decoded text up to the first stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = (), behind: Sequence[int] = ()) -> None:
        """Take what a row is decoded by, where it ends, and the token that it goes on from, if any."""
        self.text = ""
        """All that was returned so far."""
        self.stopped = False
        """True once a stop string came."""
        self._tokenizer = tokenizer
        self._stops = tuple(stop_strings)
        self._tokens = [*behind]
        # tokens before `_first` are done with; those before `_read` were returned
        self._first = 0
        self._read = len(behind)
        self._held = ""

    def push(self, token: int) -> str:
        """Take a token; return the text that is sure by now, often none."""
        self._tokens.append(token)
        before = self._decode(self._first, self._read)
        now = self._decode(self._first, len(self._tokens))
        if len(now) <= len(before) or now.endswith(_INCOMPLETE):
            return ""
        # The last tokens returned are decoded again with the next ones: some decoders drop the space of a first token.
        self._first = self._read
        self._read = len(self._tokens)
        return self._release(now[len(before) :], final=False)

    def finish(self) -> str:
        """Release the text that was held back, when no more tokens come."""
        before = self._decode(self._first, self._read)
        now = self._decode(self._first, len(self._tokens))
        self._first = self._read = len(self._tokens)
        return self._release(now[len(before) :], final=True)

    def _decode(self, first: int, stop: int) -> str:
        tokens = self._tokens[first:stop]
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _release(self, new: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += new
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        self.stopped = bool(found)
        if found:
            sure = min(found)
        else:
            sure = len(self._held) - (0 if final else _begun(self._held, self._stops))
        piece = self._held[:sure]
        self._held = self._held[sure:]
        self.text += piece
        return piece


def _begun(text: str, stops: Sequence[str]) -> int:
    """Measure the longest end of a text that begins a stop string.

    >>> _begun("one\\n", ["\\n\\n", "Q:"])
    1
    """
    longest = max((len(stop) - 1 for stop in stops), default=0)
    sizes = range(min(longest, len(text)), 0, -1)
    return next((size for size in sizes if any(stop.startswith(text[-size:]) for stop in stops)), 0)


def stream_texts(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    stop_strings: Sequence[str] = (),
    chat: bool = False,
    **options: Any,
) -> Iterator[tuple[int, str]]:
    """Yield (row, piece of text) as it comes; the pieces of a row make its continuation, without its stop string.

    Args:
        chat: take each prompt as what a user says, and give it to the model in its chat template. What that writes
            behind an answer ends a row, too.
        options: `max_new_tokens`, and perhaps `sampling` and `batch_size`, as of `stream`.

    Raises:
        ValueError: as `stream`; no prompt, an empty stop string, no chat template, an empty prompt without BOS token.
    """
    if not prompts:
        raise ValueError("prompts: expected one or more texts, got none")
    if "" in stop_strings:
        raise ValueError("stop: expected strings of one character or more, got an empty one")
    rows = [encode_chat(tokenizer, prompt) if chat else encode_prompt(tokenizer, prompt) for prompt in prompts]
    outputs = [TextOutput(tokenizer, stop_strings, row[-1:]) for row in rows]
    special = {str(each): number for number, each in tokenizer.added_tokens_decoder.items() if each.special}
    ends = {special[text] for text in stop_strings if text in special}  # which are not printed, so no text has them
    ends |= {around_answer(tokenizer)[1]} if chat else set()

    def finished(row: int, tokens: Sequence[int]) -> bool:
        return outputs[row].stopped or not ends.isdisjoint(tokens)

    tokens = stream(model, rows, finished=finished, **options)

    def pieces() -> Iterator[tuple[int, str]]:
        for row, token in tokens:
            if piece := outputs[row].push(token):
                yield row, piece
        for row, output in enumerate(outputs):
            if piece := output.finish():
                yield row, piece

    return pieces()


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode a text to continue; of an empty one, the BOS token.

    Raises:
        ValueError: the text is empty and the tokenizer has no BOS token.
    """
    check_text("prompt", text)
    tokens = list(tokenizer.encode(text, verbose=False))  # who is asked for too many positions says so
    if not tokens and tokenizer.bos_token_id is None:
        raise ValueError("prompt: expected some text, got none, and the tokenizer has no BOS token to begin with")
    return tokens or [tokenizer.bos_token_id]
