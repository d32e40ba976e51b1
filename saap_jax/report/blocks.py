"""What a page is made of: sentences, tables, figures and code, in sections.

Terminal, Markdown, CSV and HTML render the same blocks, each as far as its medium goes. A table keeps its rows as they
are: what people see is written from them by the columns, and CSV has all their digits.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from saap_jax.records import RunRecord

Row = Mapping[str, Any]


class Column(NamedTuple):
    """A column of a table."""

    head: str
    fields: tuple[str, ...]
    """What it shows of a row; CSV has a column for each."""
    form: Callable[..., str] = str
    """Writes the values of the fields, in their order."""
    words: bool = False
    """True for words, which begin at the left; numbers end at the right."""
    wide: bool = False
    """True for what a terminal leaves out."""
    note: str = ""
    """What it means, said below a table that shows it."""


class Table(NamedTuple):
    """Rows under columns; the first column names the rows. A row's `mark` is "best", "dense" or absent."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    notes: Sequence[str] = ()
    """What the marks mean, and what else is said below the table."""
    file: str = ""
    """Stem of the CSV file that a command writes; none by default."""
    matrix: bool = False
    """True for numbers in [-1, 1], which are tinted, in columns of one width."""

    @property
    def header(self) -> list[str]:
        """The headings, all empty for a table without."""
        return [column.head for column in self.columns]

    @property
    def legend(self) -> list[str]:
        """What stands below the table: the notes, and those of the columns."""
        return [*self.notes, *dict.fromkeys(column.note for column in self.columns if column.note)]

    def cells(self, row: Row) -> list[str]:
        """Write a row, a dash for a field that it does not have."""
        return [_cell(column, row) for column in self.columns]

    def tint(self, row: Row, place: int) -> float:
        """The number in [-1, 1] by which a cell is tinted, 0 for none."""
        value = row.get(self.columns[place].fields[0])
        if self.matrix and isinstance(value, float) and math.isfinite(value):
            return value
        return 0.0


def _cell(column: Column, row: Row) -> str:
    """Write what a column shows of a row, a dash where the row lacks its first field."""
    values = [row.get(field) for field in column.fields]
    if values[0] is None:
        return "-"
    return column.form(*values)


class Words(NamedTuple):
    """A paragraph; `soft` where it explains rather than finds."""

    text: str
    soft: bool = True


class Figure(NamedTuple):
    """A figure that is not drawn yet, see `figures.saved`."""

    name: str
    """Stem of its files."""
    title: str
    paint: Callable[[Any], None]
    """Draws on an empty matplotlib figure."""
    height: float = 3.0
    width: float = 4.6
    """Inches; wider than the usual, it is scrolled on a narrow page."""


class Code(NamedTuple):
    """Text for a machine, shown as it is."""

    title: str
    text: str


class Section(NamedTuple):
    """Blocks under a heading, shown when asked for where it is folded."""

    title: str
    blocks: Sequence[Any]
    folded: bool = False


Block = Words | Table | Figure | Code | Section


class Findings(NamedTuple):
    """What a run found: of its page the summary and the sections behind it; of its files, all of it."""

    summary: Sequence[str]
    title: str
    blocks: Sequence[Block | None]
    about: str = ""
    more: Sequence[Section] = ()
    """Sections that follow."""
    known: Mapping[str, str | None] = {}
    """Facts that repeating the run takes, beside those of any run."""


class View(NamedTuple):
    """What a page shows of a run."""

    name: str
    kind: str
    status: str
    model: str
    sections: Sequence[Section]
    run: RunRecord
    rows: Sequence[Row] = ()
    """A comparison's rows, the dense model first; none of other kinds."""
    id: str = ""
    """Prefix of its places on the page; empty where the page shows this run alone."""


class Page(NamedTuple):
    """A page of one run, or of several side by side."""

    title: str
    overview: Sequence[Section]
    views: Sequence[View]


def text_table(title: str, header: Sequence[str], lines: Iterable[Sequence[str]], words: int = 1, **more: Any) -> Table:
    """Make a table of texts; `more` are further fields."""
    rows = list(lines)
    heads = list(header) or [""] * max(map(len, rows), default=0)
    # a row is a mapping by field, so that what is under no heading, or under one of several, needs a name of its own
    names = []
    for number, head in enumerate(heads, start=1):
        if head and heads.count(head) == 1:
            names.append(head)
        else:
            names.append(f"{head or 'column'} {number}")
    columns = [Column(head, (name,), words=n < words) for n, (head, name) in enumerate(zip(heads, names, strict=True))]
    return Table(title, columns, [dict(zip(names, row, strict=False)) for row in rows], **more)


def facts(values: Mapping[str, Any]) -> Table:
    """Make a table without headings of names and values, those that are there."""
    return text_table("", (), [(name, str(value)) for name, value in values.items() if value not in (None, "")], 2)


def said(*sentences: str) -> list[Words]:
    """Make paragraphs of what was found."""
    return [Words(each, soft=False) for each in sentences]


def section(title: str, *blocks: Block | None, about: str = "") -> list[Section]:
    """Make a section of the blocks that there are, what it is about first; nothing without any."""
    found = [block for block in blocks if block is not None]
    if not found:
        return []
    if about:
        found.insert(0, Words(about))
    return [Section(title, found)]


def folded(table: Table) -> Section:
    """Fold a table under its title."""
    return Section(table.title, [table], folded=True)


def leaves(blocks: Iterable[Block]) -> Iterator[Words | Table | Figure | Code]:
    """Yield all blocks in their order, those of a section in place of it."""
    for block in blocks:
        if isinstance(block, Section):
            yield from leaves(block.blocks)
        else:
            yield block
