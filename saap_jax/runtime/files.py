"""Files of plain values and arrays: written whole or not at all.

JSON has no NaN and no infinities: they are stored as the strings "NaN", "Infinity" and "-Infinity" (which `float`
understands), and come back as floats.
"""

import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from saap_jax.runtime.errors import reading
from saap_jax.runtime.processes import is_primary

KINDS = "biufcSU"
"""Kinds of numpy types that an array in a file may have: numbers and text, no objects."""

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


# --- writing -----------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Turn a value into what JSON holds: mappings, lists, strings, numbers, None; NaN and infinities as strings.

    >>> plain({"ratios": (0.2, float("inf"))})
    {'ratios': [0.2, 'Infinity']}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):  # numbers at once: a run may hold a million of them
        return [
            item if type(item) is int or (type(item) is float and math.isfinite(item)) else plain(item)
            for item in value
        ]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # arrays and scalars of numpy and jax
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError(f"expected a value that JSON can hold, got {type(value).__name__}: {value!r}")


def encoded(value: Any, indent: int | None = None) -> bytes:
    """Encode a value as JSON."""
    return json.dumps(plain(value), indent=indent, allow_nan=False).encode()


def cache() -> Path:
    """Name the directory of files that are made of others, `$XDG_CACHE_HOME/saap_jax` or `~/.cache/saap_jax`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saap_jax"


def check_target(name: str, path: str) -> None:
    """Raise ValueError, before any work, where a file cannot be written; an empty path stands for none."""
    if path and (Path(path).is_dir() or not Path(path).parent.is_dir()):
        raise ValueError(f"{name}: expected a file in a directory that exists, got {path}; make the directory first")


def write_atomically(path: Path, content: bytes, *, partial: Path | None = None) -> None:
    """Write a file so that its name holds either the old content or the whole new one, whenever the process ends.

    Nothing is left behind where that fails, as on a full disk. Of several processes of a job, the first one writes.

    Args:
        partial: where it is written first, in the same directory; by default `.NAME.partial`.
    """
    if not is_primary():
        return
    partial = partial or path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        _say_where(error, path)
        raise


def append_line(path: Path, line: bytes) -> None:
    """Append a line to a file, whole or not at all; the end of one that a kill tore is taken off first."""
    with open(path, "ab+") as file:
        whole = size = file.tell()
        file.seek(max(size - 1, 0))
        if file.read() not in (b"", b"\n"):
            file.seek(0)
            whole = file.read().rfind(b"\n") + 1
        try:
            file.truncate(whole)
            rest = memoryview(line + b"\n")
            while rest:  # around the buffer of the file: it would be written once more when the file is closed
                rest = rest[os.write(file.fileno(), rest) :]
            os.fsync(file.fileno())
        except BaseException as error:
            os.ftruncate(file.fileno(), whole)
            if size == 0:
                path.unlink()
            _say_where(error, path)
            raise


def _say_where(error: BaseException, path: Path) -> None:
    """Name the file in an error of the system that does not: writing and syncing know a descriptor only."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        error.filename = str(path)


def arrays_file(arrays: Mapping[str, Any], name: str) -> bytes:
    """Encode arrays as the content of an npz file, not compressed; keys may hold slashes.

    Raises:
        ValueError: an array's type is unknown to the format (bfloat16, objects); `name` is that of the file.
    """
    values = {key: np.asarray(value) for key, value in arrays.items()}
    for key, value in values.items():
        if value.dtype.kind not in KINDS:
            raise ValueError(f"expected numbers or text at {key!r} of {name}, got {value.dtype}; convert it first")
    file = io.BytesIO()
    np.savez(file, **values)  # pyright: ignore[reportArgumentType]  # its stub takes an array for `allow_pickle`
    return file.getvalue()


# --- reading -----------------------------------------------------------------------------------


def decoded(content: bytes) -> Any:
    """Decode a JSON text, non-finite numbers included.

    Raises:
        ValueError: it is no JSON, or nested too deeply.
    """
    try:
        return _decode(json.loads(content.decode()))
    except RecursionError:
        raise ValueError("values nested too deeply") from None


def read_json(path: Path) -> Any:
    """Read the plain value of a JSON file, non-finite numbers included.

    Raises:
        ValueError: it is no JSON.
    """
    with reading(path, "JSON; the file was changed or damaged"):
        return decoded(path.read_bytes())


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) if isinstance(item, dict | list | str) else item for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value
