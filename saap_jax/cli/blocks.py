"""Blocks for a terminal: words, and tables that `console.show` fits into its width."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table as Drawn
from rich.text import Text

from saap_jax.cli.console import show, show_lines
from saap_jax.report.blocks import Block, Code, Section, Table, Words, text_table
from saap_jax.runtime.words import visible

_STYLES = {"best": "bold", "good": "green", "bad": "bold red"}


def show_blocks(*blocks: Block) -> None:
    """Print blocks; figures have no place on a terminal, nor has what is folded."""
    for block in blocks:
        match block:
            case Table():
                show(drawn(block))
            case Words():
                show(block.text)
            case Code():
                show_lines(block.text)
            case Section() if not block.folded:
                show(block.title)
                show_blocks(*block.blocks)


def show_facts(title: str, rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> None:
    """Print a table of names and what is said of each."""
    lines = list(rows)
    show_blocks(text_table(title, header, lines, words=max(map(len, lines), default=1)))


def drawn(table: Table) -> Drawn:
    """Return a table for the terminal, without its wide columns."""
    narrow = [place for place, column in enumerate(table.columns) if not column.wide]
    found = Drawn(
        title=Text(visible(table.title), style="italic") if table.title else None,
        caption=Text(visible("\n".join(table.notes))) if table.notes else None,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_header=any(table.header),
    )
    for column in (table.columns[place] for place in narrow):
        found.add_column(Text(column.head), justify="left" if column.words else "right")
    for row in table.rows:
        cells = table.cells(row)
        found.add_row(*(Text(visible(cells[place])) for place in narrow), style=_STYLES.get(row.get("mark", ""), ""))
    return found
