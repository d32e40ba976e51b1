"""What is printed: text without hidden control characters, and tables that fit the width, no word of which is cut."""

import os
import re
import sys
from collections.abc import Iterable, Sequence

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from saap_jax.runtime.visible import visible

PIPED = 100
"""Columns of what is printed elsewhere than on a terminal, where COLUMNS does not say."""

_TALL = 3
"""Lines of a cell that a table may have at most; where more were needed, its rows are printed one below the other."""


class Terminal(Console):
    """A console that takes text as it is, never as markup, and says where its reader has gone."""

    def on_broken_pipe(self) -> None:
        """Raise the BrokenPipeError that is being handled: what it means is for the command line to say."""
        raise


def columns() -> int | None:
    """Return how wide printed text may be: COLUMNS, else `PIPED`; None where the terminal says."""
    if re.fullmatch(r"[1-9]\d{0,4}", os.environ.get("COLUMNS", "")):
        return int(os.environ["COLUMNS"])
    return None if sys.stdout is not None and sys.stdout.isatty() else PIPED


console = Terminal(highlight=False, markup=False, emoji=False, width=columns())


def show(*things: str | Table | Group) -> None:
    """Print sentences, broken between words, and tables, in the console's width."""
    for thing in things:
        if isinstance(thing, Group):
            show(*thing.renderables)  # type: ignore[arg-type]  # our groups are made of tables
        elif isinstance(thing, Table):
            console.print(fitted(thing, console.width), crop=False)
        else:
            show_lines(_sentence(thing, console.width).plain)


def show_lines(*lines: str) -> None:
    """Print lines as long as they are, such as commands to copy and text that is laid out already."""
    for line in lines:
        console.print(visible(line), crop=False, soft_wrap=True)


def show_paths(**named: object) -> None:
    """Print where things are: `name: path` side by side, or a line each where that is too wide; no line is broken."""
    entries = [visible(f"{name.replace('_', ' ')}: {path}") for name, path in named.items()]
    line = "   ".join(entries)
    show_lines(*([line] if cell_len(line) <= console.width else entries))


def write(text: str) -> None:
    """Write text that a model made: as it is to a pipe or a file, with `visible` on a terminal."""
    print(visible(text) if sys.stdout.isatty() else text, end="", flush=True)


# --- tables ------------------------------------------------------------------------------------------


def fitted(table: Table, width: int) -> Group:
    """Return a table of text, with its title and caption, as it is to be printed in a width.

    Columns keep their width where all fit, else they are broken between words; where that takes more than a few lines
    a cell, the rows are printed as records one below the other. A word that is wider than `width` stays whole.
    """
    heads = [_cell(column.header) for column in table.columns]
    rows = list(zip(*([_cell(cell) for cell in column.cells] for column in table.columns), strict=True))
    widths = _widths(table, heads if table.show_header else [], rows, width)
    parts: list[RenderableType] = [_sentence(table.title, width, "table.title")] if table.title else []
    if widths:
        drawn = _drawn(table, heads, rows, widths)
        parts.append(drawn)
        longest = max(map(cell_len, str(table.caption or "").split()), default=0)
        width = min(width, max(72, longest, console.measure(drawn).maximum))
    else:
        parts += _records(table, heads, rows, width)
    if table.caption:
        parts.append(_sentence(table.caption, width, "table.caption"))
    return Group(*parts)


def _widths(table: Table, heads: Sequence[Text], rows: Sequence[Sequence[Text]], width: int) -> list[int]:
    """Return the width of each column; none where the table cannot be drawn."""
    many = len(table.columns)
    each = [[line[place] for line in ([heads] if heads else []) + list(rows)] for place in range(many)]
    widest = [max([1, *(cell_len(line) for cell in cells for line in cell.plain.split("\n"))]) for cells in each]
    least = [max([1, *(cell_len(word) for cell in cells for word in cell.plain.split())]) for cells in each]
    frame = console.measure(_drawn(table, [Text()] * many, [], [1] * many)).maximum - many
    room = width - frame - sum(least)
    if not many or room < 0:
        return []
    widths = list(least)
    wanting = sorted(range(many), key=lambda place: widest[place] - least[place])
    for index, place in enumerate(wanting):
        more = min(widest[place] - least[place], room // (many - index))
        widths[place], room = widths[place] + more, room - more
    broken = (
        len(cell.wrap(console, widths[place])) > max(_TALL, cell.plain.count("\n") + 1)
        for place, cells in enumerate(each)
        for cell in cells
    )
    return [] if widths != widest and any(broken) else widths


def _drawn(table: Table, heads: Sequence[Text], rows: Iterable[Sequence[Text]], widths: Sequence[int]) -> Table:
    """Return a table of columns of these widths, in the style of another one."""
    drawn = Table(
        box=table.box,
        padding=table.padding,
        show_header=table.show_header,
        show_edge=table.show_edge,
        pad_edge=table.pad_edge,
    )
    for column, head, wide in zip(table.columns, heads, widths, strict=True):
        drawn.add_column(head, justify=column.justify, style=column.style, width=wide)
    for row, about in zip(rows, table.rows, strict=False):
        drawn.add_row(*row, style=about.style, end_section=about.end_section)
    return drawn


def _records(table: Table, heads: Sequence[Text], rows: Iterable[Sequence[Text]], width: int) -> list[Text]:
    """Return the rows as records: the first cell, and below it a line for each of the others."""
    lines: list[Text] = []
    for row, about in zip(rows, table.rows, strict=True):
        names = [head.plain if table.show_header else "" for head in heads]
        if not table.show_header and len(row) == 2:
            names, row = [row[0].plain], row[1:]
        style = about.style or ""
        if table.show_header or lines == []:
            lines.append(Text())
        for place, (name, cell) in enumerate(zip(names, row, strict=True)):
            indent = "  " if place else ""
            said = Text(f"{name}: " if name else "", style=style) + cell
            for number, line in enumerate(_lines(said, width, len(indent) + 2)):
                before = indent if number == 0 else f"{indent}  "
                before = before if len(before) + line.cell_len <= width else ""
                lines.append(Text(before, no_wrap=True, overflow="ignore").append_text(line))
    return [*lines, Text()]


def _cell(cell: object) -> Text:
    """Return a cell as text, control characters written out."""
    text = cell if isinstance(cell, Text) else Text(str(cell))
    plain = visible(text.plain).replace("\t", " ")
    return text if plain == text.plain else Text(plain, style=text.style)


def _sentence(said: RenderableType, width: int, style: str = "") -> Text:
    """Return a text as lines of a width, broken between words only."""
    text = Text(visible(said.plain), style=said.style) if isinstance(said, Text) else Text(visible(str(said)), style)
    lines = Text("\n").join(_lines(text, width))
    lines.no_wrap, lines.overflow = True, "ignore"
    return lines


def _lines(text: Text, width: int, indent: int = 0) -> Iterable[Text]:
    """Break text between words, to be indented; a word that is wider than `width` stays behind what leads to it."""
    for line in text.split("\n", allow_blank=True):
        breaks, start = [], 0
        for word in re.finditer(r"\S+", line.plain):
            full = indent + cell_len(line.plain[start : word.end()]) > width
            if start < word.start() and full and cell_len(word[0]) <= width:
                breaks.append(start := word.start())
        for part in line.divide(breaks):
            part.rstrip()
            yield part
