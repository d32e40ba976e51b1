"""Read the header of a GGUF file, and refuse it unless every number in it agrees with the others and the file's length.

The reader of the package `gguf` trusts what a file says: offsets that overlap or wrap, counts beyond the file. Here
tensors have to lie one behind the other without gaps, as `llama.cpp` wants them too, and end where the file ends.
Source: the specification of GGUF, versions 2 and 3, little-endian.
"""

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from saap_jax.formats.json_files import shown

ITEMS = 2**22
"""Array items of all metadata together; three arrays of a vocabulary of a million tokens are fewer."""

METADATA = 2**28
"""Bytes of a header, 256 MiB."""

ENTRIES = 2**16
"""Keys of the metadata, and tensors."""

KEY, NAME, DIMENSIONS = 65_535, 63, 4
"""Bytes of a key, bytes of a tensor's name, and axes of a tensor, at most."""

_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "B",
}


class Entry(NamedTuple):
    """A value of the metadata and its type; of an array, its type and that of its items."""

    value: Any
    types: tuple[GGUFValueType, ...]


class GgufTensor(NamedTuple):
    """Where a tensor lies: `shape` begins with the outermost axis, `start` counts from the beginning of the file."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    bytes: int


class GgufFile(NamedTuple):
    """An opened GGUF file, whose header was checked."""

    path: Path
    entries: dict[str, Entry]
    tensors: dict[str, GgufTensor]
    data: np.ndarray
    """The whole file as bytes, mapped into memory."""

    @property
    def fields(self) -> dict[str, Any]:
        """The values of the metadata."""
        return {key: entry.value for key, entry in self.entries.items()}

    def read(self, name: str) -> np.ndarray:
        """Return a tensor in floats.

        Raises:
            ValueError: of a type that cannot be converted.
        """
        tensor = self.tensors[name]
        data = self.data[tensor.start : tensor.start + tensor.bytes]
        width = _row_bytes(tensor.kind, tensor.shape[-1])
        try:
            with np.errstate(all="ignore"):  # values that are not finite are refused by who knows the parameter
                return gguf.quants.dequantize(data.reshape(*tensor.shape[:-1], width), tensor.kind)
        except NotImplementedError:
            raise ValueError(
                f"{self.path}: {name} has quantisation type {tensor.kind.name}, which cannot be dequantised"
            ) from None


class _Cursor:
    """Takes pieces of a header from a file's bytes, none of them beyond its end."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data.data
        self.place = 0

    def take(self, size: int) -> memoryview:
        left = len(self.data) - self.place
        if size > left:
            raise ValueError(f"{size:,} bytes expected at {self.place:,}, where {left:,} are left")
        self.place += size
        if self.place > METADATA:
            raise ValueError(f"metadata of {self.place:,} bytes or more, expected at most {METADATA:,}")
        return self.data[self.place - size : self.place]

    def number(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}")))[0]

    def text(self, what: str, limit: int = METADATA) -> str:
        if (size := self.number("Q")) > limit:
            raise ValueError(f"{what} of {size:,} bytes, expected at most {limit:,}")
        try:
            return str(self.take(size), "utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{what} that is no UTF-8, before byte {self.place:,}") from None


def open_header(path: Path) -> GgufFile:
    """Open a GGUF file.

    Raises:
        ValueError: it is none, or its header contradicts itself or the file's length; the message begins with the path.
    """
    try:
        if path.stat().st_size < 4:
            raise ValueError("fewer than 4 bytes")
        data = np.memmap(path, mode="r")
        entries, tensors = _parse(_Cursor(data))
    except (ValueError, struct.error) as error:
        raise ValueError(f"{path}: not a GGUF file, or truncated or corrupt ({error}); fetch it again") from None
    return GgufFile(path, entries, tensors, np.asarray(data))


def _parse(cursor: _Cursor) -> tuple[dict[str, Entry], dict[str, GgufTensor]]:
    if (magic := bytes(cursor.take(4))) != b"GGUF":
        raise ValueError(f"it begins with {magic!r}, expected b'GGUF'")
    if (version := cursor.number("I")) not in (2, 3):
        order = ", which is that of a big-endian file" if version and not version & 0xFFFF else ""
        raise ValueError(f"version {version}{order}, expected 2 or 3, little-endian")
    tensor_count, entry_count = cursor.number("Q"), cursor.number("Q")
    for what, count in (("tensors", tensor_count), ("metadata entries", entry_count)):
        if count > ENTRIES:
            raise ValueError(f"{count:,} {what}, expected at most {ENTRIES:,}")
    entries = _entries(cursor, entry_count)
    alignment = entries.get("general.alignment", Entry(32, (GGUFValueType.UINT32,)))
    if alignment.types != (GGUFValueType.UINT32,) or alignment.value.bit_count() != 1:
        raise ValueError(f"general.alignment = {shown(alignment.value)}, expected a power of two as UINT32")
    return entries, _tensors(cursor, tensor_count, alignment.value)


