"""Models at addresses such as `gs://bucket/models/small`: read through copies here, sent up whole or not at all.

| way  | how                                                                                                      |
|------|----------------------------------------------------------------------------------------------------------|
| down | into `cache()`, once for each state of the files there: names, sizes, times of the last change           |
| up   | made here first. While files go up, `.saap-upload` lies among them; what says that they are a model goes |
|      | last. Whoever finds that file here takes what is there for no model, and the same command sends it anew  |

No lock is held there: two machines that write to one address at once are not told of each other. Of several processes
of a job each one reads for itself, and the first one writes. Paths there are those of `epath`.
"""

import contextlib
import fnmatch
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import filelock

from saap_jax.runtime.files import cache, held
from saap_jax.runtime.processes import barrier, broadcast, is_primary
from saap_jax.runtime.progress import within

PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}
"""Scheme of an address -> the package that reaches it (or tensorflow, where that is installed)."""

MARK = ".saap-upload"
"""A file among others that are not all there yet."""

LAST = ("config.json", "pruned.json", "saap.json")
"""What goes up last, without which nothing loads as a model."""

_LIBRARIES = re.compile(r"(gcsfs|google|fsspec|aiohttp|s3fs|botocore|adlfs|azure|tensorflow|requests|urllib3)\b")
"""Libraries whose errors say that a place cannot be reached."""

_log = logging.getLogger(__name__)


class Remote(NamedTuple):
    """A file there."""

    size: int
    changed: int | str
    """Seconds of the epoch, or what else tells a file from an earlier one there; empty where the place does not say."""


# --- places --------------------------------------------------------------------------------------


def is_remote(name: str | Path) -> bool:
    """Say whether a name is an address, and no path.

    >>> is_remote("gs://bucket/model"), is_remote("models/small"), is_remote("mine.py:problem")
    (True, False, False)
    """
    return re.match(r"[a-z][a-z0-9+.-]*://", str(name)) is not None


def check_local(field: str, name: str | Path) -> Path:
    """Resolve the path in a field.

    Raises:
        ValueError: it is an address.
    """
    if is_remote(name):
        raise ValueError(f"{field}: expected a path of this machine, got the address {name}; copy it here first")
    return Path(name)


def exists(name: str | Path) -> bool:
    """Say whether a path, or a whole file or directory at an address, is there."""
    if not is_remote(name):
        return Path(name).expanduser().exists()
    with reaching(str(name)):
        files = files_at(path_of(str(name)))
    return bool(files) and MARK not in files


def path_of(address: str) -> Any:
    """Return an address as a path of `epath`.

    Raises:
        ValueError: an address of another kind, or one that names no file or directory in a bucket.
    """
    scheme, _, rest = address.partition("://")
    if scheme not in PACKAGES or len([part for part in rest.split("/") if part]) < 2 or ".." in rest.split("/"):
        kinds = ", ".join(f"{each}://" for each in PACKAGES)
        raise ValueError(f"{address}: expected an address of {kinds} with a bucket and a name in it, got {address!r}")
    from etils import epath  # here: most commands name no address

    return epath.Path(address.rstrip("/"))


def key_of(address: str) -> str:
    """Shorten an address to a name of a directory here."""
    return hashlib.sha256(address.rstrip("/").encode()).hexdigest()[:16]


def files_at(path: Any) -> dict[str, Remote]:
    """List the files at an address by their name within it, that of a single file empty; the mark among them."""
    found = {MARK: Remote(0, 0)} if _mark(path).exists() else {}
    if not path.exists():
        return found
    if not path.is_dir():
        return found | {"": _state(path)}
    for each in path.iterdir():
        if each.is_dir() and each.name not in (".", ".."):
            found |= {f"{each.name}/{name}": file for name, file in files_at(each).items()}
        elif each.name not in (MARK, ".", ".."):
            found[each.name] = _state(each)
    return found


def _state(path: Any) -> Remote:
    """Describe a file; S3 and Azure, of which `epath` knows no time of change, say by other names when it was made."""
    stat = path.stat()
    if changed := int(stat.mtime or 0):
        return Remote(int(stat.length), changed)
    import fsspec

    system, inner = fsspec.url_to_fs(os.fspath(path))
    info = system.info(inner)
    versions = (str(info[key]) for key in ("LastModified", "last_modified", "ETag", "etag") if info.get(key))
    return Remote(int(stat.length), next(versions, ""))


def _mark(path: Any) -> Any:
    """Place the mark of an address: within a directory; of a single file, such as GGUF's, beside it."""
    return path.parent / f".{path.name}{MARK}" if path.suffix == ".gguf" else path / MARK


@contextlib.contextmanager
def reaching(address: str, more: str = "") -> Iterator[None]:
    """Turn what libraries raise that reach an address into one line.

    Raises:
        ValueError: a library is missing, or the place cannot be reached or refuses.
    """
    try:
        yield
    except FileExistsError:
        raise
    except ImportError:
        package = PACKAGES[address.partition(":")[0]]
        raise ValueError(
            f"{address}: such addresses take the package {package}, which is not installed; run pip install {package}"
        ) from None
    except Exception as error:
        if not (isinstance(error, OSError) or _LIBRARIES.match(type(error).__module__)):
            raise
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{address}: cannot be reached, or refuses ({said}){more}") from error


