"""Blocks as CSV that a spreadsheet shows as it is."""

import base64
import csv
import io
from collections.abc import Iterable
from typing import Any

from saap_jax.report.page.blocks import Data
from saap_jax.runtime.visible import visible

_FORMULA = ("=", "+", "-", "@", "\t")
"""What a cell begins with that a spreadsheet takes for a formula."""


def csv_text(header: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    """Return a table as CSV, numbers in full precision, None as an empty cell.

    Text that a spreadsheet would take for a formula begins with an apostrophe, as the spreadsheet itself writes it;
    control characters are written out.

    >>> print(csv_text(["name", "change"], [["=1+2", -0.5], ["-", None], ["-1e-3", "a,b"]]), end="")
    name,change
    '=1+2,-0.5
    -,
    -1e-3,"a,b"
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(_cell, header))
    writer.writerows(map(_cell, row) for row in rows)
    return text.getvalue()


def data_text(data: Data) -> str:
    """Return the table of a block as CSV."""
    return csv_text(data.header, data.rows)


def data_address(data: Data) -> str:
    """Return the table of a block as an address that holds it, so that a page needs no second file."""
    return f"data:text/csv;base64,{base64.b64encode(data_text(data).encode()).decode()}"


def without_nan(row: Iterable[Any]) -> list[Any]:
    """Return values for a line of CSV; NaN becomes an empty cell.

    >>> without_nan(["a", float("nan"), 0.5])
    ['a', None, 0.5]
    """
    return [None if value != value else value for value in row]


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = visible(value)
    if not text.startswith(_FORMULA) or text == "-":
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text
