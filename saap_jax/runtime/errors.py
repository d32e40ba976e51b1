"""The boundary for files that others made: whatever is raised while one is read becomes one line that names it.

    with reading(path, "a safetensors file"):
        ...

Readers are those of libraries, and their errors are not foreseen one by one. What a file *means* is checked where it is
used, by errors that name the file themselves: they pass unchanged.
"""

import contextlib
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlevel = 3


class UnreadableFileError(ValueError):
    """A file of the user that a library cannot read."""


@contextlib.contextmanager
def reading(path: str | Path, what: str) -> Iterator[None]:
    """Turn whatever is raised while a file is read into one line: the file, what was expected, the library's reason.

    A file that is missing stays `FileNotFoundError`, and a lack of memory `MemoryError`.

    >>> with reading("config.json", "JSON"):
    ...     {}["a"]
    Traceback (most recent call last):
    saap_jax.runtime.errors.UnreadableFileError: config.json: expected JSON, which cannot be read (KeyError: 'a')
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
    named = line if line and isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {line}".strip(": ")
    return named if len(named) <= 300 else f"{named[:297]}..."


def shown(value: Any) -> str:
    """Show a value in a message: in Python's notation, cut where it is long, whatever it holds.

    >>> shown("a" * 1000)
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaa...aaaaaaaaaaaaaaaaaaaaaaaaaaaa'"
    """
    text = _SHORT.repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."
