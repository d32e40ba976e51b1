"""Blocks as HTML, Markdown and CSV.

A page is one HTML file: no network, no script, colours and widths by style sheet; all text that it holds is escaped.
Markdown has its words and tables, for places that show no HTML; CSV has all digits of a table.
"""

import csv
import io
import itertools
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from saap_jax.errors import Doubt
from saap_jax.report.blocks import Block, Code, Page, Section, Table, Words
from saap_jax.report.figures import inline, undrawn
from saap_jax.report.formats import slug
from saap_jax.runtime.words import visible

HERE = Path(__file__).parent

OPEN = 3
"""Runs up to this number are shown open and with their figures; of more of them the figures are of all together."""

MARK = "<!-- made by saap_jax -->"
"""First line of a report in Markdown, by which a later one knows that it may replace the file."""

_FORMULA = ("=", "+", "-", "@", "\t")
"""What a cell begins with that a spreadsheet takes for a formula."""


def render_page(page: Page) -> str:
    """Write a page as HTML; without matplotlib, without its figures, of which a line of the page and a warning tell."""
    import jinja2
    import markupsafe

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # what the template calls; an SVG is marked as safe, since its text is escaped by matplotlib
    environment.globals["slug"] = slug
    environment.globals["svg"] = lambda figure: markupsafe.Markup(inline(figure))
    environment.globals["kind"] = lambda block: type(block).__name__
    view = {
        "page": page,
        "style": (HERE / "style.css").read_text("utf-8"),
        "opened": len(page.views) <= OPEN,
        "undrawn": undrawn(),
    }
    if view["undrawn"]:
        warnings.warn(undrawn(), Doubt, stacklevel=2)
    return environment.get_template("page.html").render(view).lstrip() + "\n"


# --- Markdown ----------------------------------------------------------------------------------------


def markdown_report(page: Page) -> str:
    """Write a page as Markdown."""
    lines = [MARK, "", f"# {escaped(page.title)}", "", *_lines(page.overview, 2)]
    # the title of a page of one run names that run; of several, each has a heading, and its sections stand below it
    level = 2
    if len(page.views) != 1:
        level = 3
    for view in page.views:
        if level == 3:
            lines += [f"## {escaped(view.name)}", ""]
        what = view.kind
        if view.model:
            what += f" of {view.model}"
        lines += [escaped(f"{what}, {view.status}"), ""]
        lines += _lines(view.sections, level)
    return "\n".join(lines).rstrip() + "\n"


def markdown_text(blocks: Iterable[Block]) -> str:
    """Write blocks as Markdown."""
    return "\n".join(_lines(blocks, 2)).rstrip() + "\n"


def _lines(blocks: Iterable[Block], level: int) -> Iterator[str]:
    """Yield the lines of blocks, an empty one behind each; nothing of a figure, nor of a section of figures alone."""
    for block in blocks:
        match block:
            case Words():
                yield from (escaped(block.text), "")
            case Code():
                # longer than any run of backquotes within, and three at least
                fence = "`" * (2 + max([1, *map(len, re.findall("`+", block.text))]))
                yield from (fence, block.text, fence, "")
            case Table():
                yield from (*_table(block), "")
                if block.legend:
                    yield from (*(f"- {escaped(note)}" for note in block.legend), "")
            case Section():
                inner = [*_lines(block.blocks, level + 1)]
                if inner:
                    yield from (f"{'#' * level} {escaped(block.title)}", "", *inner)


def _table(table: Table) -> Iterator[str]:
    """Yield the lines of a table, its title first; one without headings is a list, a row a line."""
    if table.title:
        yield from (f"**{escaped(table.title)}**", "")
    rows = [[*map(escaped, table.cells(row))] for row in table.rows]
    if not any(table.header):
        yield from (f"- {first}: {' '.join(rest)}" for first, *rest in rows)
        return
    # the colon of a column is on the side to which its cells are set
    rule = [":--" if column.words else "--:" for column in table.columns]
    yield from (f"| {' | '.join(line)} |" for line in (map(escaped, table.header), rule, *rows))


def escaped(text: str) -> str:
    """Write text so that Markdown shows it as it is, on one line.

    >>> escaped("a*b | <c>")
    'a\\\\*b \\\\| &lt;c>'
    """
    line = " ".join(str(text).split())
    return re.sub(r"([\\`*_|\[\]])", r"\\\1", line).replace("&", "&amp;").replace("<", "&lt;")


# --- CSV ---------------------------------------------------------------------------------------------


def table_csv(table: Table) -> str:
    """Write the rows of a table as CSV, a column a field, numbers in full precision.

    NaN and what a row lacks are empty cells, true is 1. Text that a spreadsheet would take for a formula begins with an
    apostrophe, as the spreadsheet itself writes it; control characters are written out.
    """
    fields = [*dict.fromkeys(itertools.chain.from_iterable(column.fields for column in table.columns))]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(_cell, fields))
    for row in table.rows:
        writer.writerow(_cell(row.get(field)) for field in fields)
    return text.getvalue()


def _cell(value: Any) -> Any:
    """Make what the CSV file has of a value, see `table_csv`."""
    if isinstance(value, bool):
        return int(value)
    if not isinstance(value, str):
        is_nan = value != value
        return None if is_nan else value
    text = visible(value)
    # a number begins with a sign too, and so does the dash of an absent value: no spreadsheet runs either
    number = re.fullmatch(r"[+-]?([\d.]+(e[+-]?\d+)?|inf|nan)", text, re.IGNORECASE)
    if text.startswith(_FORMULA) and text != "-" and not number:
        return f"'{text}"
    return text
