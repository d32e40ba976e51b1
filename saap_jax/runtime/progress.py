"""Progress as the library tells it: iterables of work, and loops within them, wrapped by whoever shows them."""

import contextlib
import contextvars
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    from saap_jax.types import Remat  # which imports numpy, and help needs none

Track = Callable[[str, Iterable[Any], int], Iterator[Any]]
"""Wraps an iterable, to show progress: (what is being done, items, how many)."""

Item = TypeVar("Item")
Show = Callable[[str, Collection[Any]], Iterator[Any]]
"""Yields the items of a loop, and shows how far it has come: (what they are, items)."""

_show: contextvars.ContextVar[Show] = contextvars.ContextVar("show", default=lambda what, items: iter(items))


def quiet(doing: str, items: Iterable[Any], total: int) -> Iterator[Any]:
    """Show no progress."""
    return iter(items)


def bars(doing: str, items: Iterable[Any], total: int) -> Iterator[Any]:
    """Show a bar: in a notebook one of its own, where ipywidgets is installed; else a line of text.

    It is for a session's calls, such as `compare(config, track=bars)`.

    >>> [window for window in bars("evaluate", ["first", "second"], total=2)]
    ['first', 'second']
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tqdm's, that ipywidgets is not there
        from tqdm.auto import tqdm

        return iter(tqdm(items, desc=doing, total=total))


OBSERVING = "observe the calibration examples"
"""What progress says of the one pass."""


class Passes(NamedTuple):
    """How examples are passed over."""

    batch_size: int = 8
    remat: "Remat" = "dots"
    """What the backward pass recomputes, see `saap_jax.llama.model.Remat`."""
    track: Track = quiet
    scenario: str = ""
    """What progress calls the examples, where there are several sets."""

    def progress(self, doing: str) -> Callable[[Collection[Any]], Iterator[Any]]:
        """Make what wraps the steps of a pass, to show them."""
        return lambda steps: self.track(f"{doing} {self.scenario}".rstrip(), steps, len(steps))


@contextlib.contextmanager
def step(track: Track, doing: str) -> Iterator[None]:
    """Show a step that cannot be counted as one item of work."""
    items = track(doing, [None], 1)
    next(items)
    yield
    next(items, None)


def within(what: str, items: Collection[Item]) -> Iterator[Item]:
    """Yield the items of a loop within a stage, such as tensors or windows, and tell `telling` how far it has come."""
    return _show.get()(what, items)


@contextlib.contextmanager
def telling(show: Show) -> Iterator[None]:
    """Tell `show` of loops within stages while the body runs."""
    token = _show.set(show)
    try:
        yield
    finally:
        _show.reset(token)
