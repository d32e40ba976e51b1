"""The byte-level pre-tokenizers that GGUF files name: how each is built, and which one a tokenizer has."""

import json
from typing import Any

import tokenizers
from tokenizers import normalizers, pre_tokenizers

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
    """Return llama.cpp's name for the pre-tokenizer of a tokenizer, given as the content of a `tokenizer.json`.

    Raises `ValueError` for a tokenizer that is no byte-level BPE, or that llama.cpp has no name for.
    """
    model = backend["model"]
    otherwise = "export with --format hf, padded or ragged instead, which copy the tokenizer's files"
    normalizer = (backend.get("normalizer") or {}).get("type")
    if model["type"] != "BPE" or model.get("byte_fallback") or normalizer not in (None, "NFC"):
        raise ValueError(f"tokenizer: GGUF export expects byte-level BPE without a normalizer; {otherwise}")
    found = _splitters(backend.get("pre_tokenizer"))
    for name, build in PRE_TOKENIZERS.items():
        made = [json.loads(splitter.__getstate__()) for splitter in build()]
        if [_essence(item) for item in made] == [_essence(item) for item in found]:
            if normalizer != ("NFC" if name in NORMALIZERS else None):
                expected = "NFC" if name in NORMALIZERS else "none"
                raise ValueError(f"tokenizer: {name!r} expects normalizer {expected}, got {normalizer}; {otherwise}")
            if bool(model.get("ignore_merges")) != (name in IGNORE_MERGES):
                raise ValueError(
                    f"tokenizer: llama.cpp's {name!r} expects ignore_merges = {name in IGNORE_MERGES}, "
                    f"got {bool(model.get('ignore_merges'))}; {otherwise}"
                )
            return name
    kinds = ", ".join(item["type"] for item in found) or "none"
    known = ", ".join(PRE_TOKENIZERS)
    raise ValueError(f"tokenizer: expected the pre-tokenizer of {known} for GGUF, got another ({kinds}); {otherwise}")


def _splitters(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] != "Sequence":
        return [pre_tokenizer]
    return [item for inner in pre_tokenizer["pretokenizers"] for item in _splitters(inner)]


def _essence(splitter: dict[str, Any]) -> dict[str, Any]:
    """Return what decides where a splitter splits; offsets are a matter of the report alone."""
    return {key: value for key, value in splitter.items() if key != "trim_offsets"}
