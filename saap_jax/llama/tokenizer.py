"""Load the tokenizer that belongs to a model: from its directory or hub name, or rebuilt from GGUF metadata."""

import logging
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from saap_jax.llama.gguf_tokenizer import IGNORE_MERGES, NORMALIZERS, PRE_TOKENIZERS
from saap_jax.llama.load import one_line, resolve
from saap_jax.llama.load_gguf import metadata, read_gguf

Tokenizer = Any
"""A `transformers.PreTrainedTokenizerFast`; not named as such, because importing transformers takes seconds."""

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED = 1, 2, 3, 4, 5


def load_tokenizer(name: str | Path) -> Tokenizer:
    """Load the tokenizer of a model that `load_model` accepts, as a `transformers.PreTrainedTokenizerFast`.

    Needs no torch. `encode` adds a beginning-of-text token only if the model's tokenizer says so. Raises
    `FileNotFoundError` or `ValueError` with one line.
    """
    path = resolve(name)
    if path.is_file():
        return _from_gguf(path)
    if not any((path / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise FileNotFoundError(
            f"{path}: expected tokenizer.json (or tokenizer.model), found neither; it has no tokenizer"
        )
    try:
        library = _transformers()
        return library.AutoTokenizer.from_pretrained(
            str(path),
            config=library.LlamaConfig(),  # the directory's own may say saap_llama, which the library refuses
            local_files_only=True,
            trust_remote_code=False,
        )
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
    reader = read_gguf(path)
    fields = metadata(reader)
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise ValueError(f"{path}: tokenizer.ggml.model = {kind!r} is not supported, expected 'gpt2' (byte-level BPE)")
    if pre not in PRE_TOKENIZERS:
        raise ValueError(f"{path}: tokenizer.ggml.pre = {pre!r} is not supported, expected {', '.join(PRE_TOKENIZERS)}")
    if fields.get("tokenizer.ggml.add_space_prefix"):
        raise ValueError(f"{path}: tokenizer.ggml.add_space_prefix = true is not supported")
    tokens, types = (reader.fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type"))
    merges = reader.fields["tokenizer.ggml.merges"].contents() if "tokenizer.ggml.merges" in reader.fields else []
    byte_level = tokenizers.Tokenizer(
        models.BPE(
            {token: index for index, token in enumerate(tokens)},
            [tuple(pair.split(" ")) for pair in merges],
            ignore_merges=pre in IGNORE_MERGES,
        )
    )
    byte_level.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[pre]())
    if pre in NORMALIZERS:
        byte_level.normalizer = NORMALIZERS[pre]()
    byte_level.decoder = decoders.ByteLevel()
    _add_special(byte_level, tokens, types, path)
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    ids = {role: fields.get(f"tokenizer.ggml.{key}_token_id") for role, key in names.items()}
    named = {role: tokens[index] for role, index in ids.items() if index is not None}
    _add_template(byte_level, fields, named, path)
    return _transformers().PreTrainedTokenizerFast(
        tokenizer_object=byte_level,
        clean_up_tokenization_spaces=False,
        model_max_length=fields[f"{fields['general.architecture']}.context_length"],
        chat_template=fields.get("tokenizer.chat_template"),
        **named,
    )


def _add_special(tokenizer: tokenizers.Tokenizer, tokens: list[str], types: list[int], path: Path) -> None:
    for token, kind in zip(tokens, types, strict=True):
        if kind in (_CONTROL, _UNKNOWN):
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == _USER:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
        elif kind not in (_NORMAL, _UNUSED):
            raise ValueError(f"{path}: token {token!r} has token_type {kind}, which byte-level BPE does not have")


def _add_template(tokenizer: tokenizers.Tokenizer, fields: dict[str, Any], named: dict[str, str], path: Path) -> None:
    """Have `encode` add the beginning and end tokens that the file asks for."""
    wanted = {}
    for key, role in (("add_bos_token", "bos_token"), ("add_eos_token", "eos_token")):
        if fields.get(f"tokenizer.ggml.{key}"):
            if role not in named:
                raise ValueError(f"{path}: tokenizer.ggml.{key} is true, but the file names no {role}")
            wanted[role] = named[role]
    if wanted:
        parts = [wanted.get("bos_token"), "$A", wanted.get("eos_token")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(part for part in parts if part is not None),
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in set(wanted.values())],
        )
