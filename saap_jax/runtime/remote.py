"""Models at addresses such as `gs://bucket/models/small`: copied here to be read, sent whole or not at all.

What is read is copied into `cache()`, once for each state of the files there. While something is sent, `.NAME.sending`
lies beside it, and `config.json` comes last: what was killed on its way is no model, to us or others, and the same
command sends it again.

No lock is held there: two machines that write to one address at once are not told of each other. Of several processes
of a job each one reads for itself, and the first one writes. Files are copied by `fsspec`, each whole or not at all.
"""

import contextlib
import fnmatch
import hashlib
import json
import logging
import os
import posixpath
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from saap_jax.checks import is_remote
from saap_jax.runtime.files import cache, held
from saap_jax.runtime.processes import barrier, broadcast, is_primary
from saap_jax.runtime.progress import within

PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}
"""Scheme of an address -> the package that reaches it."""

LAST = ("config.json", "pruned.json", "saap.json")
"""What is sent last, without which nothing loads as a model."""

_log = logging.getLogger(__name__)


def exists(name: str | Path) -> bool:
    """Say whether a path, or a file or directory at an address, is there, and whole."""
    if not is_remote(name):
        return Path(name).expanduser().exists()
    with _reaching(str(name)):
        system, path = _place(str(name))
        return _there(system, path) and not _there(system, _mark(path))


def fetched(address: str, patterns: Sequence[str]) -> Path:
    """Have a copy here of the file or directory at an address, fetched unless it is here in the same state.

    Args:
        patterns: names of files to fetch of a directory that has safetensors files; of any other all is fetched.

    Raises:
        FileNotFoundError: nothing is there, or nothing whole.
        ValueError: it cannot be reached.
    """
    if not exists(address):
        raise FileNotFoundError(f"{address}: expected a model, found none that is whole there; check the address")
    with _reaching(address):
        system, path = _place(address)
        files = [posixpath.relpath(each, path) for each in system.find(path)]
        wanted = [name for name in files if "/" not in name and any(fnmatch.fnmatch(name, p) for p in patterns)]
        if any(name.endswith(".safetensors") for name in wanted):
            files = wanted
        state = {name: system.ukey(posixpath.normpath(f"{path}/{name}")) for name in files}
        entry = cache() / "remote" / _digest(address.rstrip("/")) / _digest(state)
        entry.parent.mkdir(parents=True, exist_ok=True)
        import filelock

        with filelock.FileLock(entry.with_name(f".{entry.name}.lock")):
            if not entry.exists():
                partial = entry.with_name(f".{entry.name}.partial")
                _log.warning("fetching %s: %d files, into %s", address, len(files), entry)
                for name in within("files fetched", files):
                    place = partial / posixpath.basename(path) / name
                    if not place.exists():  # what a killed command has fetched, is here
                        half = place.with_name(f".{place.name}.half")
                        half.parent.mkdir(parents=True, exist_ok=True)
                        system.get_file(posixpath.normpath(f"{path}/{name}"), str(half))
                        half.replace(place)
                partial.replace(entry)
    return entry / posixpath.basename(path)


@contextlib.contextmanager
def staged(address: str) -> Iterator[Path]:
    """Yield the path to make an output at: the path itself, or one here of what goes up to an address at the end.

    That one may write there is known before the block runs; after an error in it nothing is there.

    Raises:
        FileExistsError: something is at the address.
        ValueError: it cannot be reached, or another process here writes it. What was made stays here then.
    """
    if not is_remote(address):
        yield Path(address).expanduser()
        return
    address = address.rstrip("/")
    place = cache() / "outputs" / _digest(address) / posixpath.basename(address)
    with held(place.parent, address):
        broadcast(lambda: _clear(address))
        if is_primary():
            shutil.rmtree(place.parent, ignore_errors=True)
            place.parent.mkdir()
        yield place
        if is_primary():
            send(place, address)
            shutil.rmtree(place.parent)
        barrier(f"{address} is sent")


def send(place: Path, address: str) -> None:
    """Send a file or directory up to an address, unless it is there already.

    Raises:
        FileExistsError: something else is at the address.
        ValueError: it cannot be reached; the same call sends all of it again.
    """
    files = [place] if place.is_file() else place.rglob("*")
    sizes = {str(file.relative_to(place)): file.stat().st_size for file in files if file.is_file()}
    with _reaching(address, f"; what was made is whole at {place}, until the same command makes and sends it again"):
        system, path = _place(address)
        there = {posixpath.relpath(name, path): system.size(name) for name in system.find(path)}
        if exists(address) and there == sizes:
            return
        _clear(address)
        _log.warning("sending %s: %d files", address, len(sizes))
        system.pipe_file(_mark(path), b"being sent")
        for name in within("files sent", sorted(sizes, key=lambda name: (name in LAST, name))):
            system.put_file(str(place / name), posixpath.normpath(f"{path}/{name}"))
        system.rm_file(_mark(path))


def _clear(address: str) -> None:
    """Remove what a killed command has sent to an address, and try that one may write there.

    Raises:
        FileExistsError: something whole is there.
    """
    if exists(address):
        raise FileExistsError(f"{address}: exists already and is never overwritten; choose another address")
    with _reaching(address):
        system, path = _place(address)
        if _there(system, path):
            system.rm(path, recursive=True)
        system.pipe_file(_mark(path), b"being sent")
        system.rm_file(_mark(path))


# --- places there ----------------------------------------------------------------------------------


def _place(address: str) -> tuple[Any, str]:
    """Read an address as a file system of `fsspec`, and a path in it.

    Raises:
        ValueError: an address of another kind, or one that names no file or directory in a bucket.
    """
    scheme, _, rest = address.partition("://")
    if scheme not in PACKAGES or len([part for part in rest.split("/") if part]) < 2 or ".." in rest.split("/"):
        kinds = ", ".join(f"{each}://" for each in PACKAGES)
        raise ValueError(f"{address}: expected an address of {kinds} with a bucket and a name in it, got {address!r}")
    import fsspec  # here: most commands name no address

    system, path = fsspec.url_to_fs(address.rstrip("/"), use_listings_cache=False)
    return system, path


def _there(system: Any, path: str) -> bool:
    """Say whether something is at a path; `exists` of some systems takes a lack of rights for an answer."""
    try:
        system.info(path)
    except FileNotFoundError:
        return False
    return True


def _mark(path: str) -> str:
    """Name what says that something is being sent to a path."""
    folder, name = posixpath.split(path)
    return f"{folder}/.{name}.sending"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=os.fspath).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _reaching(address: str, more: str = "") -> Iterator[None]:
    """Turn what libraries raise that reach an address into one line.

    Raises:
        ValueError: a library is missing, or the place cannot be reached or refuses.
    """
    try:
        yield
    except (FileExistsError, ValueError):
        raise
    except ImportError:
        package = PACKAGES[address.partition(":")[0]]
        raise ValueError(
            f"{address}: such addresses take the package {package}, which is not installed; run pip install {package}"
        ) from None
    except Exception as error:  # each library has its own
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{address}: cannot be reached, or refuses ({said}){more}") from error
