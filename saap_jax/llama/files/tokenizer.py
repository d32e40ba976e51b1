"""Load the tokenizer that belongs to a model: from its directory or hub name, or rebuilt from GGUF metadata."""

import contextlib
import importlib.util
import json
import logging
import logging.handlers
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from saap_jax.errors import read_object, reading, shown
from saap_jax.llama.files.sources import resolve
from saap_jax.llama.spec import Values, checked

Tokenizer = Any
"""A `transformers.PreTrainedTokenizerFast`; not named as such, because importing transformers takes seconds."""

_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
"""JSON files of a tokenizer, each of which may be absent."""

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)

SENTENCE_PIECES = {"gemma3"}
"""Architectures of GGUF whose pieces of SentencePiece (`llama`) are put together again; text gets no blank before."""

# --- what GGUF calls pre-tokenizers --------------------------------------------------------------

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""How Llama 3 splits text, as in its `tokenizer.json`."""

_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
"""The same of Qwen2 and Qwen3, where every digit is a word."""


def _byte_level(use_regex: bool) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


PRE_TOKENIZERS = {
    "gpt-2": lambda: [_byte_level(True)],
    "llama-bpe": lambda: [pre_tokenizers.Split(tokenizers.Regex(_LLAMA3), "isolated"), _byte_level(False)],
    "qwen2": lambda: [pre_tokenizers.Split(tokenizers.Regex(_QWEN2), "isolated"), _byte_level(False)],
    "smollm": lambda: [pre_tokenizers.Digits(individual_digits=True), _byte_level(True)],
}
"""`tokenizer.ggml.pre` -> what splits the text; as in the `tokenizer.json` of that family."""

NORMALIZERS = {"qwen2": normalizers.NFC}
"""Those that put text into a normal form first, which llama.cpp leaves to who gives it the text."""

IGNORE_MERGES = {"llama-bpe"}
"""Those whose words are looked up whole before they are merged from bytes."""

BEGIN = {"llama-bpe"}
"""Those before which llama.cpp puts the beginning of text where the file does not say."""


def pre_tokenizer_name(backend: dict[str, Any]) -> str:
    """Find llama.cpp's name for the pre-tokenizer of a tokenizer, given as the content of a `tokenizer.json`.

    Raises `ValueError` for a tokenizer that is no byte-level BPE, or that llama.cpp has no name for.
    """

    def splitters(pre: dict[str, Any] | None) -> list[dict[str, Any]]:
        """List what decides where text is split; offsets are a matter of the report alone."""
        if pre is not None and pre["type"] == "Sequence":
            return [item for inner in pre["pretokenizers"] for item in splitters(inner)]
        if pre is None:
            return []
        return [{key: value for key, value in pre.items() if key != "trim_offsets"}]

    model = backend["model"]
    normalizer = (backend.get("normalizer") or {}).get("type")
    of_bytes = model["type"] == "BPE" and not model.get("byte_fallback")
    found = splitters(backend.get("pre_tokenizer")), normalizer, bool(model.get("ignore_merges"))
    for name, build in PRE_TOKENIZERS.items():
        known = [each for made in build() for each in splitters(json.loads(made.__getstate__()))]
        if of_bytes and found == (known, "NFC" if name in NORMALIZERS else None, name in IGNORE_MERGES):
            return name
    kinds = ", ".join(item["type"] for item in found[0]) or "none"
    raise ValueError(
        f"tokenizer: expected byte-level BPE of {', '.join(PRE_TOKENIZERS)} for GGUF, got {model['type']} with "
        f"pre-tokenizer {kinds}, normalizer {normalizer} and ignore_merges {found[2]}; export with --format hf, padded "
        "or ragged instead, which copy the tokenizer's files"
    )


# --- loading -------------------------------------------------------------------------------------


def load_tokenizer(name: str | Path) -> Tokenizer:
    """Load the tokenizer of a model that `load_model` accepts, as a `transformers.PreTrainedTokenizerFast`.

    Needs no torch. `encode` adds a beginning-of-text token only if the model's tokenizer says so. Raises
    `FileNotFoundError` or `ValueError` with one line, also for token ids that the model's vocabulary does not have.

    >>> load_tokenizer(path).decode(tokenizer("a text")["input_ids"])
    'a text'
    """
    path = resolve(name)
    if path.is_file():
        with reading(path, "metadata of a tokenizer"):
            return _from_gguf(path)
    if not any((path / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise FileNotFoundError(
            f"{path}: expected tokenizer.json (or tokenizer.model), found neither; it has no tokenizer"
        )
    for file in _FILES:  # the library reads them too, but takes what is damaged for something else
        if (path / file).is_file():
            read_object(path / file)
    alone = not any((path / file).is_file() for file in ("tokenizer.json", "vocab.json"))
    if alone and not _reads_pieces():
        raise ValueError(
            f"{path / 'tokenizer.model'}: expected tokenizer.json beside it, or a package that reads it, got neither; "
            "run pip install sentencepiece protobuf"
        )
    library = _transformers()
    with reading(path, "a tokenizer"), _held_back():
        tokenizer = library.AutoTokenizer.from_pretrained(
            str(path),
            config=library.LlamaConfig(),  # the directory's own may say saap_llama, which the library refuses
            local_files_only=True,
            trust_remote_code=False,
        )
        tokenizer.decode(tokenizer.encode("a b", verbose=False))  # it looks at some settings not before they are used
    if (path / "config.json").is_file():
        vocab = read_object(path / "config.json").get("vocab_size")
        if type(vocab) is int:
            _check_ids(tokenizer.get_vocab(), vocab, path)
    return tokenizer


def _check_ids(vocabulary: dict[str, int], vocab: int, path: Path) -> None:
    """Refuse a tokenizer whose ids, those of added tokens among them, are beyond the model's vocabulary."""
    beyond = [(index, token) for token, index in vocabulary.items() if index >= vocab]
    if beyond:
        index, token = max(beyond)
        raise ValueError(
            f"{path}: the tokenizer has {len(beyond)} tokens beyond the model's vocabulary of {vocab:,}, up to id "
            f"{index:,} ({shown(token)}); it belongs to another model, or its added tokens were never trained"
        )


