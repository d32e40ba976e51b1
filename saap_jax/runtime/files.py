"""Files of ours: written whole or not at all, by one process at a time.

JSON has no NaN and no infinities: they are stored as the strings "NaN", "Infinity" and "-Infinity" (which `float`
understands), and come back as floats.

Who writes a run directory or an output holds a lock, which a kill releases. The lock of `runs/a` is the file
`runs/.a.lock`, beside what it guards, which need not exist yet. It says who holds it, is locked by the operating
system, and is removed with the lock; one that a killed process left is held by nobody.
"""

import contextlib
import io
import json
import math
import os
import platform
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from saap_jax.errors import reading
from saap_jax.runtime.processes import broadcast, is_primary

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

_mine: set[tuple[Path, int]] = set()
"""Locks that are held, with the thread."""

_MOMENT = 0.2
"""Seconds in which a lock file may be removed by who releases it, and be made anew."""


# --- plain values --------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Turn a value into what JSON holds: mappings, lists, strings, numbers, None; NaN and infinities as strings.

    >>> plain({"ratios": (0.2, float("inf"))})
    {'ratios': [0.2, 'Infinity']}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):  # numbers at once: a run may hold a million of them
        return [
            item if type(item) is int or (type(item) is float and math.isfinite(item)) else plain(item)
            for item in value
        ]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # arrays and scalars of numpy and jax
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        if math.isnan(value):
            return "NaN"
        if value > 0:
            return "Infinity"
        return "-Infinity"
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError(f"expected a value that JSON can hold, got {type(value).__name__}: {value!r}")


def encoded(value: Any, indent: int | None = None) -> bytes:
    """Encode a value as JSON."""
    return json.dumps(plain(value), indent=indent, allow_nan=False).encode()


def decoded(content: bytes) -> Any:
    """Decode a JSON text, non-finite numbers included.

    Raises:
        ValueError: it is no JSON, or nested too deeply.
    """

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list):
            return [finite(item) if isinstance(item, dict | list | str) else item for item in value]
        if isinstance(value, str):
            return _NON_FINITE.get(value, value)
        return value

    try:
        return finite(json.loads(content.decode()))
    except RecursionError:
        raise ValueError("values nested too deeply") from None


def read_json(path: Path) -> Any:
    """Read the plain value of a JSON file, non-finite numbers included.

    Raises:
        ValueError: it is no JSON.
    """
    with reading(path, "JSON; the file was changed or damaged"):
        return decoded(path.read_bytes())


def arrays_file(arrays: Mapping[str, Any], name: str) -> bytes:
    """Encode arrays as the content of an npz file, not compressed; keys may hold slashes.

    Raises:
        ValueError: an array's type is unknown to the format (bfloat16, objects); `name` is that of the file.
    """
    import numpy as np  # here: help needs none

    values = {key: np.asarray(value) for key, value in arrays.items()}
    for key, value in values.items():
        if value.dtype.kind not in "biufcSU":
            raise ValueError(f"expected numbers or text at {key!r} of {name}, got {value.dtype}; convert it first")
    file = io.BytesIO()
    np.savez(file, **values)  # pyright: ignore[reportArgumentType]  # its stub takes an array for `allow_pickle`
    return file.getvalue()


# --- writing -------------------------------------------------------------------------------------


def cache() -> Path:
    """Name the directory of files that are made of others, `$XDG_CACHE_HOME/saap_jax` or `~/.cache/saap_jax`."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "saap_jax"


def check_target(name: str, path: str) -> None:
    """Raise ValueError, before any work, where a file cannot be written; an empty path stands for none."""
    if path and (Path(path).is_dir() or not Path(path).parent.is_dir()):
        raise ValueError(f"{name}: expected a file in a directory that exists, got {path}; make the directory first")
    if path and is_primary():
        try:
            with tempfile.TemporaryFile(dir=Path(path).parent):
                pass
        except OSError as error:
            raise ValueError(
                f"{name}: expected a directory that can be written to, got {path}: {error.strerror}"
            ) from None


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that its name holds either the old content or the whole new one, whenever the process ends.

    Nothing is left behind where that fails, as on a full disk. Of several processes of a job, the first one writes.
    """
    if not is_primary():
        return
    partial = path.with_name(f".{path.name}.partial")
    try:
        with _named(path), open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def is_left(file: Path) -> bool:
    """Say whether a file is what a killed process left: one half written, or a lock that nobody holds."""
    return file.name.startswith(".") and file.name.endswith((".partial", ".lock"))


def append_line(path: Path, line: bytes) -> None:
    """Append a line to a file in place of an unfinished last one, as a kill or a full disk leaves it.

    Who reads such a file ignores an unfinished last line.
    """
    with _named(path), open(path, "ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line + b"\n")
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name the file in an error of the system that does not: writing and syncing know a descriptor only."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


# --- one process at a time -----------------------------------------------------------------------


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
    path = Path(os.path.realpath(path))
    lock = path.with_name(f".{path.name}.lock")
    with contextlib.ExitStack() as stack:
        mine = (lock, threading.get_ident())
        if mine not in _mine:
            broadcast(lambda: _take(lock, what, stack))
            _mine.add(mine)
            stack.callback(_mine.discard, mine)
        yield


def _take(lock: Path, what: str, stack: contextlib.ExitStack) -> None:
    for parent in (*reversed(lock.parent.parents), lock.parent):
        if parent.is_file():
            raise ValueError(f"{what}: expected a directory at {parent}, found a file; choose another place")
        if not parent.exists():
            parent.mkdir(exist_ok=True)
            stack.callback(_remove_empty, parent)
    import filelock

    own = filelock.FileLock(lock)
    try:
        own.acquire(timeout=_MOMENT, poll_interval=_MOMENT / 10)
    except filelock.Timeout:
        said = ""
        with contextlib.suppress(OSError):
            said = "".join(filter(str.isprintable, lock.read_bytes()[:300].decode(errors="replace")))
        raise ValueError(
            f"{what} is in use: {said or 'another process'} holds {lock}; wait until it ends, or choose another name"
        ) from None
    stack.callback(own.release)
    stack.callback(lock.unlink, missing_ok=True)  # while it is held: who waits for the removed file makes a new one
    with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
        since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        lock.write_text(f"process {os.getpid()} on {platform.node()}, since {since},", encoding="utf-8")


def _remove_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()
