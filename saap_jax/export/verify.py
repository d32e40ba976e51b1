"""Compare an exported model with its source: the same tokens, both models' logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from saap_jax.llama.files.tokenizer import Tokenizer
from saap_jax.llama.model import Llama

TEXT = """\
In 1912, after forty days of rain, the river left its bed. The people of the valley carried what they could to the
mill: flour, two goats, a clock that had stopped at 7:35. "It won't last," said the miller, and counted the steps that
were still dry. By morning there were eleven of 24, and nobody spoke of the bridge any more. def f(x): return x ** 2
"""
"""What is compared: prose, numbers, quotation marks, a little code."""

LENGTH = 96

TOLERANCES = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2, "q8_0": 1e-1, "q4_1": 1e-2}
"""Type of the exported weights -> largest accepted deviation of the logits, as a share of their spread."""


class Agreement(NamedTuple):
    """How the logits of an exported model compare with those of its source, both computed in float32."""

    tokens: int
    """Positions compared."""
    largest: float
    """Largest absolute difference of a logit."""
    deviation: float
    """Root mean square of the differences, as a share of the standard deviation of the source's logits."""
    argmax: float
    """Share of the positions at which both models find the same token most likely."""
    tolerance: float
    """Largest accepted `deviation`."""


def sample_tokens(tokenizer: Tokenizer | None, vocab: int, max_positions: int) -> Int[np.ndarray, "1 seq"]:
    """Return tokens to compare on, int32: of `TEXT`, or at random (always the same) without a tokenizer."""
    length = min(LENGTH, max_positions)
    if tokenizer is None:
        return np.random.default_rng(0).integers(0, vocab, (1, length), np.int32)
    ids = tokenizer.encode(TEXT, truncation=True, max_length=length)
    if max(ids) >= vocab:
        raise ValueError(
            f"tokenizer: expected token ids below the model's {vocab} embeddings, got {max(ids)}; "
            "give the tokenizer that belongs to the model"
        )
    return np.asarray([ids], np.int32)


def check_agreement(
    source: Llama, exported: Llama, tokens: Int[np.ndarray, "1 seq"], dtype: str, *, blocks: bool = False
) -> Agreement:
    """Compare two models on tokens, int32; `dtype` names the type of the exported weights.

    `blocks` says that quantised matrices were written as Q4_1, whose scales are float16.

    Raises:
        ValueError: the deviation is above `TOLERANCES[dtype]`.
    """
    forward = jax.jit(lambda model, tokens: model(tokens))
    logits = np.asarray(forward(source, jnp.asarray(tokens)), np.float64)
    others = np.asarray(forward(exported, jnp.asarray(tokens)), np.float64)
    difference = np.abs(logits - others)
    agreement = Agreement(
        tokens=tokens.size,
        largest=float(difference.max()),
        deviation=float(np.sqrt(np.mean(difference**2)) / max(logits.std(), 1e-12)),
        argmax=float(np.mean(logits.argmax(-1) == others.argmax(-1))),
        tolerance=max(TOLERANCES[dtype], TOLERANCES["q4_1"] if blocks else 0.0),
    )
    if not agreement.deviation <= agreement.tolerance:
        raise ValueError(
            f"export: expected the logits of the written model within {agreement.tolerance:g} of the source's spread "
            f"({dtype}), got {agreement.deviation:.2g} on {agreement.tokens} tokens; nothing was kept: "
            "choose a wider --dtype"
        )
    return agreement


def check_tokenizer(source: Tokenizer, exported: Tokenizer, where: str) -> None:
    """Raise `ValueError` unless both tokenizers encode `TEXT` and some hard spans of text alike."""
    for text in (TEXT, "  two  spaces,\ttabs\n\n\nand lines \n", "naïve café — 東京 🙂 e\u0301", "1234567.89 'll I'VE"):
        expected, got = source.encode(text), exported.encode(text)
        if expected != got:
            raise ValueError(
                f"{where}: expected the tokenizer that was written to encode {text[:20]!r} as {expected[:12]}, "
                f"got {got[:12]}; export with --format ragged or padded instead, which copy the tokenizer's files"
            )
