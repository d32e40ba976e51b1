"""Results as tables in a Python session: a pandas data frame, and what a notebook shows. Both read `rows()`."""

import html
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, Protocol, runtime_checkable

SHOWN = 20
"""Rows that a notebook shows."""


@runtime_checkable
class HasRows(Protocol):
    """A result that can be laid out in rows."""

    def rows(self) -> Iterator[Mapping[str, Any]]:
        """Yield one mapping a row, all of the same keys in the same order."""
        ...


def to_dataframe(self: HasRows) -> Any:
    """Build a `pandas.DataFrame` of the rows.

    Raises:
        ImportError: pandas is not installed; nothing else here asks for it.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError("to_dataframe: expected pandas, found none; pip install pandas, or use rows()") from error
    return pandas.DataFrame(list(self.rows()))


def repr_html(self: HasRows) -> str:
    """Lay out the first rows as an HTML table, with the short description of the result as its caption."""
    rows = iter(self.rows())
    first = list(islice(rows, SHOWN))
    more = sum(1 for _ in rows)
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in (first[0] if first else ()))
    cells = ("".join(f"<td>{html.escape(_shown(value))}</td>" for value in row.values()) for row in first)
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    caption = html.escape(f"{self!r}{f'; {more:,} rows more' if more else ''}")
    return f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
