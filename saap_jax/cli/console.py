"""What is printed: text without hidden control characters; blocks and tables that a terminal's width folds."""

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as Drawn
from rich.text import Text

from saap_jax.runtime.words import visible

if TYPE_CHECKING:
    from saap_jax.report.blocks import Block, Table

PIPED = 10_000
"""Columns of what is printed elsewhere than on a terminal, where COLUMNS does not say: nothing is folded."""

_STYLES = {"best": "bold", "good": "green", "bad": "bold red"}


class Terminal(Console):
    """A console that takes text as it is, never as markup, and says where its reader has gone."""

    def __init__(self, **options: Any):
        super().__init__(highlight=False, markup=False, emoji=False, **options)
        if not self.is_terminal and "COLUMNS" not in os.environ and "width" not in options:
            self.width = PIPED

    def on_broken_pipe(self) -> None:
        """Raise the BrokenPipeError that is being handled: what it means is for the command line to say."""
        raise


console = Terminal()
progress_console = Terminal(stderr=True)


def show_blocks(*things: "Block | Drawn | str | Mapping[str, object]") -> None:
    """Print what a command shows, in the console's width: blocks, tables that are drawn already, sentences, and where
    things are, by name. Figures have no place there, nor has what is folded."""
    from saap_jax.report.blocks import Code, Section, Table, Words  # which takes long: help comes without

    for thing in things:
        match thing:
            case Table():
                show_blocks(drawn(thing))
            case Drawn():
                for column in thing.columns:
                    column.overflow = "fold"
                title, caption, thing.title, thing.caption = thing.title, thing.caption, None, None  # as wide as they
                console.print(*(part for part in (title, thing, caption) if part))
            case str() | Words():
                console.print(visible(thing if isinstance(thing, str) else thing.text))
            case Code():
                show_lines(thing.text)
            case Section() if not thing.folded:
                show_blocks(thing.title, *thing.blocks)
            case Mapping():
                show_paths(**thing)


def drawn(table: "Table") -> Drawn:
    """Draw a table for the terminal, without its wide columns."""
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