# --- down and up ---------------------------------------------------------------------------------


def copy(source: Any, target: Any, size: int) -> None:
    """Copy a file of so many bytes, down or up, which gets its name when all of it is there.

    Raises:
        OSError: another number of bytes arrived.
    """
    from etils import epath

    target = epath.Path(target)
    half = target.parent / f".{target.name}.half"
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as file, half.open("wb") as made:
        shutil.copyfileobj(file, made, 2**24)
    if (got := half.stat().length) != size:
        raise OSError(f"{got:,} of {size:,} bytes of {source} arrived; has it been changed meanwhile?")
    half.replace(target)


def fetched(address: str, patterns: Sequence[str]) -> Path:
    """Return a copy here of the file or directory at an address, fetched unless it is here in the same state.

    Args:
        patterns: names of files to fetch of a directory that has safetensors files; of any other all is fetched.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: what is there is not whole, or cannot be reached.
    """
    path = path_of(address)
    with reaching(address):
        files = files_at(path)
    if not files:
        raise FileNotFoundError(f"{address}: expected a model, found nothing there; check the address")
    if MARK in files:
        raise ValueError(
            f"{address}: is not whole: sending it has begun and not ended; run the command that makes it again"
        )
    of_model = {name for name in files if "/" not in name and any(fnmatch.fnmatch(name, each) for each in patterns)}
    if any(name.endswith(".safetensors") for name in of_model):
        files = {name: file for name, file in files.items() if name in of_model}
    state = hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()[:16]
    entry = cache() / "remote" / key_of(address) / state
    entry.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(entry.with_name(f".{state}.lock")), reaching(address):
        if not entry.exists():
            partial = entry.with_name(f".{state}.partial")  # what was begun, is gone on with
            missing = [name for name in files if not _within(partial / path.name, name).is_file()]
            _log.warning("fetching %s: %d files, into %s", address, len(missing), entry)
            for name in within("files fetched", missing):
                copy(_within(path, name), _within(partial / path.name, name), files[name].size)
            partial.replace(entry)
    return entry / path.name


@contextlib.contextmanager
def staged(address: str) -> Iterator[Path]:
    """Yield the path to make an output at: the path itself, or one here of what goes up to an address at the end.

    An address is marked first, which shows that one may write there; after an error in the block nothing is there.

    Raises:
        FileExistsError: something is at the address.
        ValueError: it cannot be reached, or another process here writes it. What was made stays here then.
    """
    if not is_remote(address):
        yield Path(address).expanduser()
        return
    path = path_of(address)
    place = cache() / "outputs" / key_of(address) / path.name
    with held(place, address):
        broadcast(lambda: _begin(path, address))
        if is_primary():
            _remove(place)
        try:
            yield place
        except BaseException:
            if is_primary():
                with contextlib.suppress(Exception):
                    if set(files_at(path)) <= {MARK}:
                        _mark(path).unlink()
            raise
        if is_primary():
            send(place, address)
            _remove(place)
        barrier(f"{address} is sent")


def send(place: Path, address: str) -> None:
    """Send a file or directory up to an address, unless it is there already; nothing half sent is taken for whole.

    Raises:
        FileExistsError: something else is at the address.
        ValueError: it cannot be reached; the same call sends all of it again.
    """
    path, files = path_of(address), [place] if place.is_file() else sorted(place.rglob("*"))
    ours = {str(file.relative_to(place)): file.stat().st_size for file in files if file.is_file()}
    ours = {"" if name == "." else name: size for name, size in ours.items()}
    with reaching(address, f"; what was made is whole at {place}, until the same command makes and sends it again"):
        there = {name: file.size for name, file in files_at(path).items()}
        if there and there == ours:
            return
        _begin(path, address)
        for name in there.keys() - ours.keys() - {MARK}:  # half sent by a command that was killed
            _within(path, name).unlink()
        _log.warning("sending %s: %d files", address, len(ours))
        for name in within("files sent", sorted(ours, key=lambda name: (name in LAST, name))):
            copy(_within(place, name), _within(path, name), ours[name])
        _mark(path).unlink()


def _begin(path: Any, address: str) -> None:
    """Mark an address as not whole.

    Raises:
        FileExistsError: something is there that no mark says is half sent.
    """
    with reaching(address):
        there = files_at(path)
        if there and MARK not in there:
            raise FileExistsError(f"{address}: exists already and is never overwritten; choose another address")
        _mark(path).parent.mkdir(parents=True, exist_ok=True)
        _mark(path).write_text("")


def _within(path: Any, name: str) -> Any:
    """Return a file of a directory; the path itself where it is one file, whose name is empty."""
    return path / name if name else path


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
