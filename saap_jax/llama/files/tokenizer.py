"""Load the tokenizer that belongs to a model: from its directory or hub name, or rebuilt from GGUF metadata."""

import logging
import re
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from saap_jax.formats.json_files import read_object, shown
from saap_jax.llama.files.gguf_file import GgufFile, open_gguf_file
from saap_jax.llama.files.gguf_tokenizer import BEGIN, IGNORE_MERGES, NORMALIZERS, PRE_TOKENIZERS
from saap_jax.llama.files.load import one_line, resolve

Tokenizer = Any
"""A `transformers.PreTrainedTokenizerFast`; not named as such, because importing transformers takes seconds."""

_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
"""JSON files of a tokenizer, each of which may be absent."""

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)

SENTENCE_PIECES = {"gemma3"}
"""Architectures of GGUF whose pieces of SentencePiece (`llama`) are put together again; text gets no blank before."""


def load_tokenizer(name: str | Path) -> Tokenizer:
    """Load the tokenizer of a model that `load_model` accepts, as a `transformers.PreTrainedTokenizerFast`.

    Needs no torch. `encode` adds a beginning-of-text token only if the model's tokenizer says so. Raises
    `FileNotFoundError` or `ValueError` with one line, also for token ids that the model's vocabulary does not have.
    """
    path = resolve(name)
    if path.is_file():
        return _from_gguf(path)
    if not any((path / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise FileNotFoundError(
            f"{path}: expected tokenizer.json (or tokenizer.model), found neither; it has no tokenizer"
        )
    for file in _FILES:  # the library reads them too, but takes what is damaged for something else
        if (path / file).is_file():
            read_object(path / file)
    tokenizer = _from_directory(path)
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


def _from_directory(path: Path) -> Tokenizer:
    try:
        library = _transformers()
        tokenizer = library.AutoTokenizer.from_pretrained(
            str(path),
            config=library.LlamaConfig(),  # the directory's own may say saap_llama, which the library refuses
            local_files_only=True,
            trust_remote_code=False,
        )
        tokenizer.decode(tokenizer.encode("a b", verbose=False))  # it looks at some settings not before they are used
        return tokenizer
    except Exception as error:  # the library raises whatever its parsers meet
        raise ValueError(f"{path}: the tokenizer cannot be loaded ({one_line(error)})") from error


def _transformers() -> Any:
    """Import transformers without its advice to install PyTorch, which this library does not use."""

    def unrelated(record: logging.LogRecord) -> bool:
        return "PyTorch was not found" not in record.getMessage()

    logger = logging.getLogger("transformers")
    logger.addFilter(unrelated)
    try:
        import transformers
    finally:
        logger.removeFilter(unrelated)
    return transformers


def _from_gguf(path: Path) -> Tokenizer:
    file = open_gguf_file(path)
    fields = file.fields
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    pieces = kind == "llama" and fields.get("general.architecture") in SENTENCE_PIECES
    if kind != "gpt2" and not pieces:
        raise ValueError(
            f"{path}: tokenizer.ggml.model = {shown(kind)} is not supported, expected 'gpt2' (byte-level BPE)"
        )
    if not pieces and (not isinstance(pre, str) or pre not in PRE_TOKENIZERS):
        known = ", ".join(PRE_TOKENIZERS)
        raise ValueError(f"{path}: tokenizer.ggml.pre = {shown(pre)} is not supported, expected {known}")
    if fields.get("tokenizer.ggml.add_space_prefix"):
        raise ValueError(f"{path}: tokenizer.ggml.add_space_prefix = true is not supported")
    tokens, types = _list(file, "tokens", str), _list(file, "token_type", int)
    if len(types) != len(tokens):
        raise ValueError(f"{path}: expected a token_type for each of {len(tokens):,} tokens, got {len(types):,}")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocabulary[token] != index)
        raise ValueError(f"{path}: expected different tokens, got {shown(twice)} twice in tokenizer.ggml.tokens")
    if (embedding := file.tensors.get("token_embd.weight")) is not None:
        _check_ids(vocabulary, int(embedding.shape[-1]), path)
    named = _roles(file, tokens)
    made = _sentence_pieces(file, tokens, types, named) if pieces else _byte_pairs(file, vocabulary, str(pre))
    _add_special(made, tokens, types, path)
    _add_template(made, fields, named, path)
    context, template = fields.get(f"{fields.get('general.architecture')}.context_length"), "tokenizer.chat_template"
    if type(context) is not int or not isinstance(fields.get(template, ""), str):
        raise ValueError(f"{path}: expected a context_length, an integer, and {template}, a text, got others")
    return _transformers().PreTrainedTokenizerFast(
        tokenizer_object=made,
        clean_up_tokenization_spaces=False,
        model_max_length=context,
        chat_template=fields.get(template),
        **named,
    )


def _byte_pairs(file: GgufFile, vocabulary: dict[str, int], pre: str) -> tokenizers.Tokenizer:
    """Return the byte-level BPE of a file, with the pre-tokenizer that it names."""
    merges = [
        tuple(pair.split(" "))
        for pair in (_list(file, "merges", str) if "tokenizer.ggml.merges" in file.entries else [])
    ]
    if wrong := next((pair for pair in merges if len(pair) != 2), None):
        raise ValueError(f"{file.path}: expected merges of two tokens with a blank between, got {shown(wrong)}")
    try:
        model = models.BPE(vocabulary, merges, ignore_merges=pre in IGNORE_MERGES)
    except Exception as error:  # the library raises no narrower one
        raise ValueError(f"{file.path}: tokenizer.ggml.merges do not fit its tokens ({one_line(error)})") from None
    byte_level = tokenizers.Tokenizer(model)
    byte_level.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[pre]())
    if pre in NORMALIZERS:
        byte_level.normalizer = NORMALIZERS[pre]()
    byte_level.decoder = decoders.ByteLevel()
    return byte_level


