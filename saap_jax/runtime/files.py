"""Files of plain values and arrays: written whole or not at all, and read without trust in what they hold.

JSON has no NaN and no infinities: they are stored as the strings "NaN", "Infinity" and "-Infinity" (which `float`
understands), and come back as floats.
"""

import io
import json
import math
import os
import struct
import tokenize
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from saap_jax.runtime.processes import is_primary

KINDS = "biufcSU"
"""Kinds of numpy types that an array in a file may have: numbers and text, no objects."""

LONGEST_LINE = 2**26
"""Bytes of a line that is read at most; a longer one is none of ours."""

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_DIGITS = 300
"""Whole numbers of more digits are read as floats, infinite ones: nothing can compute with them."""

_DAMAGED = (
    zipfile.BadZipFile, struct.error, EOFError, KeyError, MemoryError, NotImplementedError, OSError, OverflowError,
    RuntimeError, SyntaxError, TypeError, ValueError, tokenize.TokenError,
)  # fmt: skip
"""What `zipfile` and numpy raise for content that is no npz file, or a damaged one."""


# --- writing -----------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Return a value as JSON holds it: mappings, lists, strings, numbers, None; NaN and infinities as strings.

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
    """Return a value as JSON."""
    return json.dumps(plain(value), indent=indent, allow_nan=False).encode()


def cache() -> Path:
    """Return the directory of files that are made of others, `$XDG_CACHE_HOME/saap_jax` or `~/.cache/saap_jax`."""
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
    """Append a line to a file, whole or not at all; a line that a killed process tore stays a line of its own."""
    with open(path, "ab+") as file:
        size = file.tell()
        if size > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = b"\n" + line
        try:
            _write_all(file.fileno(), line + b"\n")
            os.fsync(file.fileno())
        except BaseException as error:
            os.ftruncate(file.fileno(), size)
            if size == 0:
                path.unlink()
            _say_where(error, path)
            raise


def _say_where(error: BaseException, path: Path) -> None:
    """Name the file in an error of the system that does not: writing and syncing know a descriptor only."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        error.filename = str(path)


def _write_all(descriptor: int, content: bytes) -> None:
    """Write around the buffer of the file: it would be written once more when the file is closed."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def arrays_file(arrays: Mapping[str, Any], name: str) -> bytes:
    """Return arrays as the content of an npz file, not compressed; keys may hold slashes.

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
    """Return the value of a JSON text, non-finite numbers included.

    Raises:
        ValueError: it is no JSON, nested too deeply, has a key twice, or text that no encoding holds.
    """
    try:
        value = json.loads(content.decode(), object_pairs_hook=_object, parse_int=_integer)
        if b"\\ud" in content.lower():  # half of a surrogate pair is a string that cannot be printed or written
            json.dumps(value, ensure_ascii=False).encode()
        return _decode(value)
    except UnicodeEncodeError:
        raise ValueError("text with half of a surrogate pair") from None
    except RecursionError:
        raise ValueError("values nested too deeply") from None
    except MemoryError:
        raise ValueError("more values than fit into memory") from None


def read_json(path: Path) -> Any:
    """Read the plain value of a JSON file, non-finite numbers included.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return decoded(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"expected JSON in {path}, got {error}; the file was changed or damaged") from error


def lines_of(path: Path) -> Iterator[Any]:
    """Yield the value of each line of a file of JSON lines, an exception in place of one that is none."""
    with open(path, "rb") as file:
        while line := file.readline(LONGEST_LINE):
            if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                while (rest := file.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                    pass
                yield ValueError(f"a line of more than {LONGEST_LINE} bytes")
            elif line.strip():
                try:
                    yield decoded(line)
                except ValueError as error:
                    yield error


def read_arrays(content: bytes) -> dict[str, np.ndarray]:
    """Return the arrays of the content of an npz file as `arrays_file` makes it.

    What is declared is held against the size of the content before anything is read: no array is larger than its part.

    Raises:
        ValueError: it is no such file, or damaged.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = archive.infolist()
            if (declared := sum(each.file_size for each in members)) > len(content):
                raise ValueError(f"expected parts of at most {len(content)} bytes together, got {declared}")
            return dict(_member(archive, each) for each in members)
    except _DAMAGED as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def _member(archive: zipfile.ZipFile, about: zipfile.ZipInfo) -> tuple[str, np.ndarray]:
    name = about.filename.removesuffix(".npy")
    if about.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"expected arrays that are not compressed, got {name!r} compressed")
    content = io.BytesIO(archive.read(about))
    size = content.getbuffer().nbytes
    version = np.lib.format.read_magic(content)
    if version not in _HEADERS:
        raise ValueError(f"expected format 1.0 or 2.0 of {name!r}, got {version}")
    shape, _, dtype = _HEADERS[version](content)
    if dtype.kind not in KINDS or dtype.names is not None:
        raise ValueError(f"expected numbers or text at {name!r}, got {dtype}")
    expected = math.prod(shape) * dtype.itemsize
    if any(length < 0 for length in shape) or expected != size - content.tell():
        raise ValueError(f"expected {expected} bytes for {name!r} of shape {shape}, got {size - content.tell()}")
    content.seek(0)
    return name, np.lib.format.read_array(content, allow_pickle=False)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the key {twice[:80]!r} twice in one object")
    return found


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _DIGITS else float(digits)


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) if isinstance(item, dict | list | str) else item for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value
