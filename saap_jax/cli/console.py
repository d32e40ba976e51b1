"""What is printed: text without hidden control characters; tables that a terminal's width folds, and nothing else."""

import os
import sys
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from saap_jax.runtime.words import visible

PIPED = 10_000
"""Columns of what is printed elsewhere than on a terminal, where COLUMNS does not say: nothing is folded."""


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


def show(*things: str | Table) -> None:
    """Print sentences, broken between words, and tables, in the console's width."""
    for thing in things:
        if isinstance(thing, Table):
            for column in thing.columns:
                column.overflow = "fold"
            title, caption, thing.title, thing.caption = thing.title, thing.caption, None, None  # as wide as they are
            console.print(*(part for part in (title, thing, caption) if part))
        else:
            console.print(visible(thing))


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