def _sentence_pieces(
    file: GgufFile, tokens: list[str], types: list[int], named: dict[str, str]
) -> tokenizers.Tokenizer:
    """Return the byte-pair encoding of SentencePiece with bytes for what it has no piece of, as Gemma has it.

    SentencePiece joins the two neighbours whose join has the highest score; merges in the order of scores do the same.
    """
    scores = _list(file, "scores", float)
    if len(scores) != len(tokens):
        raise ValueError(f"{file.path}: expected a score for each of {len(tokens):,} tokens, got {len(scores):,}")
    if "unk_token" not in named:
        raise ValueError(f"{file.path}: expected tokenizer.ggml.unknown_token_id, got none")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    joined = {token for token, kind in zip(tokens, types, strict=True) if kind == _NORMAL}
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


def _list(file: GgufFile, key: str, kind: type) -> list[Any]:
    values = file.fields.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        name = {str: "texts", int: "integers", float: "numbers"}[kind]
        raise ValueError(f"{file.path}: expected tokenizer.ggml.{key} to be an array of {name}, got {shown(values)}")
    return values


def _roles(file: GgufFile, tokens: list[str]) -> dict[str, str]:
    """Return the token of each role that the file names."""
    named = {}
    for role, key in {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}.items():
        if (index := file.fields.get(name := f"tokenizer.ggml.{key}_token_id")) is None:
            continue
        if type(index) is not int or not 0 <= index < len(tokens):
            raise ValueError(f"{file.path}: expected {name} to be an id below {len(tokens):,}, got {shown(index)}")
        named[role] = tokens[index]
    return named


def _add_special(tokenizer: tokenizers.Tokenizer, tokens: list[str], types: list[int], path: Path) -> None:
    for token, kind in zip(tokens, types, strict=True):
        if kind in (_CONTROL, _UNKNOWN):
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == _USER:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
        elif kind not in (_NORMAL, _UNUSED) and not (kind == _BYTE and re.fullmatch("<0x[0-9A-F]{2}>", token)):
            raise ValueError(f"{path}: token {shown(token)} has token_type {kind}, which its model does not have")


def _add_template(tokenizer: tokenizers.Tokenizer, fields: dict[str, Any], named: dict[str, str], path: Path) -> None:
    """Have `encode` add the beginning and end tokens that the file asks for, or llama.cpp where it does not say."""
    begins = fields["tokenizer.ggml.model"] == "llama" or fields["tokenizer.ggml.pre"] in BEGIN
    wanted = {}
    for key, role, default in (
        ("add_bos_token", "bos_token", begins and "bos_token" in named),
        ("add_eos_token", "eos_token", False),
    ):
        if fields.get(f"tokenizer.ggml.{key}", default):
            if role not in named:
                raise ValueError(f"{path}: tokenizer.ggml.{key} is true, but the file names no {role}")
            wanted[role] = named[role]
    if wanted:
        parts = [wanted.get("bos_token"), "$A", wanted.get("eos_token")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(part for part in parts if part is not None),
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in set(wanted.values())],
        )
