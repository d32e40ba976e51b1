"""The boundary for files that others made: whatever is raised while one is read becomes one line that names it.

    with reading(path, "a safetensors file"):
        ...

Readers are those of libraries, and their errors are not foreseen one by one. What a file *means* is checked where it is
used, by errors that name the file themselves: they pass unchanged.

JSON, of which a key that comes twice in an object is refused, and so are NaN and infinities: a reader would choose one
without a word.
"""

import contextlib
import json
import reprlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

LINE_LIMIT = 2**23
"""Bytes of a line, 8 MiB: a tokenizer takes two hundred times the memory of a line without blanks."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlevel = 3


class UnreadableFileError(ValueError):
    """A file of the user that a library cannot read."""


class Doubt(UserWarning):
    """What a command says in one line on the error stream, and goes on."""


@contextlib.contextmanager
def reading(path: str | Path, what: str) -> Iterator[None]:
    """Turn whatever is raised while a file is read into one line: the file, what was expected, the library's reason.

    A file that is missing stays `FileNotFoundError`, and a lack of memory `MemoryError`.

    >>> with reading("config.json", "JSON"):
    ...     {}["a"]
    Traceback (most recent call last):
    saap_jax.errors.UnreadableFileError: config.json: expected JSON, which cannot be read (KeyError: 'a')
    """
    try:
        yield
    except (UnreadableFileError, FileNotFoundError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        raise UnreadableFileError(f"{path}: expected {what}, which cannot be read ({one_line(error)})") from error


def one_line(error: BaseException) -> str:
    """Say in one line what a library raised: its message, cut where it is long, after the type where that tells more.

    >>> one_line(ValueError("no header\\nat all")), one_line(KeyError("a"))
    ('no header at all', "KeyError: 'a'")
    """
    line = " ".join(str(error).split())
    if line and isinstance(error, ValueError | OSError):
        named = line
    else:
        named = f"{type(error).__name__}: {line}".strip(": ")
    if len(named) <= 300:
        return named
    return f"{named[:297]}..."


def shown(value: Any) -> str:
    """Show a value in a message: in Python's notation, cut where it is long, whatever it holds.

    >>> shown("a" * 1000)
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaa...aaaaaaaaaaaaaaaaaaaaaaaaaaaa'"
    """
    text = _SHORT.repr(value)
    if len(text) <= 200:
        return text
    return f"{text[:197]}..."


def read_object(path: Path) -> dict[str, Any]:
    """Read the object of a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no JSON, or another value; the message begins with the path.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a file, found none")
    content = parse_json(path.read_bytes(), str(path))
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
    saap_jax.errors.UnreadableFileError: c: expected JSON, which cannot be read (the key 'a' comes twice)
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise ValueError(f"the key {shown(twice)} comes twice")
        return dict(pairs)

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name}, which is no number of JSON")

    with reading(where, "JSON"):
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
        if b"\\ud" in data.lower():  # half of a surrogate pair is text that nothing can encode
            json.dumps(value, ensure_ascii=False).encode()
        return value


def fields_of(record: dict[str, Any]) -> str:
    """Name the first ten fields of an object with their types, for a message."""
    named = [f"{key if key.isidentifier() else shown(key)} ({type(item).__name__})" for key, item in record.items()]
    if len(named) > 10:
        more = f" and {len(named) - 10} more"
    else:
        more = ""
    return ", ".join(each[:100] for each in named[:10]) + more or "none"
