"""Progress as the library tells it: iterables of work, wrapped by whoever shows them."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Track = Callable[[str, Iterable[Any], int], Iterator[Any]]
"""Wraps an iterable, to show progress: (what is being done, items, how many)."""


def quiet(doing: str, items: Iterable[Any], total: int) -> Iterator[Any]:
    """Show no progress."""
    return iter(items)


@contextlib.contextmanager
def step(track: Track, doing: str) -> Iterator[None]:
    """Show a step that cannot be counted as one item of work."""
    items = track(doing, [None], 1)
    next(items)
    yield
    next(items, None)
