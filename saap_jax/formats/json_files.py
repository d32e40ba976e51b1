"""Read JSON strictly and in bounded memory: whatever a file holds, a value that is safe to use or one ValueError.

Refused beside what is no JSON: text that is no UTF-8, keys that come twice in an object, NaN and infinities (also
numbers too large for a float), halves of surrogate pairs (text that nothing can print or encode), values nested deeper
than `DEPTH`, more than `VALUES` values, and files or lines over a limit of bytes.
"""

import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

LIMIT = 2**26
"""Bytes of a file, 64 MiB; four times that where a character outside the basic plane is in the text."""

LINE_LIMIT = 2**24
"""Bytes of a line, 16 MiB."""

VALUES = 2**23
"""Commas and brackets, which bound the number of values: each takes up to a hundred bytes of memory."""

DEPTH = 64
"""Objects and lists within each other."""

_SUSPECT = re.compile(rb"\\u[dD][89a-fA-F]|[0-9]{300}|[eE]\+?0*[1-9][0-9]{2}")
"""What halves of surrogate pairs and numbers beyond floats look like in the file; most files have none of it."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlevel = 3


def read_json(path: Path, *, limit: int = LIMIT) -> Any:
    """Return the value of a JSON file of at most `limit` bytes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: what the file holds is refused, see the module; the message begins with the path.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a file, found none")
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path}: expected JSON of at most {limit:,} bytes, got a larger file")
    return parse_json(data, str(path))


def read_object(path: Path, *, limit: int = LIMIT) -> dict[str, Any]:
    """Return the object that a JSON file holds; raises as `read_json`, also for another value."""
    content = read_json(path, limit=limit)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def read_lines(path: Path, *, limit: int = LINE_LIMIT) -> Iterator[tuple[int, bytes]]:
    """Yield the number, from 1, and the bytes of each line, with its line end (the last one may have none).

    Raises:
        ValueError: a line of more than `limit` bytes, of which no more is read than that.
    """
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(limit + 1):
            number += 1
            if len(line) > limit:
                raise ValueError(f"{path}: line {number}: expected at most {limit:,} bytes, got a longer line")
            yield number, line


def parse_json(data: bytes, where: str) -> Any:
    """Return the value of JSON text; `where` (a path, or path and line) begins the message of a refusal.

    Raises:
        ValueError: see the module.

    >>> parse_json(b'{"a": 1, "a": 2}', "config.json")
    Traceback (most recent call last):
    ValueError: config.json: expected JSON, got the key 'a' twice in an object; the file is damaged
    """
    containers = data.count(b"[") + data.count(b"{")
    if containers + data.count(b",") > VALUES:
        raise ValueError(f"{where}: expected JSON of at most {VALUES:,} values, got more")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
        if containers > DEPTH or _SUSPECT.search(data):
            _check(value)
    except UnicodeDecodeError as error:
        reason = f"a byte 0x{data[error.start]:02x} at {error.start} that is no UTF-8"
    except RecursionError:
        reason = f"values nested deeper than {DEPTH}"
    except ValueError as error:
        reason = str(error)
    else:
        return value
    raise ValueError(f"{where}: expected JSON, got {reason}; the file is damaged")


def shown(value: Any) -> str:
    """Return a value as a message shows it: in Python's notation, cut where it is long, whatever it holds.

    >>> shown("a" * 1000)
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaa...aaaaaaaaaaaaaaaaaaaaaaaaaaaa'"
    """
    text = _SHORT.repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {shown(twice)} twice in an object")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name}, which is no number of JSON")


def _check(value: Any) -> None:
    """Raise ValueError for nesting, text and numbers that are refused; level by level, so that depth costs nothing."""
    level = [value]
    for depth in range(DEPTH + 1):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict | list) and depth == DEPTH:
                raise ValueError(f"values nested deeper than {DEPTH}")
            if isinstance(item, dict):
                inner += item
                inner += item.values()
            elif isinstance(item, list):
                inner += item
            elif isinstance(item, str):
                if not item.isascii() and any("\ud800" <= letter <= "\udfff" for letter in item):
                    raise ValueError(f"text with half of a surrogate pair, {shown(item)}")
            elif isinstance(item, int | float) and not _is_float(item):
                raise ValueError("a number that is too large")
        level = inner


def _is_float(number: int | float) -> bool:
    try:
        return math.isfinite(float(number))
    except OverflowError:
        return False