def _reads_pieces() -> bool:
    """Say whether there is a package by which transformers reads `tokenizer.model`."""
    return any(importlib.util.find_spec(package) is not None for package in ("sentencepiece", "tiktoken"))


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """Hold back what transformers logs until the end; where an error is raised, that alone is said."""
    logger = logging.getLogger("transformers")
    handlers = logger.handlers
    held = [logging.handlers.MemoryHandler(10_000, logging.CRITICAL + 1, handler) for handler in handlers]
    logger.handlers = list(held)
    try:
        yield
    finally:
        logger.handlers = handlers
    for each in held:
        each.flush()


def _transformers() -> Any:
    """Import transformers without its advice to install PyTorch, which this library does not use."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers


# --- rebuilt from GGUF ---------------------------------------------------------------------------


_FIELDS = {"tokens": "a text*", "token_type": "an integer*", "scores": "a number*", "merges": "a text*"}
ROLES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
"""What transformers calls a token -> what GGUF does."""


def _from_gguf(path: Path) -> Tokenizer:
    from saap_jax.llama.files.gguf import WINDOW_KEYS, open_gguf_file

    file = open_gguf_file(path)
    prefix = "tokenizer.ggml."
    fields = file.fields
    given = {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}
    found = checked(given, _FIELDS, str(path), prefix)
    kind = found.get("model")
    pre = found.get("pre")
    if kind in (None, "none"):
        raise FileNotFoundError(f"{path}: expected {prefix}model, found none; it has no tokenizer")
    pieces = kind == "llama" and fields.get("general.architecture") in SENTENCE_PIECES
    if kind != "gpt2" and not pieces:
        raise ValueError(f"{path}: {prefix}model = {shown(kind)} is not supported, expected 'gpt2' (byte-level BPE)")
    if not pieces and (not isinstance(pre, str) or pre not in PRE_TOKENIZERS):
        known = ", ".join(PRE_TOKENIZERS)
        raise ValueError(f"{path}: {prefix}pre = {shown(pre)} is not supported, expected {known}")
    if found.get("add_space_prefix"):
        raise ValueError(f"{path}: {prefix}add_space_prefix = true is not supported")
    tokens = found["tokens"]
    for key, what in (("token_type", "token_type"), *((("scores", "score"),) if pieces else ())):
        if len(found[key]) != len(tokens):
            raise ValueError(f"{path}: expected a {what} for each of {len(tokens):,} tokens, got {len(found[key]):,}")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocabulary[token] != index)
        raise ValueError(f"{path}: expected different tokens, got {shown(twice)} twice in {prefix}tokens")
    if "token_embd.weight" in file.tensors:
        _check_ids(vocabulary, file.shape("token_embd.weight")[0], path)
    named = {}
    for role, key in ROLES.items():
        if (index := found.get(f"{key}_token_id")) is not None:
            if type(index) is not int or not 0 <= index < len(tokens):
                raise ValueError(
                    f"{path}: expected {prefix}{key}_token_id to be an id below {len(tokens):,}, got {shown(index)}"
                )
            named[role] = tokens[index]
    if pieces:
        made = _sentence_pieces(found, vocabulary, named)
    else:
        made = _byte_pairs(found, vocabulary, str(pre))
    _add_special(made, found, named)
    positions = fields[f"{fields['general.architecture']}.context_length"]
    return _transformers().PreTrainedTokenizerFast(
        tokenizer_object=made,
        clean_up_tokenization_spaces=False,
        model_max_length=fields.get(WINDOW_KEYS["context_length"], positions),
        chat_template=fields.get("tokenizer.chat_template"),
        **named,
    )


def _byte_pairs(found: Values, vocabulary: dict[str, int], pre: str) -> tokenizers.Tokenizer:
    """Build the byte-level BPE of a file, with the pre-tokenizer that it names."""
    merges = [tuple(pair.split(" ")) for pair in found.get("merges", [])]
    if wrong := next((pair for pair in merges if len(pair) != 2), None):
        raise ValueError(f"{found.where}: expected merges of two tokens with a blank between, got {shown(wrong)}")
    with reading(found.where, "tokenizer.ggml.merges that fit its tokens"):
        byte_level = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre in IGNORE_MERGES))
    byte_level.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[pre]())
    if pre in NORMALIZERS:
        byte_level.normalizer = NORMALIZERS[pre]()
    byte_level.decoder = decoders.ByteLevel()
    return byte_level


def _sentence_pieces(found: Values, vocabulary: dict[str, int], named: dict[str, str]) -> tokenizers.Tokenizer:
    """Build the byte-pair encoding of SentencePiece with bytes for what it has no piece of, as Gemma has it.

    SentencePiece joins the two neighbours whose join has the highest score; merges in the order of scores do the same.
    """
    if "unk_token" not in named:
        raise ValueError(f"{found.where}: expected tokenizer.ggml.unknown_token_id, got none")
    kinds = found["token_type"]
    scores = found["scores"]
    joined = {token for token, index in vocabulary.items() if kinds[index] == _NORMAL}
    merges = [
        (-scores[vocabulary[token]], vocabulary[token], vocabulary[left], left, right)
        for token in joined
        for at in range(1, len(token))
        if (left := token[:at]) in joined and (right := token[at:]) in joined
    ]
    pairs = [(left, right) for *_, left, right in sorted(merges)]
    model = models.BPE(vocabulary, pairs, unk_token=named["unk_token"], fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _add_special(tokenizer: tokenizers.Tokenizer, found: Values, named: dict[str, str]) -> None:
    """Add the tokens that are no text, and those that the file, or else llama.cpp, has at beginning and end."""
    for token, kind in zip(found["tokens"], found["token_type"], strict=True):
        if kind in (_CONTROL, _UNKNOWN):
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == _USER:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
        elif kind not in (_NORMAL, _UNUSED) and not (kind == _BYTE and token.startswith("<0x")):
            raise ValueError(
                f"{found.where}: token {shown(token)} has token_type {kind}, which its model does not have"
            )
    begins = (found["model"] == "llama" or found["pre"] in BEGIN) and "bos_token" in named
    wanted = {}
    for key, role, default in (("add_bos_token", "bos_token", begins), ("add_eos_token", "eos_token", False)):
        if found.get(key, default):
            if role not in named:
                raise ValueError(f"{found.where}: tokenizer.ggml.{key} is true, but the file names no {role}")
            wanted[role] = named[role]
    if wanted:
        parts = [wanted.get("bos_token"), "$A", wanted.get("eos_token")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(part for part in parts if part is not None),
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in set(wanted.values())],
        )
