"""JSON of files that others made: values, objects and lines, or one ValueError that names the file.

A key that comes twice in an object is refused, and so are NaN and infinities: a reader would choose one without a word.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from saap_jax.runtime.errors import reading, shown

__all__ = ["LINE_LIMIT", "fields_of", "parse_json", "read_json", "read_lines", "read_object", "shown"]

LINE_LIMIT = 2**23
"""Bytes of a line, 8 MiB: a tokenizer takes two hundred times the memory of a line without blanks."""


def read_json(path: Path) -> Any:
    """Read the value of a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON; the message begins with the path.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a file, found none")
    return parse_json(path.read_bytes(), str(path))


def read_object(path: Path) -> dict[str, Any]:
    """Read the object of a JSON file; raises as `read_json`, also for another value."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def read_lines(path: Path, *, limit: int = LINE_LIMIT) -> Iterator[tuple[int, bytes]]:
    """Yield the number, from 1, and the bytes of each line, with its line end (the last one may have none).

    Raises:
        ValueError: a line of more than `limit` bytes, of which no more is read than that.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(limit + 1), b""), 1):
            if len(line) > limit:
                raise ValueError(f"{path}: line {number}: expected at most {limit:,} bytes, got a longer line")
            yield number, line


def parse_json(data: bytes, where: str) -> Any:
    """Read JSON text; `where` (a path, or path and line) begins the message of a ValueError.

    >>> parse_json(b'{"a": 1, "a": 2}', "c")
    Traceback (most recent call last):
    saap_jax.runtime.errors.UnreadableFileError: c: expected JSON, which cannot be read (the key 'a' comes twice)
    """
    with reading(where, "JSON"):
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
        if b"\\ud" in data.lower():  # half of a surrogate pair is text that nothing can encode
            json.dumps(value, ensure_ascii=False).encode()
        return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {shown(twice)} comes twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name}, which is no number of JSON")


def fields_of(record: dict[str, Any]) -> str:
    """Name the first ten fields of an object with their types, for a message."""
    named = [f"{key if key.isidentifier() else shown(key)} ({type(item).__name__})" for key, item in record.items()]
    more = f" and {len(named) - 10} more" if len(named) > 10 else ""
    return ", ".join(each[:100] for each in named[:10]) + more or "none"
