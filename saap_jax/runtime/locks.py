"""One process at a time: who writes a run directory or an output holds a lock, which a kill releases.

The lock of `runs/a` is the file `runs/.a.lock`, beside what it guards, which need not exist yet. It says who holds it,
is locked by the operating system, and is removed with the lock; one that a killed process left is held by nobody.
"""

import contextlib
import os
import platform
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import filelock

from saap_jax.runtime.processes import broadcast

SUFFIX = ".lock"

_mine: set[tuple[Path, int]] = set()
"""Locks that are held, with the thread."""

_MOMENT = 0.2
"""Seconds in which a lock file may be removed by who releases it, and be made anew."""


@contextlib.contextmanager
def held(path: Path, what: str) -> Iterator[None]:
    """Hold the lock of a file or directory while the block runs; of several processes of a job, the first holds it.

    Directories on the way are made, and removed again if nothing is in them at the end. Within the block the same
    thread may hold the same lock again.

    Args:
        what: names, in the error, what may be written by one process at a time.

    Raises:
        ValueError: another process, or another thread of this one, holds it, with which and since when.
    """
    lock = lock_of(path)
    with contextlib.ExitStack() as stack:
        mine = (lock, threading.get_ident())
        if mine not in _mine:
            broadcast(lambda: _take(lock, what, stack))
            _mine.add(mine)
            stack.callback(_mine.discard, mine)
        yield


def lock_of(path: Path) -> Path:
    """Return the lock file of a path.

    >>> lock_of(Path("/runs/a/../b"))
    PosixPath('/runs/.b.lock')
    """
    path = Path(os.path.realpath(path))
    return path.with_name(f".{path.name}{SUFFIX}")


def holder(lock: Path) -> str:
    """Name who holds a lock, by its file, as one line of printable text."""
    try:
        with open(lock, encoding="utf-8", errors="replace") as file:
            said = file.read(300)
    except OSError:
        said = ""
    return "".join(letter for letter in said if letter.isprintable()) or "another process"


def _take(lock: Path, what: str, stack: contextlib.ExitStack) -> None:
    for parent in (*reversed(lock.parent.parents), lock.parent):
        if not parent.exists():
            parent.mkdir(exist_ok=True)
            stack.callback(_remove_empty, parent)
    own = filelock.FileLock(lock)
    try:
        own.acquire(timeout=_MOMENT, poll_interval=_MOMENT / 10)
    except filelock.Timeout:
        raise ValueError(
            f"{what} is in use: {holder(lock)} holds {lock}; wait until it ends, or choose another name"
        ) from None
    stack.callback(own.release)
    stack.callback(lock.unlink, missing_ok=True)  # while it is held: who waits for the removed file makes a new one
    with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
        since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        lock.write_text(f"process {os.getpid()} on {platform.node()}, since {since},", encoding="utf-8")


def _remove_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()
