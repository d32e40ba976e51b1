"""The boundary: an error of a library becomes a line about the file, one of ours passes, and so does what is no error
of the file.
"""

import json

import pytest

from saap_jax.errors import UnreadableFileError, parse_json, read_lines, read_object, reading, shown


@pytest.mark.parametrize("error", [KeyError("a"), ValueError("no\nheader"), RecursionError(), OSError(5, "broken")])
def test_errors_of_libraries_name_the_file(error):
    with (
        pytest.raises(UnreadableFileError, match=r"^f: expected a thing, which") as caught,
        reading("f", "a thing"),
    ):
        raise error
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a.bin: shape [1]"),
        FileNotFoundError("gone"),
        MemoryError(),
        KeyboardInterrupt(),
        UnreadableFileError("b"),
    ],
)
def test_others_pass(error):
    with pytest.raises(type(error)) as caught, reading("a.bin", "a thing"):
        raise error
    assert caught.value is error


def test_messages_stay_short():
    value = {"key" * 1000: [["x" * 1000] * 1000] * 1000, "number": 10**4000}
    assert len(shown(value)) <= 200
    assert shown({"a": 1}) == "{'a': 1}"


REFUSED = {
    "no JSON": (b'{"a": }', "Expecting value"),
    "nothing": (b"", "Expecting value"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "utf-8"),
    "a doubled key": (b'[{"a": 1, "b": 2, "a": 1}]', "'a' comes twice"),
    "NaN": (b'{"a": NaN}', "NaN"),
    "half a surrogate pair": (b'{"\\uDC00": 1}', "surrogates"),
    "deep nesting": (b"[" * 100_000 + b"]" * 100_000, "RecursionError"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case):
    data, reason = REFUSED[case]
    with pytest.raises(ValueError, match=reason) as error:
        parse_json(data, "here.json")
    message = str(error.value)
    assert message.startswith("here.json: expected JSON")
    assert "\n" not in message
    assert len(message) < 300


@pytest.mark.parametrize("value", [{"a": [1, 2.5, "text", None], "b": {"a": 1}}, 10**30, "\U0001f600 \ufffe"])
def test_other_values_come_back(value):
    assert parse_json(json.dumps(value).encode(), "here") == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode(), "here") == value


def test_files(tmp_path):
    path = tmp_path / "value.json"
    path.write_text(' {"a": 1}')
    assert read_object(path) == {"a": 1}
    with pytest.raises(FileNotFoundError, match="expected a file"):
        read_object(tmp_path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="expected a JSON object, got list"):
        read_object(path)


def test_lines_have_a_limit(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"one\n\nthree")
    assert list(read_lines(path, limit=5)) == [(1, b"one\n"), (2, b"\n"), (3, b"three")]
    with pytest.raises(ValueError, match=r"lines\.jsonl: line 3: expected at most 4 bytes"):
        list(read_lines(path, limit=4))
