"""Progress of a command: bars on a terminal; elsewhere a line a stage, and one every half minute with the time left."""

import contextlib
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from saap_jax.runtime.steps import telling
from saap_jax.runtime.visible import visible

INTERVAL = 30.0
"""Seconds between two lines where no bars are shown."""


class Shown:
    """A `Track` that shows bars with the time left on a terminal, and lines elsewhere.

    What is tracked within another stage is shown below it, while it lasts.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress, self._console = progress, progress.console
        self._open: list[_Stage] = []
        self._idle = "start", time.monotonic()

    def __call__(self, doing: str, items: Iterable[Any], total: int) -> Iterator[Any]:
        lines = not self._console.is_terminal and not self._open
        doing = visible(doing)
        stage = _Stage(doing, total)
        if lines:
            self._print(f"{doing}: {total} steps" if total > 1 else f"{doing} ...")
        task = self._progress.add_task("  " * len(self._open) + visible(doing), total=total, note="")
        self._open.append(stage)
        try:
            for item in items:
                yield item
                stage.done += 1
                self._progress.update(task, completed=stage.done)
            if lines:
                self._print(f"{doing}: done in {stage.seconds:.1f} s")
        finally:
            self._open.remove(stage)
            self._idle = doing, time.monotonic()
            if self._open:
                self._progress.remove_task(task)

    def within(self, what: str, items: Collection[Any]) -> Iterator[Any]:
        """Show steps within a stage, see `steps`; a loop of one step or none tells nothing."""
        return self(what, items, len(items)) if len(items) > 1 else iter(items)

    def note(self, text: str, milestone: bool = False) -> None:
        """Say how it goes: beside the newest bar on a terminal; elsewhere a line, of milestones only."""
        if self._console.is_terminal and self._progress.task_ids:
            self._progress.update(self._progress.task_ids[-1], note=visible(text))
        elif milestone:
            self._print(text)

    def tell(self) -> None:
        """Print how far the work is, in one line."""
        if stages := list(self._open):
            self._print("; ".join(stage.line for stage in stages))
        else:
            after, since = self._idle
            self._print(f"at work {time.monotonic() - since:.0f} s after: {after}")

    def _print(self, text: str) -> None:
        self._console.print(visible(text), markup=False, soft_wrap=True)


class _Stage:
    """A loop that has begun."""

    def __init__(self, doing: str, total: int) -> None:
        self.doing, self.total, self.done, self._start = doing, total, 0, time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    @property
    def line(self) -> str:
        """How far it is; the time left, once a step has shown how long one takes."""
        seconds, done = self.seconds, self.done
        left = f", about {duration(seconds / done * (self.total - done))} left" if done else ""
        return f"{self.doing}: {done} of {self.total} after {duration(seconds)}{left}"


def duration(seconds: float) -> str:
    """Return a time as people say it.

    >>> duration(42.4), duration(61.0), duration(7322.0)
    ('42 s', '1 min 1 s', '2 h 2 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


@contextlib.contextmanager
def showing(console: Console) -> Iterator[Shown]:
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
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        shown = Shown(progress)
        with telling(shown.within), contextlib.nullcontext() if console.is_terminal else _lines(shown):
            yield shown


@contextlib.contextmanager
def _lines(shown: Shown) -> Iterator[None]:
    """Have a thread print a line every `INTERVAL` seconds while the body runs."""
    end = threading.Event()

    def tell() -> None:
        while not end.wait(INTERVAL):
            shown.tell()

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