def _entries(cursor: _Cursor, count: int) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    left = ITEMS
    for _ in range(count):
        key = cursor.text("a key", KEY)
        if key in entries:
            raise ValueError(f"key {shown(key)} comes twice")
        kind = _kind(GGUFValueType, cursor.number("I"), f"value of {shown(key)}")
        if kind != GGUFValueType.ARRAY:
            entries[key] = Entry(_values(cursor, kind, 1, key)[0], (kind,))
            continue
        item, size = _kind(GGUFValueType, cursor.number("I"), f"items of {shown(key)}"), cursor.number("Q")
        if item == GGUFValueType.ARRAY:
            raise ValueError(f"{shown(key)} is an array of arrays, expected items that are none")
        left -= size
        if left < 0:
            raise ValueError(f"{shown(key)} is an array of {size:,} items, expected at most {ITEMS:,} in all arrays")
        entries[key] = Entry(_values(cursor, item, size, key), (kind, item))
    return entries


def _values(cursor: _Cursor, kind: GGUFValueType, count: int, key: str) -> list[Any]:
    if kind == GGUFValueType.STRING:
        return [cursor.text(f"{shown(key)}: a text") for _ in range(count)]
    layout = f"<{count}{_SCALARS[kind]}"
    values = list(struct.unpack(layout, cursor.take(struct.calcsize(layout))))
    if kind != GGUFValueType.BOOL:
        return values
    if any(value > 1 for value in values):
        raise ValueError(f"{shown(key)}: a byte {max(values)} as a BOOL, expected 0 or 1")
    return [bool(value) for value in values]


def _tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, GgufTensor]:
    found: dict[str, tuple[GGMLQuantizationType, tuple[int, ...], int]] = {}
    for _ in range(count):
        name = cursor.text("the name of a tensor", NAME)
        if name in found:
            raise ValueError(f"tensor {shown(name)} comes twice")
        if not 1 <= (axes := cursor.number("I")) <= DIMENSIONS:
            raise ValueError(f"tensor {shown(name)} has {axes} axes, expected 1 to {DIMENSIONS}")
        sizes = tuple(cursor.number("Q") for _ in range(axes))
        kind = _kind(GGMLQuantizationType, cursor.number("I"), f"tensor {shown(name)}")
        block = gguf.GGML_QUANT_SIZES[kind][0]
        if sizes[0] % block:
            raise ValueError(
                f"tensor {shown(name)} has rows of {sizes[0]}, expected a multiple of {block}: {kind.name}"
            )
        found[name] = (kind, sizes[::-1], cursor.number("Q"))
    start, place, end = _aligned(cursor.place, alignment), 0, 0
    tensors = {}
    for name, (kind, shape, offset) in found.items():
        if offset != place:
            raise ValueError(f"tensor {shown(name)} at offset {offset:,}, expected {place:,}, behind the one before it")
        size = math.prod(shape[:-1]) * _row_bytes(kind, shape[-1])
        tensors[name] = GgufTensor(name, kind, shape, start + offset, size)
        end, place = start + offset + size, _aligned(offset + size, alignment)
        if end > len(cursor.data):
            raise ValueError(
                f"tensor {shown(name)} of {size:,} bytes ends at {end:,}, where the file has {len(cursor.data):,}"
            )
    if len(cursor.data) > max(start + place, cursor.place):
        raise ValueError(f"{len(cursor.data) - start - place:,} bytes behind the last tensor, expected none")
    return tensors


def _kind(kinds: Callable[[int], Any], number: int, what: str) -> Any:
    try:
        return kinds(number)
    except ValueError:
        raise ValueError(f"{what} has type {number}, which GGUF does not have") from None


def _row_bytes(kind: GGMLQuantizationType, size: int) -> int:
    block, width = gguf.GGML_QUANT_SIZES[kind]
    return size // block * width


def _aligned(place: int, alignment: int) -> int:
    return -(-place // alignment) * alignment
