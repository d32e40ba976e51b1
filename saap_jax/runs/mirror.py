"""Runs at addresses: worked on in a directory here, and sent after each stage as one change that comes whole or not.

| there                      | what it is                                                                    |
|----------------------------|-------------------------------------------------------------------------------|
| `NAME/…`                   | the run, as a directory here is                                               |
| `NAME/….FILE.new`          | a file of a change that is on its way, beside the one that it replaces        |
| `NAME/.saap-sync/change`   | what the change consists of; once this is there, whoever comes next ends it   |
| `NAME/.saap-sync/state`    | a token of the last change that is whole                                      |

Whoever begins takes what is there, unless the last change came from here: then this directory is as new, or newer by
the stage that was being worked on. There is no lock there; who sends sees by the token whether another machine sent
meanwhile, and stops, but two that send in the same moment may not.
"""

import contextlib
import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saap_jax.runs.directory import is_left
from saap_jax.runtime.files import cache, held, write_atomically
from saap_jax.runtime.processes import broadcast, is_primary
from saap_jax.runtime.remote import copy, files_at, key_of, path_of, reaching

SYNC = ".saap-sync"

Files = dict[str, list[int]]
"""Size and time of the last change, in ns, of files by their name within the run."""


class Mirror:
    """A run at an address, and the directory `path` here that it is worked on in."""

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
            self._apply()
            token, known = self._token(), self._known()
            files = {name: file for name, file in files_at(self._there).items() if _is_of_run(name)}
            if token is None and files:
                raise ValueError(
                    f"{self.address}: expected a run that was sent there, or nothing, found {next(iter(files))}; "
                    "choose another --name or --runs"
                )
            if token is None or token == known["token"]:
                return
            fresh = self.path.with_name(f".{self.path.name}.partial")
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
            for name, file in files.items():
                copy(self._there / name, fresh / name, file.size)
            if self._token() != token or (self._there / SYNC / "change").exists():
                raise ValueError(f"{self.address}: another machine sends it right now; wait until it ends")
            self._notes.unlink(missing_ok=True)  # killed from here on, what is here counts for nothing
            shutil.rmtree(self.path, ignore_errors=True)
            fresh.replace(self.path)
            self._note(token, _files(self.path))

    def send(self) -> None:
        """Send what has changed here; of several processes of a job the first one does.

        Raises:
            ValueError: another machine sent meanwhile, or the address cannot be reached.
        """
        if not is_primary() or not self.path.exists():
            return
        with reaching(self.address, f"; the run is whole at {self.path}, and the same command goes on from there"):
            there, known, now = self._token(), self._known(), _files(self.path)
            before = known["files"] if there is not None else {}
            if there is not None and there != known["token"]:
                raise ValueError(
                    f"{self.address}: another machine has sent it meanwhile; begin again to go on from there"
                )
            changed = [name for name, about in now.items() if before.get(name) != about]
            removed = [name for name in before if name not in now]
            if there is not None and not changed and not removed:
                return
            for name in changed:
                copy(self.path / name, _new(self._there / name), now[name][0])
            token = uuid.uuid4().hex
            self._put("change", {"token": token, "changed": changed, "removed": removed})
            self._apply()
            self._note(token, now)  # killed before, the next one fetches what was sent

    def _apply(self) -> None:
        """End a change that is all there: give its files their names, remove what it removes, and write its token."""
        file = self._there / SYNC / "change"
        if not file.exists():
            return
        change = json.loads(file.read_text())
        for name in change["changed"]:
            new = _new(self._there / name)
            if new.exists():  # else it has its name already
                new.replace(self._there / name)
        for name in change["removed"]:
            if (self._there / name).exists():
                (self._there / name).unlink()
        self._put("state", change["token"])
        file.unlink()

    def _put(self, name: str, value: Any) -> None:
        """Write a value there, under its name when all of it is there."""
        half = self._there / SYNC / f"{name}.half"
        half.parent.mkdir(parents=True, exist_ok=True)
        half.write_text(json.dumps(value))
        half.replace(self._there / SYNC / name)

    def _token(self) -> str | None:
        file = self._there / SYNC / "state"
        return json.loads(file.read_text()) if file.exists() else None

    def _known(self) -> dict[str, Any]:
        """Read the token of what is here, and the files that it was of."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            if self.path.exists():
                return json.loads(self._notes.read_text())
        return {"token": None, "files": {}}

    def _note(self, token: str, files: Files) -> None:
        write_atomically(self._notes, json.dumps({"token": token, "files": files}).encode())


@contextlib.contextmanager
def mirrored(address: str) -> Iterator[Mirror]:
    """Hold the directory here of a run at an address, with what is there brought here; see `Mirror`."""
    mirror = Mirror(address)
    with held(mirror.path, f"the run {address}"):
        broadcast(mirror.fetch)
        yield mirror


def _new(file: Any) -> Any:
    """Place a file until its change is ended: a name in a store of objects changes within a folder alone."""
    return file.parent / f".{file.name}.new"


def _is_of_run(name: str) -> bool:
    """Say whether a file there is of the run itself."""
    last = name.rpartition("/")[2]
    return not (name.startswith(f"{SYNC}/") or (last.startswith(".") and last.endswith((".new", ".half"))))


def _files(path: Path) -> Files:
    """List the files of a run, but for locks and what killed processes left."""
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and not is_left(file)]
    return {str(file.relative_to(path)): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
