"""The tokenizer's part of a GGUF file's metadata: copied from a GGUF source, or made of a byte-level BPE tokenizer."""

import json
import re
from pathlib import Path
from typing import Any

from gguf import GGUFValueType as Kind
from gguf import TokenType

from saap_jax.llama.files.gguf import open_gguf_file
from saap_jax.llama.files.tokenizer import ROLES, Tokenizer, pre_tokenizer_name
from saap_jax.llama.spec import Constants, some

Pair = tuple[str, Any, tuple[Kind, ...]]
"""Key, value and type of an entry; of an array, its type and that of its items."""

_ENDS = ("eos", "eot", "eom")


def copied_vocabulary(path: Path) -> list[Pair]:
    """Copy the tokenizer metadata of a GGUF file, as it is."""
    entries = open_gguf_file(path).entries
    return [
        (key, entry.value, entry.types)
        for key, entry in entries.items()
        if key.startswith("tokenizer.") and entry.value != []
    ]


def no_vocabulary() -> list[Pair]:
    """Make the metadata of a model without a tokenizer, which llama.cpp runs on token ids alone."""
    return [("tokenizer.ggml.model", "none", (Kind.STRING,))]


def vocabulary_of(tokenizer: Tokenizer, vocab: int, constants: Constants) -> list[Pair]:
    """Make the metadata of a byte-level BPE tokenizer; `vocab` is the number of the model's embeddings.

    Ids that the tokenizer does not use are named `[PADn]`. Beginning and end tokens are the model's, or else the
    tokenizer's; a second and a third end token become end of turn and end of message.

    Raises:
        ValueError: another kind of tokenizer, or one whose pre-tokenizer llama.cpp has no name for.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    blanks = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    pieces = (  # that of Gemma: byte pairs of text with ▁ for blanks, bytes for what has no piece
        (backend["model"]["type"], backend.get("normalizer")) == ("BPE", blanks)
        and backend["model"].get("byte_fallback")
    )
    pre = "default" if pieces else pre_tokenizer_name(backend)
    tokens, types = _tokens(tokenizer, vocab)
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in backend["model"]["merges"]]
    if pieces:
        types = [int(TokenType.BYTE) if re.fullmatch("<0x[0-9A-F]{2}>", token) else kind
                 for token, kind in zip(tokens, types, strict=True)]  # fmt: skip
    pairs: list[Pair] = [
        ("tokenizer.ggml.model", "llama" if pieces else "gpt2", (Kind.STRING,)),
        ("tokenizer.ggml.pre", pre, (Kind.STRING,)),
        ("tokenizer.ggml.tokens", tokens, (Kind.ARRAY, Kind.STRING)),
        ("tokenizer.ggml.token_type", types, (Kind.ARRAY, Kind.INT32)),
    ]
    if pieces:
        first: dict[str, float] = {}  # scores by which SentencePiece follows the merges in their order
        for number, (left, right) in enumerate(merges):
            first.setdefault(left + right, -float(number))
        scores = [first.get(token, -float(len(merges))) for token in tokens]
        pairs.append(("tokenizer.ggml.scores", scores, (Kind.ARRAY, Kind.FLOAT32)))
    elif merges:  # a GGUF array has at least one item
        pairs.append(("tokenizer.ggml.merges", [" ".join(pair) for pair in merges], (Kind.ARRAY, Kind.STRING)))
    ids = {key: getattr(tokenizer, f"{role}_id") for role, key in ROLES.items()}
    ids["bos"] = ids["bos"] if constants.bos_token is None else constants.bos_token
    ids |= dict(zip(_ENDS, _ends(tokenizer, constants), strict=False))
    pairs += [
        (f"tokenizer.ggml.{key}_token_id", token, (Kind.UINT32,))
        for key, token in ids.items()
        if token is not None and token < vocab
    ]
    encoded = tokenizer.encode("a")
    added = {"bos": encoded[:1] == [ids["bos"]], "eos": encoded[-1:] == [ids["eos"]]}
    pairs += [(f"tokenizer.ggml.add_{key}_token", value, (Kind.BOOL,)) for key, value in added.items()]
    pairs.append(("tokenizer.ggml.add_space_prefix", False, (Kind.BOOL,)))
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several by name
        template = template.get("default")
    if isinstance(template, str):
        pairs.append(("tokenizer.chat_template", template, (Kind.STRING,)))
    return pairs


def _ends(tokenizer: Tokenizer, constants: Constants) -> list[int]:
    """List the end tokens, the tokenizer's own first: that stays what it calls its end."""
    own = tokenizer.eos_token_id
    return sorted(constants.eos_tokens or ([] if own is None else [own]), key=lambda token: token != own)


def lost(tokenizer: Tokenizer, constants: Constants) -> tuple[str, ...]:
    """List in sentences what of a tokenizer has no place in the metadata."""
    ends = [str(token) for token in _ends(tokenizer, constants)[len(_ENDS) :]]
    added = tokenizer.added_tokens_decoder.values()
    blanks = [str(token) for token in added if token.lstrip or token.rstrip or token.single_word]
    said = (
        (ends, "llama.cpp reads three end tokens, so tokens of these numbers end no text there"),
        (blanks, "GGUF does not say which added tokens take blanks beside them or stand for whole words, as these do"),
    )
    return tuple(f"{sentence}: {some(names)}" for names, sentence in said if names)


def _tokens(tokenizer: Tokenizer, vocab: int) -> tuple[list[str], list[int]]:
    """List text and type of each token id below `vocab`."""
    known = {index: token for token, index in tokenizer.get_vocab().items()}
    if max(known) >= vocab:
        raise ValueError(
            f"tokenizer: expected token ids below the model's {vocab} embeddings, got {max(known)}; "
            "give the tokenizer that belongs to the model"
        )
    added = tokenizer.added_tokens_decoder
    tokens = []
    types = []
    for index in range(vocab):
        if index not in known:
            kind = TokenType.UNUSED
        elif index in added:
            if added[index].special:
                kind = TokenType.CONTROL
            else:
                kind = TokenType.USER_DEFINED
        else:
            kind = TokenType.NORMAL
        tokens.append(known.get(index, f"[PAD{index}]"))
        types.append(int(kind))
    return tokens, types
