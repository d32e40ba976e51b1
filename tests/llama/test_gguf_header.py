"""The header of a GGUF file: what the package `gguf` reads, and refused wherever a number contradicts another."""

import struct
import tracemalloc

import gguf
import numpy as np
import pytest

from saap_jax.llama.files.gguf_header import open_header

TENSORS = {"a.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "b.weight": np.full((2, 32), 127, np.float32)}
U32, STRING, BOOL, ARRAY = 4, 8, 7, 9


def tiny(path):
    """Write a file with values of every kind that models have, and two tensors, the second of them quantised."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("general.alignment", 32)
    writer.add_uint32("count", 7)
    writer.add_float32("rate", 0.5)
    writer.add_bool("flag", True)
    writer.add_array("texts", ["one", "zwei", "drei ü"])
    writer.add_array("numbers", [1, -2, 3])
    for name, values in TENSORS.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if name == "b.weight" else None
        writer.add_tensor(name, values if kind is None else gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_reads_what_the_package_reads(tmp_path):
    path = tiny(tmp_path / "x.gguf")
    ours, theirs = open_header(path), gguf.GGUFReader(path)
    fields = {key: field for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.fields == {key: field.contents() for key, field in fields.items()}
    assert {k: entry.types for k, entry in ours.entries.items()} == {k: tuple(f.types[:2]) for k, f in fields.items()}
    assert list(ours.tensors) == list(TENSORS)
    for tensor in theirs.tensors:
        assert ours.tensors[tensor.name].start == tensor.data_offset
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(ours.read(tensor.name), expected)
        np.testing.assert_array_equal(expected, TENSORS[tensor.name])


def counts(tensors=None, entries=None, version=3):
    """Change the numbers that the file begins with."""

    def change(content):
        old = struct.unpack_from("<QQ", content, 8)
        new = [was if given is None else given for was, given in zip(old, (tensors, entries), strict=True)]
        return b"GGUF" + struct.pack("<IQQ", version, *new) + content[24:]

    return change


def behind(key, skip, layout, *values):
    """Write numbers `skip` bytes behind a key or the name of a tensor."""

    def change(content):
        place = content.index(struct.pack("<Q", len(key)) + key) + 8 + len(key) + skip
        assert content.count(struct.pack("<Q", len(key)) + key) == 1
        data = struct.pack(f"<{layout}", *values)
        return content[:place] + data + content[place + len(data) :]

    return change


def replaced(old, new):
    """Write other bytes of the same length."""
    assert len(old) == len(new)

    def change(content):
        assert content.count(old) == 1
        return content.replace(old, new)

    return change


A, B = b"a.weight", b"b.weight"
DIMS, SHAPE, KIND, OFFSET = 0, 4, 20, 24  # behind the name of a tensor with two axes

REFUSED = {
    "magic": (replaced(b"GGUF", b"GGML"), "begins with b'GGML'"),
    "version 1": (counts(version=1), "version 1, expected 2 or 3"),
    "version 4": (counts(version=4), "version 4, expected 2 or 3"),
    "big-endian": (counts(version=3 << 24), "big-endian"),
    "a tensor more": (counts(tensors=3), "tensor"),
    "a tensor less": (counts(tensors=1), "behind the last tensor"),
    "no tensors": (counts(tensors=0), "behind the last tensor"),
    "2^63 tensors": (counts(tensors=2**63), "expected at most 65,536"),
    "2^32 tensors": (counts(tensors=2**32), "expected at most 65,536"),
    "2^64 - 1 entries": (counts(entries=2**64 - 1), "expected at most 65,536"),
    "an entry more": (counts(entries=8), "the name of a tensor of"),
    "an entry less": (counts(entries=6), "name of a tensor|axes|type"),
    "a key of 2^63 bytes": (
        replaced(struct.pack("<Q", 5) + b"count", struct.pack("<Q", 2**63) + b"count"),
        "a key of 9,223,372,036,854,775,808 bytes",
    ),
    "a key twice": (replaced(b"count", b"texts"), "key 'texts' comes twice"),
    "a key that is no UTF-8": (replaced(b"count", b"coun\xff"), "a key that is no UTF-8"),
    "a text that is no UTF-8": (replaced(b"zwei", b"zwe\xff"), "'texts': a text that is no UTF-8"),
    "an unknown type": (behind(b"count", 0, "I", 99), "value of 'count' has type 99"),
    "a longer type": (behind(b"count", 0, "I", 10), "."),
    "a text of 2^62 bytes": (behind(b"texts", 16, "Q", 2**62), "a text of 4,611,686,018,427,387,904 bytes"),
    "a text of 256 bytes": (behind(b"texts", 16, "Q", 256), "."),
    "an array of 2^40": (behind(b"texts", 8, "Q", 2**40), "array of 1,099,511,627,776 items"),
    "an array of 2^64 - 1 numbers": (behind(b"numbers", 8, "Q", 2**64 - 1), "items, expected at most"),
    "an array of 2^20 numbers": (behind(b"numbers", 8, "Q", 2**20), "bytes expected at"),
    "an array of arrays": (behind(b"texts", 4, "I", ARRAY), "array of arrays"),
    "an array of unknown items": (behind(b"texts", 4, "I", 77), "items of 'texts' has type 77"),
    "a byte as a flag": (behind(b"flag", 4, "B", 2), "a byte 2 as a BOOL"),
    "alignment 0": (behind(b"general.alignment", 4, "I", 0), "general.alignment = 0"),
    "alignment 24": (behind(b"general.alignment", 4, "I", 24), "general.alignment = 24"),
    "alignment 2^31": (behind(b"general.alignment", 4, "I", 2**31), "ends at"),
    "alignment as INT32": (behind(b"general.alignment", 0, "I", 5), "power of two as UINT32"),
    "a tensor twice": (replaced(struct.pack("<Q", 8) + B, struct.pack("<Q", 8) + A), "tensor 'a.weight' comes twice"),
    "a name of 2^63 bytes": (replaced(struct.pack("<Q", 8) + B, struct.pack("<Q", 2**63) + B), "name of a tensor of"),
    "no axes": (behind(A, DIMS, "I", 0), "has 0 axes"),
    "five axes": (behind(A, DIMS, "I", 5), "has 5 axes"),
    "2^32 - 1 axes": (behind(A, DIMS, "I", 2**32 - 1), "has 4294967295 axes"),
    "an unknown kind": (behind(A, KIND, "I", 99), "tensor 'a.weight' has type 99"),
    "another kind": (behind(A, KIND, "I", 1), "'b.weight' at offset 64, expected 32"),
    "rows of no whole blocks": (behind(B, SHAPE, "QQ", 31, 2), "rows of 31, expected a multiple of 32"),
    "more rows": (behind(A, SHAPE, "QQ", 4, 5), "'b.weight' at offset 64, expected 96"),
    "2^60 rows": (behind(B, SHAPE, "QQ", 32, 2**60), "ends at"),
    "sizes that wrap": (behind(B, SHAPE, "QQ", 2**63, 2**63), "ends at"),
    "an overlap": (behind(B, OFFSET, "Q", 32), "'b.weight' at offset 32, expected 64"),
    "the same place": (behind(B, OFFSET, "Q", 0), "'b.weight' at offset 0, expected 64"),
    "an offset that wraps": (behind(B, OFFSET, "Q", 2**64 - 32), "expected 64"),
    "an offset behind the end": (behind(B, OFFSET, "Q", 2**20), "expected 64"),
    "an offset that is not aligned": (behind(B, OFFSET, "Q", 65), "expected 64"),
    "a gap before the first": (behind(A, OFFSET, "Q", 32), "'a.weight' at offset 32, expected 0"),
    "a byte less": (lambda content: content[:-33], "'b.weight' of 68 bytes ends at"),
    "bytes behind the end": (lambda content: content + bytes(32), "32 bytes behind the last tensor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_and_little_memory(tmp_path, case):
    change, reason = REFUSED[case]
    path = tiny(tmp_path / "x.gguf")
    path.write_bytes(change(path.read_bytes()))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=reason) as error:
            open_header(path)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()
    message = str(error.value)
    assert message.startswith(f"{path}: not a GGUF file, or truncated or corrupt (")
    assert "\n" not in message


def test_any_cut_is_refused(tmp_path):
    path = tiny(tmp_path / "x.gguf")
    content = path.read_bytes()
    header = open_header(path)
    end = max(tensor.start + tensor.bytes for tensor in header.tensors.values())
    for size in range(end):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match="not a GGUF file, or truncated or corrupt"):
            open_header(path)
    path.write_bytes(content[:end])  # without the padding behind the last tensor, which some writers leave out
    assert open_header(path).fields == header.fields
