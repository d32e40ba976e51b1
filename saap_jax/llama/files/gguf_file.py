"""Open a GGUF file by the reader of the package `gguf`: metadata as values, tensors mapped into memory."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import GGUFValueType

from saap_jax.runtime.errors import reading


class Entry(NamedTuple):
    """A value of the metadata and its type; of an array, its type and that of its items."""

    value: Any
    types: tuple[GGUFValueType, ...]


class GgufFile(NamedTuple):
    """An opened GGUF file."""

    path: Path
    entries: dict[str, Entry]
    tensors: dict[str, gguf.ReaderTensor]

    @property
    def fields(self) -> dict[str, Any]:
        """The values of the metadata."""
        return {key: entry.value for key, entry in self.entries.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the sizes of a tensor, the outermost first."""
        return tuple(self.tensors[name].shape.tolist()[::-1])

    def read(self, name: str) -> np.ndarray:
        """Read a tensor in floats.

        Raises:
            ValueError: of a type that cannot be converted.
        """
        tensor = self.tensors[name]
        with reading(self.path, f"a type of {name} that can be converted"), np.errstate(all="ignore"):
            return gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(self.shape(name))


class _Reader(gguf.GGUFReader):
    """The package's reader on a plain array: slices of a `memmap`, one a token, take five times as long."""

    @property
    def data(self) -> np.ndarray:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._data

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        self._data = np.asarray(mapped)


def open_gguf_file(path: Path) -> GgufFile:
    """Open a GGUF file; a second time without reading its metadata again, if it has not changed.

    Raises:
        ValueError: it is none, or cut short; the message begins with the path.
    """
    stat = path.stat()
    return _open(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=2)
def _open(path: Path, *_: int) -> GgufFile:
    with reading(path, "a whole GGUF file"):
        reader = _Reader(path)
        if reader.byte_order != "I":
            raise ValueError(f"{path}: expected a little-endian GGUF file, got a big-endian one")
        entries = {
            key: Entry(field.contents(), tuple(field.types[:2]))
            for key, field in reader.fields.items()
            if not key.startswith("GGUF.")
        }
        return GgufFile(path, entries, {tensor.name: tensor for tensor in reader.tensors})
