"""Models at addresses such as `gs://bucket/models/small`: copied here to be read, sent whole or not at all.

What is read is copied into `cache()`, once for each state of the files there: names, sizes, times of the last change.
While something is sent, `.NAME.sending` lies beside it, and `config.json` comes last: what was killed on its way is no
model, to us or others, and the same command sends it again.

No lock is held there: two machines that write to one address at once are not told of each other. Of several processes
of a job each one reads for itself, and the first one writes. Paths there are those of `epath`.
"""

import contextlib
import fnmatch
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from saap_jax.checks import is_remote
from saap_jax.runtime.files import cache, held
from saap_jax.runtime.processes import barrier, broadcast, is_primary
from saap_jax.runtime.progress import within

PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}
"""Scheme of an address -> the package that reaches it (or tensorflow, where that is installed)."""

LAST = ("config.json", "pruned.json", "saap.json")
"""What is sent last, without which nothing loads as a model."""

_log = logging.getLogger(__name__)


def exists(name: str | Path) -> bool:
    """Say whether a path, or a file or directory at an address, is there, and whole."""
    if not is_remote(name):
        return Path(name).expanduser().exists()
    with _reaching(str(name)):
        path = _path_of(str(name))
        return path.exists() and not _mark(path).exists()


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
    path = _path_of(address)
    with _reaching(address):
        files = _files_at(path)
        wanted = [name for name in files if "/" not in name and any(fnmatch.fnmatch(name, p) for p in patterns)]
        if any(name.endswith(".safetensors") for name in wanted):
            files = {name: files[name] for name in wanted}
        entry = cache() / "remote" / _digest(path) / _digest(sorted(files.items()))
        entry.parent.mkdir(parents=True, exist_ok=True)
        import filelock

        with filelock.FileLock(entry.with_name(f".{entry.name}.lock")):
            if not entry.exists():
                partial = entry.with_name(f".{entry.name}.partial")  # what was begun, is gone on with
                missing = [name for name in files if not (partial / path.name / name).is_file()]
                _log.warning("fetching %s: %d files, into %s", address, len(missing), entry)
                for name in within("files fetched", missing):
                    _copy(path / name, partial / path.name / name, files[name][0])
                partial.replace(entry)
    return entry / path.name


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
    path = _path_of(address)
    place = cache() / "outputs" / _digest(path) / path.name
    with held(place.parent, address):
        broadcast(lambda: _clear(path, address))
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
    path, files = _path_of(address), [place] if place.is_file() else place.rglob("*")
    sizes = {str(file.relative_to(place)): file.stat().st_size for file in files if file.is_file()}
    with _reaching(address, f"; what was made is whole at {place}, until the same command makes and sends it again"):
        if exists(address) and {name: size for name, (size, _) in _files_at(path).items()} == sizes:
            return
        _clear(path, address)
        _log.warning("sending %s: %d files", address, len(sizes))
        _mark(path).write_text("being sent")
        for name in within("files sent", sorted(sizes, key=lambda name: (name in LAST, name))):
            _copy(place / name, path / name, sizes[name])
        _mark(path).unlink()


def _clear(path: Any, address: str) -> None:
    """Remove what a killed command has sent to an address, and try that one may write there.

    Raises:
        FileExistsError: something whole is there.
    """
    with _reaching(address):
        mark = _mark(path)
        if path.exists() and not mark.exists():
            raise FileExistsError(f"{address}: exists already and is never overwritten; choose another address")
        for name in _files_at(path):
            (path / name).unlink()
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text("being sent")
        mark.unlink()


def _copy(source: Any, target: Any, size: int) -> None:
    """Copy a file of so many bytes, down or up, which gets its name when all of it is there.

    Raises:
        OSError: another number of bytes arrived.
    """
    from etils import epath

    half = epath.Path(target).with_name(f".{target.name}.half")
    half.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as file, half.open("wb") as made:
        shutil.copyfileobj(file, made, 2**24)
    if (got := half.stat().length) != size:
        raise OSError(f"{got:,} of {size:,} bytes of {source} arrived; has it been changed meanwhile?")
    half.replace(target)


# --- places there ----------------------------------------------------------------------------------


def _path_of(address: str) -> Any:
    """Read an address as a path of `epath`.

    Raises:
        ValueError: an address of another kind, or one that names no file or directory in a bucket.
    """
    scheme, _, rest = address.partition("://")
    if scheme not in PACKAGES or len([part for part in rest.split("/") if part]) < 2 or ".." in rest.split("/"):
        kinds = ", ".join(f"{each}://" for each in PACKAGES)
        raise ValueError(f"{address}: expected an address of {kinds} with a bucket and a name in it, got {address!r}")
    from etils import epath  # here: most commands name no address

    return epath.Path(address.rstrip("/"))


def _files_at(path: Any) -> dict[str, tuple[int, int | str]]:
    """List the files at an address by their name within it, `.` of a single file: size, and what tells its version.

    That is the time of the last change, or what S3 and Azure say, of which `epath` knows none.
    """
    if not path.exists():
        return {}
    if path.is_dir():
        inner = {each.name: _files_at(each) for each in path.iterdir() if each.name not in (".", "..")}
        return {os.path.normpath(f"{name}/{more}"): file for name in inner for more, file in inner[name].items()}
    stat = path.stat()
    version: int | str = int(stat.mtime or 0)
    if not version:
        import fsspec

        system, inner = fsspec.url_to_fs(os.fspath(path))
        info = system.info(inner)
        version = next((str(info[key]) for key in ("LastModified", "last_modified", "ETag", "etag") if key in info), "")
    return {".": (int(stat.length), version)}


def _mark(path: Any) -> Any:
    """Place what says that something is being sent."""
    return path.parent / f".{path.name}.sending"


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
