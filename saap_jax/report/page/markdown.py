"""Blocks as Markdown: the words and tables of the page, for places that show no HTML. Figures are on the page."""

import re
from collections.abc import Iterable, Iterator, Sequence

from saap_jax.report.page.blocks import Block, Bullets, Code, Facts, Folded, Page, Part, Section, Table, Words

MARK = "<!-- made by saap_jax -->"
"""First line of a report, by which a later one knows that it may replace the file."""


def markdown_report(page: Page) -> str:
    """Return a page as Markdown."""
    lines = [MARK, "", f"# {escaped(page.title)}", ""]
    for one in page.overview:
        lines += section_lines(one, 2)
    for view in page.views:
        level = 2 if page.single else 3
        about = f"{view.kind}{f' of {view.model}' if view.model else ''}, {view.status}"
        lines += [] if page.single else [f"## {escaped(view.name)}", ""]
        lines += [escaped(about), "", *(line for note in view.notes for line in (escaped(note), ""))]
        for one in view.sections:
            lines += section_lines(one, level)
    return "\n".join(lines).rstrip() + "\n"


def markdown_text(blocks: Iterable[Block]) -> str:
    """Return blocks as a Markdown file of their own."""
    return "\n".join(line for block in blocks for line in block_lines(block, 2)).rstrip() + "\n"


def section_lines(one: Section, level: int) -> list[str]:
    """Return the lines of a section, none if it holds nothing but figures."""
    lines = [line for block in one.blocks for line in block_lines(block, level + 1)]
    return [f"{'#' * level} {escaped(one.title)}", "", *lines] if lines else []


def block_lines(block: Block, level: int) -> Iterator[str]:
    """Return the lines of a block, an empty one at its end; nothing for a figure or a file."""
    match block:
        case Words():
            yield from (escaped(block.text), "")
        case Bullets():
            yield from (*(f"- {escaped(line)}" for line in block.lines), "")
        case Facts():
            yield from (*(f"- {escaped(name)}: {escaped(value)}" for name, value in block.facts.items()), "")
        case Code():
            fence = "`" * (2 + max([1, *(len(run) for run in re.findall("`+", block.text))]))
            yield from (fence, block.text, fence, "")
        case Table():
            yield from (*table_lines(block), "")
            yield from (*(f"- {escaped(note)}" for note in block.notes), "") if block.notes else ()
        case Part() | Folded():
            inner = [line for each in block.blocks for line in block_lines(each, level + 1)]
            if inner:
                yield from (f"{'#' * level} {escaped(block.title)}", "", *inner)


def table_lines(table: Table) -> list[str]:
    """Return a table with its columns aligned as on the page; a line without a heading becomes one."""
    lines = [[escaped(cell.text) for cell in line.cells] for line in table.lines]
    header = list(map(escaped, table.header)) or lines.pop(0)
    rule = [":--" if index < table.words else "--:" for index in range(len(header))]
    return [f"| {' | '.join(line)} |" for line in (header, rule, *lines)]


def escaped(text: str | Sequence[str]) -> str:
    """Return text that Markdown shows as it is, on one line.

    >>> escaped("a*b | <c>")
    'a\\\\*b \\\\| &lt;c>'
    """
    line = " ".join(str(text).split())
    return re.sub(r"([\\`*_|\[\]])", r"\\\1", line).replace("&", "&amp;").replace("<", "&lt;")
