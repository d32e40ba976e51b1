"""What steps have come to, as files named by a digest of what it was made from; runs of one directory share them.

Written under a temporary name and renamed, so a killed job leaves no half file. A file that cannot be read is made
again. One process of a job writes, all read.
"""

import contextlib
import errno
import io
import json
import os
import re
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from saap_jax.runtime.files import arrays_file, write_atomically
from saap_jax.runtime.processes import broadcast_bytes, is_primary


class FileCache:
    """A directory of arrays and of JSON values by key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._values: dict[str, Any] = {}

    def load(self, key: str) -> dict[str, np.ndarray] | None:
        """Read the arrays of a key; None where there are none."""
        try:
            with np.load(io.BytesIO(self._read(f"{key}.npz")), allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except (ValueError, EOFError, OSError, zipfile.BadZipFile, KeyError):
            return None

    def save(self, key: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep the arrays of a key."""
        self._write(f"{key}.npz", arrays_file(arrays, key))

    def value(self, key: str) -> Any:
        """Read the JSON value of a key; None where there is none."""
        if key not in self._values:
            with contextlib.suppress(ValueError):
                self._values[key] = json.loads(self._read(f"{key}.json"))
        return self._values.get(key)

    def keep(self, key: str, value: Any) -> None:
        """Keep a JSON value."""
        content = json.dumps(value).encode()
        self._values[key] = json.loads(content)
        self._write(f"{key}.json", content)

    def clear(self) -> None:
        """Delete what is kept, with cut models and what killed processes left, and no other file; the directory with it
        where nothing else is there."""
        for file in self.path.iterdir():
            if not re.fullmatch(r"\.*[0-9a-f]{64}(\.(npz|json).*|\.partial)?", file.name):
                continue
            if file.is_dir():
                shutil.rmtree(file)
            else:
                file.unlink()
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def _read(self, name: str) -> bytes:
        path = self.path / name
        return broadcast_bytes(path.read_bytes() if is_primary() and path.is_file() else b"")

    def _write(self, name: str, content: bytes) -> None:
        if is_primary():
            own = self.path / f".{name}.{os.getpid()}"  # another job may keep the same at this moment
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                write_atomically(own, content)
                own.replace(self.path / name)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):  # somebody else's is read alone
                    raise
