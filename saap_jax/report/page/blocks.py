"""What a report is made of, whatever it is written as: sections of words, tables, figures and lists.

`html` writes them as a page, `markdown` as Markdown. Text is plain and escaped by whoever writes it; only the drawing
of a `Picture` is HTML already.
"""

import base64
from collections.abc import Sequence
from typing import Any, NamedTuple

Number = float | int
"""A number; checked at run time, `float` alone refuses whole ones."""


class Cell(NamedTuple):
    """A cell of a table."""

    text: str
    value: Number | str | None = None
    """What the column is sorted by; None: the text."""
    tint: str = ""
    """Background, as CSS writes a colour."""
    link: str = ""
    """Identifier of a place on the page that the cell leads to."""

    @property
    def key(self) -> str:
        """What the page sorts by, to seven digits (a file has all); empty where that is the text.

        >>> Cell("20.0", 0.2003).key, Cell("1.2e5", 123_456.0).key, Cell("3", 3.0).key, Cell("-", float("nan")).key
        ('0.2003', '123456', '', '')
        """
        if self.value is None:
            return ""
        if isinstance(self.value, str):
            return "" if self.value == self.text else self.value
        key = f"{self.value:.7g}"
        number = self.text.replace(".", "", 1).isdigit()
        return "" if (number and float(self.text) == self.value) or (key == "nan" and not number) else key


class Line(NamedTuple):
    """A line of a table."""

    cells: Sequence[Cell]
    mark: str = ""
    """ "best", "dense", or nothing."""


class Table(NamedTuple):
    """A table; its first column names the lines."""

    title: str
    header: Sequence[str]
    lines: Sequence[Line]
    words: int = 1
    """How many of the first columns hold words; the others hold numbers."""
    sortable: bool = False
    matrix: bool = False
    """True where the columns are as wide as each other."""
    kind = "table"


class Words(NamedTuple):
    """A paragraph; `soft` where it explains rather than finds."""

    text: str
    soft: bool = True
    kind = "words"


class Bullets(NamedTuple):
    """A list of sentences."""

    lines: Sequence[str]
    kind = "bullets"


class Picture(NamedTuple):
    """A figure as HTML that is safe to show, and what it says in a line or two."""

    title: str
    html: str
    wide: bool = False
    """True for a drawing of fixed width, which is scrolled where the page is narrower."""
    kind = "picture"


class Pictures(NamedTuple):
    """Figures that belong together, side by side where there is room, and what stands below all of them."""

    each: Sequence[Picture]
    below: str = ""
    kind = "pictures"


class Facts(NamedTuple):
    """Names and values."""

    facts: dict[str, str]
    kind = "facts"


class Download(NamedTuple):
    """A file that the page itself holds."""

    text: str
    filename: str
    content: str
    kind = "download"

    @property
    def address(self) -> str:
        """The content as an address, so that a page needs no second file."""
        return csv_link(self.content)


class Code(NamedTuple):
    """Text for a machine, shown as it is."""

    title: str
    text: str
    kind = "code"


class Folded(NamedTuple):
    """Blocks that are shown when asked for."""

    title: str
    blocks: Sequence[Any]
    kind = "folded"


class Part(NamedTuple):
    """Blocks under a heading of their own, within a section."""

    title: str
    blocks: Sequence[Any]
    kind = "part"


Block = Table | Words | Bullets | Picture | Pictures | Facts | Download | Code | Folded | Part


class Section(NamedTuple):
    """Blocks under a heading; `id` is unique within a run."""

    id: str
    title: str
    blocks: Sequence[Block]


class Detail(NamedTuple):
    """How much a page shows of a run; a page of many runs shows less of each, so that it stays small."""

    limit: int = 20
    """Variants a figure shows; the tables have all."""
    drawn: bool = True
    """Whether large drawings are shown: fusions, patterns, scatter plots."""
    downloads: bool = True
    """Whether the page holds its tables as CSV too."""


def plural(number: int, noun: str) -> str:
    """Return a count with its noun.

    >>> plural(1, "variant"), plural(1200, "variant")
    ('1 variant', '1,200 variants')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def csv_link(text: str) -> str:
    """Return CSV as an address that holds it, so that a page needs no second file."""
    return f"data:text/csv;base64,{base64.b64encode(text.encode()).decode()}"


def plain_table(title: str, header: Sequence[str], lines: Sequence[Sequence[str]], words: int = 1) -> Table:
    """Return a table of texts."""
    return Table(title, header, [Line([Cell(text) for text in line]) for line in lines], words)


class RunView(NamedTuple):
    """What a page shows of a run."""

    id: str
    """Prefix of identifiers; empty where the page shows this run alone."""
    name: str
    kind: str
    status: str
    model: str
    notes: Sequence[str]
    sections: Sequence[Section]
    run: dict[str, Any]
    compared: Any = None
    """A comparison's numbers, see `kinds.compare.Compared`; None of other kinds."""

    def anchor(self, section: str) -> str:
        """Return the identifier of a section on the page."""
        return f"{self.id}-{section}" if self.id else section


class Page(NamedTuple):
    """What a page holds."""

    title: str
    overview: Sequence[Section]
    views: Sequence[RunView]
    folded: bool
    """Whether the runs are closed until somebody opens them."""

    @property
    def single(self) -> RunView | None:
        """The run, where the page is of one."""
        return self.views[0] if len(self.views) == 1 else None

    @property
    def contents(self) -> list[tuple[str, str]]:
        """Identifier and title of what the page leads to from its top."""
        found = [(one.id, one.title) for one in self.overview]
        for view in self.views:
            if self.single:
                found += [(view.anchor(one.id), one.title) for one in view.sections]
            else:
                found.append((view.id, view.name))
        return found

    @property
    def sortable(self) -> bool:
        """True where the page needs its script."""
        sections = [*self.overview, *(one for view in self.views for one in view.sections)]
        return bool(self.overview) or any(isinstance(b, Table) and b.sortable for s in sections for b in s.blocks)
