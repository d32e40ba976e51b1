"""Tokens of a context and of what follows it, cut as lm-evaluation-harness cuts them for a causal model.

Source: `TemplateLM._encode_pair` and `HFLM.tok_encode` of lm-evaluation-harness 0.4.13.
"""

from saap_jax.evaluation.tasks.likelihood import Request
from saap_jax.llama.files.tokenizer import Tokenizer


def encode(tokenizer: Tokenizer, text: str, *, special: bool | None = None) -> list[int]:
    """Return the tokens of a text. `special` says whether beginning and end tokens are added; None: as the tokenizer
    does, but no second beginning where the text begins with one.
    """
    if special is None and tokenizer.bos_token and text.startswith(tokenizer.bos_token):
        special = False
    return tokenizer.encode(text) if special is None else tokenizer.encode(text, add_special_tokens=special)


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """Return the tokens of a context and those that the continuation adds to it.

    White space at the end of the context counts to the continuation, whose first token it begins. An empty context
    stands for the token that begins texts.

    Raises:
        ValueError: an empty context, and a tokenizer without such a token.
    """
    if not context:
        tokens, prefix = encode(tokenizer, continuation, special=False), prefix_token(tokenizer)
        if tokens[:1] == [prefix]:
            return Request((prefix,), tuple(tokens[1:]))
        return Request((prefix,), tuple(tokens))
    kept = context.rstrip()
    before, whole = encode(tokenizer, kept), encode(tokenizer, context + continuation)
    return Request(tuple(before), tuple(whole[len(before) :]))


def prefix_token(tokenizer: Tokenizer) -> int:
    """Return the token that stands before a text without context: the beginning of a text, or else its end."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise ValueError(
        "an empty context needs a token before it, but the tokenizer names neither bos_token nor eos_token"
    )
