"""Log-likelihoods of continuations: inputs that several requests need run once, and few programs are compiled.

Continuations that need the same inputs (all but their last token), such as " yes" and " no" of one question, are
predicted by one row. Rows are sorted by length and padded on the right to one of two lengths an octave, which is all
that a program depends on.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from saap_jax.llama.files.tokenizer import Tokenizer
from saap_jax.llama.loss import TARGETS, log_likelihoods_of
from saap_jax.llama.model import Llama

ROW_TOKENS = 128
"""`batch_size` counts rows of this length; of longer ones, fewer run at once."""

SHORTEST = 32
"""Length of a row at least."""

Tokens = tuple[int, ...]


class Request(NamedTuple):
    """Tokens, and those that follow and are scored; neither may be empty."""

    context: Tokens
    continuation: Tokens


class Likelihood(NamedTuple):
    """Σ log p(token | all before it) over a continuation, in nats, and whether each token was the likeliest."""

    log_likelihood: float
    greedy: bool


class Inputs(NamedTuple):
    """Tokens that run once, and the numbers of the requests that they answer."""

    tokens: Tokens
    requests: list[int]


class PaddedRows(NamedTuple):
    """Up to `size` rows that run at once, padded to `length`."""

    rows: Sequence[Inputs]
    length: int
    size: int


Progress = Callable[[Sequence[PaddedRows]], Iterator[PaddedRows]]


@jax.jit
def score_step(
    model: Llama,
    tokens: Int[Array, "batch seq"],
    source: Int[Array, "targets"],
    target: Int[Array, "targets"],
    count: Int[Array, ""],
) -> tuple[Float[Array, "targets"], Bool[Array, "targets"]]:
    """Score each target, and tell whether it is the likeliest token; one program a row length."""
    hidden, _ = model.hidden(tokens)
    return log_likelihoods_of(model, hidden.reshape(-1, hidden.shape[-1]), source, target, count)


def log_likelihoods(
    model: Llama, requests: Sequence[Request], *, batch_size: int = 16, progress: Progress = iter
) -> list[Likelihood]:
    """Score each request's continuation, in their order.

    A request longer than the model's positions loses tokens on the left, as in lm-evaluation-harness.

    Args:
        batch_size: rows of `ROW_TOKENS` tokens that run at once; changes speed and memory, not the result.

    Raises:
        ValueError: an empty context or continuation, or a continuation longer than the model's positions.
    """
    sums = np.zeros(len(requests))
    greedy = np.ones(len(requests), bool)
    for batch in progress(batches_of(distinct_inputs(requests, model.constants.positions), batch_size)):
        *arrays, owner = lay_out(batch, requests)
        values, likeliest = score_step(model, *map(jnp.asarray, arrays), jnp.asarray(len(owner), jnp.int32))
        np.add.at(sums, owner, np.asarray(values, np.float64)[: len(owner)])
        np.logical_and.at(greedy, owner, np.asarray(likeliest)[: len(owner)])
    return [Likelihood(float(value), bool(top)) for value, top in zip(sums, greedy, strict=True)]


# --- tokens of text --------------------------------------------------------------------------------


def encode(tokenizer: Tokenizer, text: str, *, special: bool | None = None) -> list[int]:
    """Tokenise a text. `special` says whether beginning and end tokens are added; None: as the tokenizer does, but no
    second beginning where the text begins with one.
    """
    if special is None and tokenizer.bos_token and text.startswith(tokenizer.bos_token):
        special = False
    if special is None:
        return tokenizer.encode(text)
    return tokenizer.encode(text, add_special_tokens=special)


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """Tokenise a context, and what the continuation adds to it.

    White space at the end of the context counts to the continuation, whose first token it begins. A context of nothing
    else stands for the token that begins texts; ValueError where there is none.

    Source: `TemplateLM._encode_pair` and `HFLM.tok_encode` of lm-evaluation-harness 0.4.13.
    """
    if not context.rstrip():
        tokens = encode(tokenizer, context + continuation, special=False)
        prefix = prefix_token(tokenizer)
        return Request((prefix,), tuple(tokens[1:] if tokens[:1] == [prefix] else tokens))
    before = encode(tokenizer, context.rstrip())
    whole = encode(tokenizer, context + continuation)
    return Request(tuple(before), tuple(whole[len(before) :]))


def prefix_token(tokenizer: Tokenizer) -> int:
    """Find the token that stands before a text without context: the beginning of a text, or else its end."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise ValueError(
        "an empty context needs a token before it, but the tokenizer names neither bos_token nor eos_token"
    )


# --- what runs, and with what ----------------------------------------------------------------------


def distinct_inputs(requests: Sequence[Request], limit: int) -> list[Inputs]:
    """Find the different inputs that requests need; `limit` is the most tokens that a model takes.

    >>> distinct_inputs([Request((1, 2), (3,)), Request((1, 2), (4,)), Request((1,), (2, 5))], 8)
    [Inputs(tokens=(1, 2), requests=[0, 1, 2])]
    """
    found: dict[Tokens, Inputs] = {}
    for number, (context, continuation) in enumerate(requests):
        if not context or not continuation or len(continuation) > limit:
            raise ValueError(
                f"request {number}: expected a context, and a continuation of 1 to {limit} tokens (the positions of "
                f"the model), got {len(context)} and {len(continuation)} tokens"
            )
        tokens = (*context, *continuation)[-(limit + 1) : -1]
        found.setdefault(tokens, Inputs(tokens, [])).requests.append(number)
    return [*found.values()]


def padded_length(length: int) -> int:
    """Round a length up to a power of two, or to the middle between two of them.

    >>> [padded_length(length) for length in (3, 32, 33, 41, 64, 65, 200)]
    [32, 32, 48, 48, 64, 96, 256]
    """
    power = 1 << ((max(length, SHORTEST) - 1).bit_length() - 1)
    return next(each for each in (power, power * 3 // 2, power * 2) if each >= max(length, SHORTEST))


def batches_of(inputs: Sequence[Inputs], batch_size: int) -> list[PaddedRows]:
    """Put inputs into batches, the longest first, so that what does not fit into memory is known at once."""
    batches = []
    rows = sorted(inputs, key=lambda each: -len(each.tokens))
    while rows:
        length = padded_length(len(rows[0].tokens))
        size = max(1, batch_size * ROW_TOKENS // length)
        batches.append(PaddedRows(rows[:size], length, size))
        rows = rows[size:]
    return batches


def lay_out(batch: PaddedRows, requests: Sequence[Request]) -> tuple[np.ndarray, ...]:
    """Lay out tokens `[size, length]`, source and target `[targets]`, and the targets' requests.

    A source is the place in the flat batch of the token that predicts a target. The last array is as long as there are
    targets, those before it are padded; requests come in any order.
    """
    tokens = np.zeros((batch.size, batch.length), np.int32)
    sources: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    for number, own in enumerate(batch.rows):
        tokens[number, : len(own.tokens)] = own.tokens
        end = number * batch.length + len(own.tokens)
        for request in own.requests:
            continuation = requests[request].continuation
            sources += range(end - len(continuation), end)
            targets += continuation
            owner += [request] * len(continuation)
    room = TARGETS
    while room < max(len(owner), tokens.size):  # rarely more than there are tokens: one program a length
        room *= 2
    source, target = (np.pad(np.asarray(each, np.int32), (0, room - len(owner))) for each in (sources, targets))
    return tokens, source, target, np.asarray(owner, np.int64)
