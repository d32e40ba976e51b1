"""Steps within a stage, such as tensors that are read or windows that are evaluated, told to whoever shows progress.

Code that is called from many places, and may take minutes, says so here; what shows it is set once, by `telling`.
"""

import contextlib
import contextvars
from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")
Show = Callable[[str, Collection[Any]], Iterator[Any]]
"""Yields the items, and shows how far it has come: (what they are, items)."""

_show: contextvars.ContextVar[Show] = contextvars.ContextVar("show", default=lambda what, items: iter(items))


def within(what: str, items: Collection[Item]) -> Iterator[Item]:
    """Yield the items of a loop within a stage, and tell how far it has come."""
    return _show.get()(what, items)


@contextlib.contextmanager
def telling(show: Show) -> Iterator[None]:
    """Tell `show` of steps while the body runs."""
    token = _show.set(show)
    try:
        yield
    finally:
        _show.reset(token)
