"""Blocks as Markdown: the words and tables of a page, for places that show no HTML. Figures are on the page."""

import re
from collections.abc import Iterable, Iterator

from saap_jax.report.blocks import Block, Code, Page, Section, Table, Words

MARK = "<!-- made by saap_jax -->"
"""First line of a report, by which a later one knows that it may replace the file."""


def markdown_report(page: Page) -> str:
    """Return a page as Markdown."""
    lines = [MARK, "", f"# {escaped(page.title)}", "", *_lines(page.overview, 2)]
    for view in page.views:
        alone = len(page.views) == 1
        about = f"{view.kind}{f' of {view.model}' if view.model else ''}, {view.status}"
        lines += [*([] if alone else [f"## {escaped(view.name)}", ""]), escaped(about), ""]
        lines += _lines(view.sections, 2 if alone else 3)
    return "\n".join(lines).rstrip() + "\n"


def markdown_text(blocks: Iterable[Block], level: int = 2) -> str:
    """Return blocks as Markdown, headings from a level on."""
    return "\n".join(_lines(blocks, level)).rstrip() + "\n"


def _lines(blocks: Iterable[Block], level: int) -> Iterator[str]:
    """Yield the lines of blocks, an empty one behind each; nothing of a figure, nor of a section of figures alone."""
    for block in blocks:
        match block:
            case Words():
                yield from (escaped(block.text), "")
            case Code():
                fence = "`" * (2 + max([1, *(len(run) for run in re.findall("`+", block.text))]))
                yield from (fence, block.text, fence, "")
            case Table():
                notes = [*(f"- {escaped(note)}" for note in block.notes), ""] if block.notes else []
                yield from (*_table(block), "", *notes)
            case Section():
                if inner := [*_lines(block.blocks, level + 1)]:
                    yield from (f"{'#' * level} {escaped(block.title)}", "", *inner)


def _table(table: Table) -> Iterator[str]:
    """Yield the lines of a table, its title first; one without headings is a list, a row a line."""
    yield from ([f"**{escaped(table.title)}**", ""] if table.title else [])
    rows = [[escaped(cell) for cell in table.cells(row)] for row in table.rows]
    if not any(table.header):
        yield from (f"- {first}: {' '.join(rest)}" for first, *rest in rows)
        return
    rule = [":--" if column.words else "--:" for column in table.columns]
    yield from (f"| {' | '.join(line)} |" for line in (map(escaped, table.header), rule, *rows))


def escaped(text: str) -> str:
    """Return text that Markdown shows as it is, on one line.

    >>> escaped("a*b | <c>")
    'a\\\\*b \\\\| &lt;c>'
    """
    line = " ".join(str(text).split())
    return re.sub(r"([\\`*_|\[\]])", r"\\\1", line).replace("&", "&amp;").replace("<", "&lt;")
