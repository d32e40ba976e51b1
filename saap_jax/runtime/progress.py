"""Progress as the library tells it: iterables of work, wrapped by whoever shows them."""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Track = Callable[[str, Iterable[Any], int], Iterator[Any]]
"""Wraps an iterable, to show progress: (what is being done, items, how many)."""


def quiet(doing: str, items: Iterable[Any], total: int) -> Iterator[Any]:
    """Show no progress."""
    return iter(items)


def bars(doing: str, items: Iterable[Any], total: int) -> Iterator[Any]:
    """Show a bar: in a notebook one of its own, where ipywidgets is installed; else a line of text.

    It is for a session's calls, such as `compare(config, track=bars)`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tqdm's, that ipywidgets is not there
        from tqdm.auto import tqdm

        shown = tqdm(items, desc=doing, total=total)
    return iter(shown)


@contextlib.contextmanager
def step(track: Track, doing: str) -> Iterator[None]:
    """Show a step that cannot be counted as one item of work."""
    items = track(doing, [None], 1)
    next(items)
    yield
    next(items, None)
