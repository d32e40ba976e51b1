"""Models and runs at addresses such as `gs://bucket/models/small`: worked on in copies here, sent whole or not at all.

| there                      | what it is                                                                          |
|----------------------------|-------------------------------------------------------------------------------------|
| `….FILE.new`               | a file on its way, beside the one whose name it will have                           |
| `.saap-sync/change`        | what a change consists of; all of it is there: whoever comes next ends it           |
| `.saap-sync/state`         | of a run: a token of the last change that is whole                                  |

So a model or a run that was killed on its way is the one that was there before, or none, by us or others. What is read
of a model is copied into `cache()`, once for each state of the files there: names, sizes, times of the last change. A
run is worked on in a directory here (`Mirror`).

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
import uuid
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from saap_jax.runtime.files import cache, held, is_left, write_atomically
from saap_jax.runtime.processes import barrier, broadcast, is_primary
from saap_jax.runtime.progress import within

PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}
"""Scheme of an address -> the package that reaches it (or tensorflow, where that is installed)."""

SYNC = ".saap-sync"
"""Directory of what is not of the model or run itself; of a single file, such as GGUF's, beside it."""

LAST = ("config.json", "pruned.json", "saap.json")
"""What gets its name last, without which nothing loads as a model."""

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
    """Say whether a path, or a file or directory at an address, is there."""
    if not is_remote(name):
        return Path(name).expanduser().exists()
    with reaching(str(name)):
        path = path_of(str(name))
        return bool(files_at(path)) and not _sync(path, "change").exists()


def path_of(address: str) -> Any:
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


def key_of(address: str) -> str:
    """Shorten an address to a name of a directory here."""
    return hashlib.sha256(address.rstrip("/").encode()).hexdigest()[:16]


def files_at(path: Any, *, begun: bool = False) -> dict[str, Remote]:
    """List the files at an address by their name within it, that of a single file empty; or those on their way."""
    if not path.exists():
        return {}
    if not path.is_dir():
        return {"": _state(path)}
    found: dict[str, Remote] = {}
    for each in path.iterdir():
        if each.name in (SYNC, ".", ".."):
            continue
        if each.is_dir():
            found |= {f"{each.name}/{name}": file for name, file in files_at(each, begun=begun).items()}
        elif begun == (each.name.startswith(".") and each.name.endswith((".new", ".half"))):
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


def _within(path: Any, name: str) -> Any:
    """Place a file of a directory; the path itself where it is one file, whose name is empty."""
    return path / name if name else path


def _new(file: Any) -> Any:
    """Place a file until its change is ended: a name in a store of objects changes within a folder alone."""
    return file.parent / f".{file.name}.new"


def _sync(path: Any, name: str) -> Any:
    return (path.parent / f".{path.name}{SYNC}" if path.suffix == ".gguf" else path / SYNC) / name


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


# --- changes -------------------------------------------------------------------------------------


def _copy(source: Any, target: Any, size: int) -> None:
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


def _put(path: Any, name: str, value: Any) -> None:
    """Write a value beside what is at an address, under its name when all of it is there."""
    file = _sync(path, name)
    half = file.with_name(f"{name}.half")
    half.parent.mkdir(parents=True, exist_ok=True)
    half.write_text(json.dumps(value))
    half.replace(file)


def _replace(path: Any, place: Path, changed: Collection[str], removed: Collection[str] = (), token: str = "") -> None:
    """Put files of a directory (or the file) here in the place of those there, and remove others: all or nothing."""
    _log.warning("sending %s: %d files", path, len(changed))
    for name in within("files sent", sorted(changed)):
        source = _within(place, name)
        _copy(source, _new(_within(path, name)), source.stat().st_size)
    _put(path, "change", {"token": token, "changed": [*changed], "removed": [*removed]})
    _end_change(path)


def _end_change(path: Any) -> None:
    """End a change that is all there: give its files their names, remove what it removes, and write its token."""
    file = _sync(path, "change")
    if not file.exists():
        return
    change = json.loads(file.read_text())
    for name in sorted(change["changed"], key=lambda name: (name in LAST, name)):
        new = _new(_within(path, name))
        if new.exists():  # else it has its name already
            new.replace(_within(path, name))
    for name in change["removed"]:
        if (path / name).exists():
            (path / name).unlink()
    if change["token"]:
        _put(path, "state", change["token"])
    file.unlink()


# --- models --------------------------------------------------------------------------------------


def fetched(address: str, patterns: Sequence[str]) -> Path:
    """Have a copy here of the file or directory at an address, fetched unless it is here in the same state.

    Args:
        patterns: names of files to fetch of a directory that has safetensors files; of any other all is fetched.

    Raises:
        FileNotFoundError: nothing is there, or nothing whole.
        ValueError: it cannot be reached.
    """
    path = path_of(address)
    with reaching(address):
        _end_change(path)
        files = files_at(path)
    if not files:
        raise FileNotFoundError(f"{address}: expected a model, found nothing there; check the address")
    of_model = {name for name in files if "/" not in name and any(fnmatch.fnmatch(name, each) for each in patterns)}
    if any(name.endswith(".safetensors") for name in of_model):
        files = {name: file for name, file in files.items() if name in of_model}
    state = hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()[:16]
    entry = cache() / "remote" / key_of(address) / state
    entry.parent.mkdir(parents=True, exist_ok=True)
    import filelock

    with filelock.FileLock(entry.with_name(f".{state}.lock")), reaching(address):
        if not entry.exists():
            partial = entry.with_name(f".{state}.partial")  # what was begun, is gone on with
            missing = [name for name in files if not _within(partial / path.name, name).is_file()]
            _log.warning("fetching %s: %d files, into %s", address, len(missing), entry)
            for name in within("files fetched", missing):
                _copy(_within(path, name), _within(partial / path.name, name), files[name].size)
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
    path = path_of(address)
    place = cache() / "outputs" / key_of(address) / path.name
    with held(place, address):
        broadcast(lambda: _begin(path, address))
        if is_primary():
            _remove(place)
        yield place
        if is_primary():
            send(place, address)
            _remove(place)
        barrier(f"{address} is sent")


