"""Blocks for a terminal: words, and tables that `terminal.show` fits into its width."""

from collections.abc import Iterable, Iterator, Sequence

from rich import box
from rich.table import Table as Drawn
from rich.text import Text

from saap_jax.cli.console import show, show_lines
from saap_jax.report.page.blocks import Block, Bullets, Cell, Code, Folded, Part, Table, Words, text_table
from saap_jax.runtime.visible import visible

_STYLES = {"best": "bold"}
_VERDICTS = {True: "green", False: "bold red"}


def show_blocks(*blocks: Block) -> None:
    """Print blocks; figures and files have no place on a terminal."""
    for block in blocks:
        match block:
            case Table():
                show(drawn(block))
            case Words():
                show(block.text)
            case Bullets():
                show(*block.lines)
            case Code():
                show_lines(block.text)
            case Part() | Folded():
                show(block.title)
                show_blocks(*block.blocks)


def show_facts(title: str, rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> None:
    """Print a table of names and what is said of each."""
    lines = list(rows)
    show_blocks(text_table(title, header, lines, words=max(map(len, lines), default=1)))


def drawn(table: Table) -> Drawn:
    """Return a table for the terminal."""
    columns = max([len(table.header), *(len(line.cells) for line in table.lines)])
    found = Drawn(
        title=Text(visible(table.title), style="italic") if table.title else None,
        caption=Text(visible("\n".join(table.notes))) if table.notes else None,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_header=bool(table.header),
    )
    for place, name in enumerate(table.header or [""] * columns):
        found.add_column(Text(name), justify="left" if place < table.words else "right")
    for line in table.lines:
        found.add_row(*_cells(line.cells), style=_STYLES.get(line.mark), end_section=line.last)
    return found


def _cells(cells: Sequence[Cell]) -> Iterator[Text]:
    for cell in cells:
        yield Text(visible(cell.text), style="" if cell.verdict is None else _VERDICTS[cell.verdict])
