"""Tables as CSV that a spreadsheet shows as it is, with all digits."""

import csv
import io
from collections.abc import Iterable
from typing import Any

from saap_jax.report.blocks import Table
from saap_jax.runtime.words import visible

_FORMULA = ("=", "+", "-", "@", "\t")
"""What a cell begins with that a spreadsheet takes for a formula."""


def table_csv(table: Table) -> str:
    """Return the rows of a table, a column a field; NaN and what a row lacks are empty cells, true is 1."""
    fields = [*dict.fromkeys(field for column in table.columns for field in column.fields)]
    return csv_text(fields, (map(row.get, fields) for row in table.rows))


def csv_text(header: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    """Return values as CSV, numbers in full precision.

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


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return None if value != value else int(value) if isinstance(value, bool) else value
    text = visible(value)
    if not text.startswith(_FORMULA) or text == "-":
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text