def _begin(path: Any, address: str) -> None:
    """Try that one may write at an address where nothing is.

    Raises:
        FileExistsError: something is there.
    """
    with reaching(address):
        _end_change(path)
        if files_at(path):
            raise FileExistsError(f"{address}: exists already and is never overwritten; choose another address")
        for name in files_at(path, begun=True):  # by a command that was killed
            (path / name).unlink()
        _put(path, "state", "")
        _sync(path, "state").unlink()


def send(place: Path, address: str) -> None:
    """Send a file or directory up to an address, unless it is there already.

    Raises:
        FileExistsError: something else is at the address.
        ValueError: it cannot be reached; the same call sends all of it again.
    """
    path, files = path_of(address), [place] if place.is_file() else sorted(place.rglob("*"))
    ours = {str(file.relative_to(place)): file.stat().st_size for file in files if file.is_file()}
    ours = {"" if name == "." else name: size for name, size in ours.items()}
    with reaching(address, f"; what was made is whole at {place}, until the same command makes and sends it again"):
        _end_change(path)
        if {name: file.size for name, file in files_at(path).items()} != ours:
            _begin(path, address)
            _replace(path, place, ours)


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


# --- runs ----------------------------------------------------------------------------------------


class Mirror:
    """A run at an address, and the directory `path` here that it is worked on in.

    Whoever begins takes what is there, unless the last change came from here: then this directory is as new, or newer
    by the stage that was being worked on. Who sends sees by the token whether another machine sent meanwhile, and
    stops, but two that send in the same moment may not.
    """

    def __init__(self, address: str):
        self.address, self._there = address, path_of(address)
        self.path = cache() / "runs" / key_of(address) / self._there.name
        self._notes = self.path.with_name(f".{self.path.name}.sync")

    def fetch(self) -> None:
        """Bring here what is there, unless the last change there came from here.

        Raises:
            ValueError: something else than a run is there, or it cannot be reached.
        """
        with reaching(self.address):
            _end_change(self._there)
            token, files = self._token(), files_at(self._there)
            if token is None and files:
                raise ValueError(
                    f"{self.address}: expected a run that was sent there, or nothing, found {next(iter(files))}; "
                    "choose another --name or --runs"
                )
            if token is None or token == self._known()["token"]:
                return
            fresh = self.path.with_name(f".{self.path.name}.partial")
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
            for name, file in files.items():
                _copy(self._there / name, fresh / name, file.size)
            if self._token() != token or _sync(self._there, "change").exists():
                raise ValueError(f"{self.address}: another machine sends it right now; wait until it ends")
            self._notes.unlink(missing_ok=True)  # killed from here on, what is here counts for nothing
            shutil.rmtree(self.path, ignore_errors=True)
            fresh.replace(self.path)
            self._note(token)

    def send(self) -> None:
        """Send what has changed here; of several processes of a job the first one does.

        Raises:
            ValueError: another machine sent meanwhile, or the address cannot be reached.
        """
        if not is_primary() or not self.path.exists():
            return
        with reaching(self.address, f"; the run is whole at {self.path}, and the same command goes on from there"):
            there, known, now = self._token(), self._known(), self._files()
            before = known["files"] if there is not None else {}
            if there is not None and there != known["token"]:
                raise ValueError(
                    f"{self.address}: another machine has sent it meanwhile; begin again to go on from there"
                )
            changed = [name for name, about in now.items() if before.get(name) != about]
            removed = [name for name in before if name not in now]
            if there is None or changed or removed:
                token = uuid.uuid4().hex
                _replace(self._there, self.path, changed, removed, token)
                self._note(token, now)  # killed before, the next one fetches what was sent

    def _token(self) -> str | None:
        file = _sync(self._there, "state")
        return json.loads(file.read_text()) if file.exists() else None

    def _files(self) -> dict[str, list[int]]:
        """List size and time of the last change, ns, of the files here, but for what killed processes left."""
        files = [file for file in sorted(self.path.rglob("*")) if file.is_file() and not is_left(file)]
        return {str(file.relative_to(self.path)): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}

    def _known(self) -> dict[str, Any]:
        """Read the token of what is here, and the files that it was of."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            if self.path.exists():
                return json.loads(self._notes.read_text())
        return {"token": None, "files": {}}

    def _note(self, token: str, files: dict[str, list[int]] | None = None) -> None:
        noted = {"token": token, "files": self._files() if files is None else files}
        write_atomically(self._notes, json.dumps(noted).encode())


@contextlib.contextmanager
def mirrored(address: str) -> Iterator[Mirror]:
    """Hold the directory here of a run at an address, with what is there brought here; see `Mirror`."""
    mirror = Mirror(address)
    with held(mirror.path, f"the run {address}"):
        broadcast(mirror.fetch)
        yield mirror
