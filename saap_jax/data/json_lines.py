"""Files of JSON lines: one object a line."""

import json
from collections.abc import Iterator
from typing import Any


def json_lines(text: str, source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each line's number, from 1, and its object; blank lines are passed over.

    Raises:
        ValueError: a line is not JSON, or no object.
    """
    # Not `splitlines`: a JSON string may hold U+2028 and others that it takes for the end of a line.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"data source {source!r}: line {number} is not JSON: {error.msg}") from None
        if not isinstance(record, dict):
            raise ValueError(f"data source {source!r}: line {number}: expected an object, got {type(record).__name__}")
        yield number, record


def fields_of(record: dict[str, Any]) -> str:
    """Name the fields of an object with their types, for a message."""
    return ", ".join(f"{key} ({type(item).__name__})" for key, item in record.items()) or "none"
