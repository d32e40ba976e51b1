"""Progress of a command, on the error stream: bars on a terminal; elsewhere plain lines, at most one in half a minute.

A `Track` is told of every stage and of steps within it; `note` of how it goes.
"""

import contextlib
import time
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from saap_jax.cli.console import progress_console
from saap_jax.runtime.progress import telling
from saap_jax.runtime.words import visible

INTERVAL = 30.0
"""Seconds between two lines of a stage where no bars are shown."""


class Shown:
    """A `Track` that shows bars with the time left on a terminal, and lines elsewhere."""

    def __init__(self, bars: Progress) -> None:
        self._bars, self._plain, self._depth = bars, not bars.console.is_terminal, 0
        self._told = time.monotonic()

    def __call__(self, doing: str, items: Iterable[Any], total: int) -> Iterator[Any]:
        doing, start = visible(doing), time.monotonic()
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
                    left = duration(seconds / done * (total - done))
                    self._print(f"{doing}: {done} of {total} after {duration(seconds)}, about {left} left")
            if self._depth == 1:
                self._print(f"{doing}: done in {time.monotonic() - start:.1f} s")
        finally:
            self._depth -= 1
            if self._depth:
                self._bars.remove_task(task)

    def within(self, what: str, items: Collection[Any]) -> Iterator[Any]:
        """Show steps within a stage; a loop of one step or none tells nothing."""
        return self(what, items, len(items)) if len(items) > 1 else iter(items)

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


def duration(seconds: float) -> str:
    """Write a time as people say it.

    >>> duration(42.4), duration(61.0), duration(7322.0)
    ('42 s', '1 min 1 s', '2 h 2 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


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
