"""A bucket that is none: `gs://` addresses kept in a directory, with what sets a store of objects apart from a disk."""

import os
from pathlib import Path
from typing import Any

import pytest
from etils.epath import backend, gpath


class Bucket(backend._OsPathBackend):
    """Objects below a directory: a prefix is there while an object is, and what was written until an error stays."""

    def __init__(self, root: Path):
        self.root = root
        self.written: list[str] = []
        """Objects that were opened for writing, in order."""
        self.read: list[str] = []
        self.dies_at = ""
        """Part of the name of an object in whose middle writing dies."""
        self.renames_left = -1
        """Names that are changed before changing one dies; below 0: it never does."""
        self.error: BaseException = ConnectionResetError("the line went dead")

    def here(self, path: Any) -> str:
        address = os.fspath(path)
        return str(self.root / address.removeprefix("gs://"))

    def open(self, path, mode):
        (self.written if "w" in mode else self.read).append(os.fspath(path))
        if "w" not in mode:
            return super().open(self.here(path), mode)
        os.makedirs(os.path.dirname(self.here(path)), exist_ok=True)
        file = super().open(self.here(path), mode)
        if not self.dies_at or self.dies_at not in os.path.basename(os.fspath(path)):
            return file
        write = file.write

        def half(content):
            write(content[: len(content) // 2])
            raise self.error

        return _Wrapped(file, half)

    def exists(self, path):
        place = self.here(path)
        return os.path.isfile(place) or self.isdir(path)

    def isdir(self, path):
        return any(files for _, _, files in os.walk(self.here(path)))

    def listdir(self, path):
        return super().listdir(self.here(path))

    def mkdir(self, path, *, exist_ok=False, mode=None):
        """Make nothing: there are no directories."""

    makedirs = mkdir

    def remove(self, path):
        os.remove(self.here(path))

    def replace(self, path, dst):
        if not self.isdir(os.path.dirname(os.fspath(dst))):
            raise FileNotFoundError(f"folder of {dst} does not exist")
        if self.renames_left == 0:
            raise self.error
        self.renames_left -= 1
        os.replace(self.here(path), self.here(dst))

    def stat(self, path):
        return super().stat(self.here(path))

    def names(self, address: str) -> set[str]:
        """Return the names of the objects below an address."""
        place = Path(self.here(address))
        return {str(each.relative_to(place)) for each in place.rglob("*") if each.is_file()}


class _Wrapped:
    def __init__(self, file, write):
        self._file, self.write = file, write

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self._file.close()


def use(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """Have `epath` take a bucket for `gs://`."""
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", bucket)
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    return bucket
