"""A bucket that is none: `gs://` addresses kept in memory, with what sets a store of objects apart from a disk."""

from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem


class Bucket(MemoryFileSystem):
    """Objects by their names: a prefix is there while an object is, and an object when all of it has arrived."""

    protocol = "gs"
    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.store: dict[str, Any] = {}
        self.pseudo_dirs: list[str] = []
        self.written: list[str] = []
        """Objects that were written, in order."""
        self.read: list[str] = []
        self.dies_at = ""
        """End of the name of an object on whose way, up or down, the line dies."""

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return super()._strip_protocol(str(path).removeprefix("gs://"))

    def _reached(self, path: str) -> None:
        if self.dies_at and path.endswith(self.dies_at):
            raise ConnectionResetError("the line went dead")

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        self._reached(path)
        self.written.append(path)
        with super().open(path, "wb") as file:
            file.write(value)
        self.pseudo_dirs.clear()

    def put_file(self, lpath, rpath, *words, **kwargs):
        with open(lpath, "rb") as file:
            self.pipe_file(rpath, file.read())

    def get_file(self, rpath, lpath=None, *words, **kwargs):
        self.read.append(rpath)
        with open(lpath, "wb") as file:
            content = self.store[self._strip_protocol(rpath)].getvalue()
            file.write(content[: len(content) // 2])
            self._reached(rpath)
            file.write(content[len(content) // 2 :])

    def contents(self, address: str) -> dict[str, bytes]:
        """Return the objects below an address by their names within it."""
        prefix = f"{self._strip_protocol(address)}/"
        found = [name for name in self.store if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.store[name].getvalue() for name in found}

    def names(self, address: str) -> set[str]:
        """Return the names of the objects below an address."""
        return set(self.contents(address))


def use(monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """Have `fsspec` take a bucket for `gs://`."""
    bucket = Bucket()
    monkeypatch.setattr(fsspec, "url_to_fs", lambda address, **_: (bucket, bucket._strip_protocol(address)))
    return bucket
