"""Log-likelihoods of continuations: no token runs twice that need not, and few programs are compiled.

1. Continuations that need the same inputs (all but their last token), such as " yes" and " no" of one question, are
   predicted by one sequence.
2. Sequences that begin alike, such as the choices of an item, share a row: see `saap_jax.llama.passes`. Which of them
   do, a dynamic program over the sorted sequences decides, by the cost of the rows.
3. Rows are sorted by length and padded on the right to one of a few lengths, which is all that a program depends on.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from saap_jax.llama.files.tokenizer import Tokenizer
from saap_jax.llama.loss import TARGETS, log_likelihoods_of
from saap_jax.llama.model import Llama
from saap_jax.llama.passes import packed_hidden

ROW_TOKENS = 128
"""`batch_size` counts rows of this length; of longer ones, fewer run at once."""

ROW_LIMIT = 512
"""Tokens, and targets, up to which sequences share a row."""

QUADRATIC = 640
"""Length of a row at which attention among its positions costs as much as everything else: measured with SmolLM2-135M
on a CPU, where 2048 tokens in rows of 512 took 1.65 times as long as in rows of 64."""

PROGRAM = 2000
"""Tokens that run in about the time in which a program is compiled: measured with SmolLM2-135M on a CPU."""

_SIBLINGS = 64  # sequences of one row at most, which bounds the dynamic program
_SHORTEST = 32  # length of a row at least

Tokens = tuple[int, ...]
Progress = Callable[[Sequence["Batch"]], Iterator["Batch"]]


class Request(NamedTuple):
    """Tokens, and those that follow and are scored; neither may be empty."""

    context: Tokens
    continuation: Tokens


class Likelihood(NamedTuple):
    """Σ log p(token | all before it) over a continuation, in nats, and whether each token was the likeliest."""

    log_likelihood: float
    greedy: bool


class Inputs(NamedTuple):
    """Tokens that run once, and the numbers of the requests that they answer, with `targets` tokens to score."""

    tokens: Tokens
    requests: tuple[int, ...]
    targets: int


class PackedRow(NamedTuple):
    """Sequences that share their first `shared` tokens; `length` tokens in all, with `targets` to score."""

    inputs: tuple[Inputs, ...]
    shared: int
    length: int
    targets: int


class Batch(NamedTuple):
    """Up to `size` rows that run at once, padded to `length`."""

    rows: tuple[PackedRow, ...]
    length: int
    size: int


@jax.jit
def score_step(
    model: Llama,
    tokens: Int[Array, "batch seq"],
    positions: Int[Array, "batch seq"],
    segments: Int[Array, "batch seq"],
    source: Int[Array, "targets"],
    target: Int[Array, "targets"],
    count: Int[Array, ""],
) -> tuple[Float[Array, "targets"], Bool[Array, "targets"]]:
    """Score each target, and tell whether it is the likeliest token; one program a row length."""
    hidden = packed_hidden(model, tokens, positions, segments)
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
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    rows = pack(distinct_inputs(requests, model.constants.positions))
    sums, greedy = np.zeros(len(requests)), np.ones(len(requests), bool)
    for batch in progress(cheapest_batches(rows, batch_size, len(model.segments))):
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
    return tokenizer.encode(text) if special is None else tokenizer.encode(text, add_special_tokens=special)


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """Tokenise a context, and what the continuation adds to it.

    White space at the end of the context counts to the continuation, whose first token it begins. An empty context
    stands for the token that begins texts; ValueError where there is none.

    Source: `TemplateLM._encode_pair` and `HFLM.tok_encode` of lm-evaluation-harness 0.4.13.
    """
    if not context:
        tokens, prefix = encode(tokenizer, continuation, special=False), prefix_token(tokenizer)
        return Request((prefix,), tuple(tokens[1:] if tokens[:1] == [prefix] else tokens))
    before, whole = encode(tokenizer, context.rstrip()), encode(tokenizer, context + continuation)
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
    """Find the different inputs that requests need, sorted; `limit` is the most tokens that a model takes.

    >>> distinct_inputs([Request((1, 2), (3,)), Request((1, 2), (4,)), Request((1,), (2, 5))], 8)
    [Inputs(tokens=(1, 2), requests=(0, 1, 2), targets=4)]
    """
    found: dict[Tokens, list[Inputs]] = {}
    for number, (context, continuation) in enumerate(requests):
        size = len(continuation)
        if not context or not continuation or size > limit:
            raise ValueError(
                f"request {number}: expected a context, and a continuation of 1 to {limit} tokens (the positions of "
                f"the model), got {len(context)} and {size} tokens"
            )
        tokens = (*context, *continuation)[-(limit + 1) : -1]
        shares = found.setdefault(tokens, [])
        if not shares or shares[-1].targets + size > ROW_LIMIT:
            shares.append(Inputs(tokens, (), 0))
        last = shares[-1]
        shares[-1] = Inputs(tokens, (*last.requests, number), last.targets + size)
    return [share for tokens in sorted(found) for share in found[tokens]]


def row_cost(length: int) -> float:
    """What a row costs, in tokens: the longer it is, the more each token has to attend to."""
    return length * (1 + length / QUADRATIC)


def pack(inputs: Sequence[Inputs]) -> list[PackedRow]:
    """Put sorted inputs into rows, neighbours together where that is cheapest for all.

    best[j], the least cost of the first j inputs, is the minimum over i of best[i] + row_cost(a row of i … j - 1).

    >>> [(row.shared, row.length) for row in pack([Inputs((1, 2, 3, n), (n,), 1) for n in (4, 5)])]
    [(3, 5)]
    """
    alike = [0, *(common_length(a.tokens, b.tokens) for a, b in itertools.pairwise(inputs))]
    best: list[tuple[float, list[PackedRow]]] = [(0.0, [])]
    rows: list[PackedRow] = []
    for stop in range(1, len(inputs) + 1):
        shared, every, targets, options = len(inputs[stop - 1].tokens), 0, 0, []
        for start in range(stop - 1, max(stop - 1 - _SIBLINGS, -1), -1):
            if start < stop - 1:
                shared = min(shared, alike[start + 1])
            every, targets = every + len(inputs[start].tokens), targets + inputs[start].targets
            length = every - (stop - start - 1) * shared
            if start < stop - 1 and (shared == 0 or max(length, targets) > ROW_LIMIT):
                break
            options.append(
                (best[start][0] + row_cost(length), PackedRow(tuple(inputs[start:stop]), shared, length, targets))
            )
        cost, row = min(options, key=lambda option: option[0])
        best.append((cost, [row]))
    stop = len(inputs)
    while stop:
        rows += best[stop][1]
        stop -= len(rows[-1].inputs)
    return rows[::-1]


def common_length(a: Tokens, b: Tokens) -> int:
    """Count the tokens that two sequences begin with alike.

    >>> common_length((1, 2, 3), (1, 2, 4, 5))
    2
    """
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# --- batches ---------------------------------------------------------------------------------------


def padded_length(length: int, steps: int = 2) -> int:
    """Round a length up to one of `steps` lengths between each power of two and the next.

    >>> [padded_length(length) for length in (3, 32, 33, 41, 64, 65, 200)]
    [32, 32, 48, 48, 64, 96, 256]
    """
    if length <= _SHORTEST:
        return _SHORTEST
    power = 1 << ((length - 1).bit_length() - 1)
    return power + -(-(length - power) * steps // power) * power // steps


def batches_of(rows: Iterable[PackedRow], batch_size: int, steps: int = 2) -> list[Batch]:
    """Put rows into batches, the longest first, so that what does not fit into memory is known at once."""
    batches: list[Batch] = []
    left = 0
    for row in sorted(rows, key=lambda row: -row.length):
        if not batches or len(batches[-1].rows) == batches[-1].size or row.targets > left:
            length = padded_length(row.length, steps)
            batches.append(Batch((), length, max(1, batch_size * ROW_TOKENS // length)))
            left = targets_of(batches[-1])
        batches[-1] = batches[-1]._replace(rows=(*batches[-1].rows, row))
        left -= row.targets
    return batches


def cheapest_batches(rows: Sequence[PackedRow], batch_size: int, segments: int = 1) -> list[Batch]:
    """Make batches with as many different lengths as pay: more of them pad less, but compile more programs.

    A program takes longer to compile the more `segments` of equal layers the model has: each by a third of the first.
    """

    def cost(batches: list[Batch]) -> float:
        padded = sum(batch.size * batch.length for batch in batches)
        return padded + PROGRAM * (2 + segments) / 3 * len({batch.length for batch in batches})

    return min((batches_of(rows, batch_size, steps) for steps in (1, 2, 4)), key=cost)


def targets_of(batch: Batch) -> int:
    """Count the targets that a batch has room for."""
    return -(-max(batch.size * batch.length, ROW_LIMIT) // TARGETS) * TARGETS


def lay_out(batch: Batch, requests: Sequence[Request]) -> tuple[np.ndarray, ...]:
    """Lay out tokens, positions, segments `[size, length]`, source and target `[targets]`, and the targets' requests.

    A source is the place in the flat batch of the token that predicts a target. The last array is as long as there are
    targets, those before it are padded; requests come in any order.
    """
    tokens, positions = np.zeros((2, batch.size, batch.length), np.int32)
    segments = np.full((batch.size, batch.length), -1, np.int32)
    sources: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    for number, (inputs, shared, *_) in enumerate(batch.rows):
        end = shared
        tokens[number, :end], segments[number, :end] = inputs[0].tokens[:end], 0
        positions[number, :end] = np.arange(end)
        for branch, own in enumerate(inputs, 1):
            rest = slice(end, end + len(own.tokens) - shared)
            tokens[number, rest], segments[number, rest] = own.tokens[shared:], branch
            positions[number, rest] = np.arange(shared, len(own.tokens))
            places = (number * batch.length + np.r_[:shared, rest]).tolist()
            for request in own.requests:
                continuation = requests[request].continuation
                sources += places[len(places) - len(continuation) :]
                targets += continuation
                owner += [request] * len(continuation)
            end = rest.stop
    room = (0, targets_of(batch) - len(owner))
    source, target = (np.pad(np.asarray(each, np.int32), room) for each in (sources, targets))
    return tokens, positions, segments, source, target, np.asarray(owner, np.int64)
