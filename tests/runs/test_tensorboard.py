"""The event file, read back by a reader of the format that is written here and shares nothing with the writer."""

import math
import struct
from collections import Counter
from pathlib import Path

import pytest

from saap_jax.runs.directory import RunDirectory
from saap_jax.runs.tensorboard import FILE, Scalar, scalars, write_scalars


def crc32c(data: bytes) -> int:
    """Return the Castagnoli checksum, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def checked(data: bytes, stored: bytes) -> bytes:
    crc = crc32c(data)
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    assert stored == struct.pack("<I", masked), "checksum"
    return data


def records(content: bytes) -> list[bytes]:
    """Split a file of records: length (8 bytes), its checksum, data, its checksum."""
    found = []
    while content:
        (length,) = struct.unpack("<Q", checked(content[:8], content[8:12]))
        found.append(checked(content[12 : 12 + length], content[12 + length : 16 + length]))
        content = content[16 + length :]
    return found


def message(data: bytes) -> dict[int, bytes | int]:
    """Return the fields of a protocol buffer message by number; one of each, numbers of fixed width as bytes."""

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = data[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value, at

    fields: dict[int, bytes | int] = {}
    at = 0
    while at < len(data):
        key, at = varint(at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            fields[number], at = varint(at)
            continue
        length, at = (8, at) if kind == 1 else (4, at) if kind == 5 else varint(at)
        fields[number], at = data[at : at + length], at + length
    return fields


def read(directory: Path) -> list[Scalar]:
    """Return the scalars of all event files of a directory."""
    found = []
    for path in sorted(directory.iterdir()):
        assert "tfevents" in path.name
        first, *events = map(message, records(path.read_bytes()))
        assert first[3] == b"brain.Event:2"
        for event in events:
            value = message(message(event[5])[1])
            (number,) = struct.unpack("<f", value[2])
            found.append(Scalar(value[1].decode(), event.get(2, 0), number))
    return found


@pytest.fixture
def small(tmp_path) -> RunDirectory:
    run = RunDirectory.open(tmp_path / "small", {"seed": 0})
    with run.stage("score") as stage:
        stage.tokens = 64
    run.append({"candidate": "wanda@0.2", "ppl": {"ppl@16 builtin:reference": 12.5, "ppl@16 b": math.inf}})
    run.append({"candidate": "random@0.2", "ppl": {"ppl@16 builtin:reference": 20.25, "ppl@16 b": 1e300}})
    return run


def test_holds_stages_and_candidates(small):
    path = write_scalars(small)
    assert path == small.path / "tensorboard" / FILE
    found = read(path.parent)
    (stage,) = small.record["stages"]
    for field in ("seconds", "compile_seconds", "peak_host_gib", "tokens_per_second"):
        (point,) = [point for point in found if point.tag == f"{field}/score"]
        assert point.step == 0
        assert point.value == pytest.approx(stage[field], rel=1e-6)
    assert [point for point in found if point.tag.startswith("candidates/")] == [
        Scalar("candidates/ppl@16 builtin:reference", 1, 12.5),
        Scalar("candidates/ppl@16 b", 1, math.inf),
        Scalar("candidates/ppl@16 builtin:reference", 2, 20.25),
        Scalar("candidates/ppl@16 b", 2, math.inf),  # beyond single precision
    ]


def test_leaves_out_what_was_not_recorded(small):
    """A device without memory statistics, or a stage of an older version, has no point, rather than a zero."""
    with small.stage("load"):
        pass
    small.update(stages=[*small.record["stages"], {"name": "old", "seconds": 1.0, "peak_host_gib": 0.5, "times": 1}])
    tags = {point.tag for point in read(write_scalars(small).parent)}
    assert {"seconds/load", "seconds/old", "peak_host_gib/old", "tokens/score"} <= tags
    assert not tags & {"tokens/load", "tokens_per_second/load", "compiles/old"}


def test_every_point_is_there_once_however_often_it_is_written(small):
    for _ in range(2):
        directory = write_scalars(small).parent
    with small.stage("score") as stage:  # taken up again
        stage.tokens = 64
    small.append({"candidate": "wanda@0.2", "ppl": {"ppl@16 builtin:reference": 13.0}})
    again = RunDirectory.open(small.path, {"seed": 0})
    found = read(write_scalars(again).parent)
    assert set(Counter((point.tag, point.step) for point in found).values()) == {1}
    assert Scalar("candidates/ppl@16 builtin:reference", 1, 13.0) in found
    assert Scalar("tokens/score", 0, 128.0) in found
    assert [path.name for path in directory.iterdir()] == [FILE]
    (directory / "events.out.tfevents.other").write_bytes((directory / FILE).read_bytes())
    assert set(Counter(point[:2] for point in read(directory)).values()) == {2}, "the reader sees duplicates"


def test_an_overwritten_run_leaves_nothing(small):
    write_scalars(small)
    anew = RunDirectory.open(small.path, {"seed": 1}, overwrite=True).begin()
    assert not (small.path / "tensorboard").exists()
    anew.append({"candidate": "only@0.2", "ppl": {"x": 2.0}})
    assert read(write_scalars(anew).parent) == [Scalar("candidates/x", 1, 2.0)]


def test_what_a_kill_left_is_replaced(small):
    directory = write_scalars(small).parent
    (directory / FILE).rename(directory / ".tensorboard.partial")
    assert len(read(write_scalars(small).parent)) == len(list(scalars(small.record, small.candidates())))


def test_the_reader_notices_a_changed_byte(small):
    path = write_scalars(small)
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)
    with pytest.raises(AssertionError, match="checksum"):
        read(path.parent)


def test_the_checksum_is_the_published_one():
    assert crc32c(b"123456789") == 0xE3069283
