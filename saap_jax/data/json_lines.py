"""Text files line by line, in bounded memory, and files of JSON lines: one object a line."""

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from saap_jax.formats.json_files import parse_json, read_lines, shown

LINE = 2**23
"""Bytes of a line, 8 MiB: a tokenizer takes two hundred times the memory of a line without blanks."""

WHOLE = 2**30
"""Bytes of a file, 1 GiB, as all of its text is held in memory."""


def text_lines(path: Path, source: str) -> Iterator[tuple[int, bytes]]:
    """Yield the number of each line, from 1, and its bytes, without a byte order mark before the first.

    Raises:
        ValueError: a line or the file is too long.
    """
    if (size := path.stat().st_size) > WHOLE:
        raise ValueError(f"data source {source!r}: expected at most {WHOLE:,} bytes, got {size:,}; give a part of it")
    for number, line in read_lines(path, limit=LINE):
        yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def json_lines(lines: Iterable[tuple[int, bytes]], source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the object of each line; blank lines are passed over.

    Raises:
        ValueError: a line is not JSON, or no object.
    """
    for number, line in lines:
        if not line.strip():
            continue
        record = parse_json(line, f"data source {source!r}: line {number}")
        if not isinstance(record, dict):
            raise ValueError(f"data source {source!r}: line {number}: expected an object, got {type(record).__name__}")
        yield number, record


def fields_of(record: dict[str, Any]) -> str:
    """Name the first ten fields of an object with their types, for a message."""
    named = [f"{key if key.isidentifier() else shown(key)} ({type(item).__name__})" for key, item in record.items()]
    more = f" and {len(named) - 10} more" if len(named) > 10 else ""
    return ", ".join(each[:100] for each in named[:10]) + more or "none"
