"""What a report is made of, whatever it is written as: sections of words, tables, figures and lists.

`html`, `markdown`, `terminal` and `csv_text` render the same blocks, each as far as its medium goes. Text is plain and
escaped by whoever renders it; a figure is drawn when a renderer asks for it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from saap_jax.runs.records import RunRecord

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
    verdict: bool | None = None
    """Whether a limit holds, where the cell says so."""

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
    last: bool = False
    """True for the last line of a group."""


class Table(NamedTuple):
    """A table; its first column names the lines."""

    title: str
    header: Sequence[str]
    """Empty for a table without headings."""
    lines: Sequence[Line]
    words: int = 1
    """How many of the first columns hold words; the others hold numbers."""
    sortable: bool = False
    matrix: bool = False
    """True where the columns are as wide as each other."""
    notes: Sequence[str] = ()
    """What the marks and columns mean, below the table."""
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


class Plot(NamedTuple):
    """A figure that is not drawn yet, see `figures.draw`."""

    name: str
    """Stem of its files."""
    title: str
    description: str
    """The figure in words."""
    paint: Callable[[Any], None]
    """Draws on an empty matplotlib figure."""
    height: float
    """Inches on the screen."""
    width: float = 10.0
    paper: float = 0.0
    """Inches that it is high on paper; 0: in proportion."""


class Picture(NamedTuple):
    """A figure; nothing is shown without a plot."""

    title: str
    plot: Plot
    kind = "picture"


class Pictures(NamedTuple):
    """Figures of the same lines, side by side where there is room, with one legend."""

    each: Sequence[Picture]
    legend: Sequence[str]
    """Names of the lines, in the order of `figures.palette`."""
    paper: Sequence[Plot]
    """The same figures together, for papers."""
    kind = "pictures"


class Axis(NamedTuple):
    """Maps values to shares of a column, linear; values beyond an end are drawn on it."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]

    def share(self, value: Number) -> float:
        """Return where a value lies, 0 on the left and 1 on the right."""
        return (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)


class Column(NamedTuple):
    """A column of a chart: drawings on an axis, or without an axis, words."""

    title: str
    axis: Axis | None = None
    lines: bool = True
    """Whether the ticks are lines through all cells."""


class Interval(NamedTuple):
    """A value with its ends, NaN where there are none; hollow where it is not `sure`."""

    value: Number
    low: Number
    high: Number
    said: str
    """The drawing in words, as of `Heat` and `Band`."""
    sure: bool = True


class Heat(NamedTuple):
    """Shares in [0, 1], a cell each; NaN is left blank."""

    shares: Sequence[Number]
    said: str


class Band(NamedTuple):
    """Five quantiles: a thin line between the outer ones, a thick one between the inner ones, a mark in the middle."""

    quantiles: Sequence[Number]
    said: str


class Note(NamedTuple):
    """A cell of words, the second part smaller."""

    text: str
    small: str = ""


class Strip(NamedTuple):
    """A line of a chart."""

    name: str
    cells: Sequence[Interval | Heat | Band | Note]
    mark: str = ""
    """ "best", or nothing."""


class Chart(NamedTuple):
    """A figure of one line a name and a drawing a column."""

    name: str
    """Stem of its files."""
    title: str
    first: str
    """Heading of the names."""
    columns: Sequence[Column]
    strips: Sequence[Strip]
    scale: str = ""
    """What the shares of heat are of, in percent."""
    below: str = ""
    """What the drawings of intervals are of."""
    kind = "chart"


class Facts(NamedTuple):
    """Names and values."""

    facts: dict[str, str]
    kind = "facts"


class Scale(NamedTuple):
    """The colours of all cells of heat."""

    kind = "scale"


class Data(NamedTuple):
    """A table of all digits, as a file of its own or one that the page holds; None is an empty cell."""

    text: str
    filename: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    kind = "data"


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


Block = Table | Words | Bullets | Picture | Pictures | Chart | Scale | Facts | Data | Code | Folded | Part


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


def text_table(title: str, header: Sequence[str], lines: Iterable[Sequence[str]], words: int = 1, **more: Any) -> Table:
    """Return a table of texts; `more` are further fields."""
    return Table(title, header, [Line([Cell(text) for text in line]) for line in lines], words, **more)


def leaves(blocks: Iterable[Block]) -> Iterator[Block]:
    """Return all blocks in their order, those within parts and folds in place of these."""
    for block in blocks:
        if isinstance(block, Part | Folded):
            yield from leaves(block.blocks)
        else:
            yield block


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
    run: RunRecord
    compared: Any = None
    """A comparison's numbers, see `kinds.compare.Compared`; None of other kinds."""
    at: Callable[[Detail], Sequence[Section]] | None = None
    """Makes the sections anew in another detail."""

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
    def scripted(self) -> bool:
        """True where the page needs its script, for a table or for what can be copied."""
        sections = [*self.overview, *(one for view in self.views for one in view.sections)]
        return bool(self.overview) or any(
            isinstance(block, Code) or (isinstance(block, Table) and block.sortable)
            for section in sections
            for block in leaves(section.blocks)
        )
