"""What is printed: text without hidden control characters; blocks and tables that a terminal's width folds; progress.

Progress of a command is told on the error stream: by bars on a terminal; elsewhere by plain lines, at most one in half
a minute. A `Track` is told of every stage and of steps within it; `note` of how it goes.
"""

import contextlib
import datetime
import os
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as Drawn
from rich.text import Text

from saap_jax.runtime.progress import telling
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
                # as wide as they
                title = thing.title
                caption = thing.caption
                thing.title = None
                thing.caption = None
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
    table = table._replace(columns=[column for column in table.columns if not column.wide])
    found = Drawn(
        title=Text(visible(table.title), style="italic") if table.title else None,
        caption=Text(visible("\n".join(table.legend))) if table.legend else None,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_header=any(table.header),
    )
    for column in table.columns:
        found.add_column(Text(column.head), justify="left" if column.words else "right")
    for row in table.rows:
        found.add_row(*(Text(visible(cell)) for cell in table.cells(row)), style=_STYLES.get(row.get("mark", ""), ""))
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


# --- progress ------------------------------------------------------------------------------------

INTERVAL = 30.0
"""Seconds between two lines of a stage where no bars are shown."""


class Shown:
    """A `Track` that shows bars with the time left on a terminal, and lines elsewhere."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._plain = not bars.console.is_terminal
        self._depth = 0
        self._told = time.monotonic()

    def __call__(self, doing: str, items: Iterable[Any], total: int) -> Iterator[Any]:
        doing = visible(doing)
        start = time.monotonic()
        task = self._bars.add_task("  " * self._depth + doing, total=total, note="")
        if self._depth == 0:
            self._print(f"{doing}: {total} steps" if total > 1 else f"{doing} ...")
        self._depth += 1
        try:
            for done, item in enumerate(items, start=1):
                yield item
                self._bars.update(task, completed=done)
                if time.monotonic() - self._told > INTERVAL and done < total:
                    seconds = time.monotonic() - start
                    taken, left = (datetime.timedelta(seconds=round(each))
                                   for each in (seconds, seconds / done * (total - done)))  # fmt: skip
                    self._print(f"{doing}: {done} of {total} after {taken}, about {left} left")
            if self._depth == 1:
                self._print(f"{doing}: done in {time.monotonic() - start:.1f} s")
        finally:
            self._depth -= 1
            if self._depth:
                self._bars.remove_task(task)

    def within(self, what: str, items: Collection[Any]) -> Iterator[Any]:
        """Show steps within a stage; a loop of one step or none tells nothing."""
        if len(items) > 1:
            return self(what, items, len(items))
        return iter(items)

    def note(self, text: str, milestone: bool = False) -> None:
        """Say how it goes: beside the newest bar on a terminal; elsewhere a line, of milestones only."""
        if self._bars.task_ids:
            self._bars.update(self._bars.task_ids[-1], note=visible(text))
        if milestone:
            self._print(text)

    def _print(self, text: str) -> None:
        if self._plain:
            self._told = time.monotonic()
            self._bars.console.print(visible(text), markup=False, soft_wrap=True)


@contextlib.contextmanager
def progress() -> Iterator[Shown]:
    """Show progress while the body runs, by the `Track` that is yielded, and of steps within its stages."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=progress_console, disable=not progress_console.is_terminal) as bars:
        shown = Shown(bars)
        with telling(shown.within):
            yield shown
