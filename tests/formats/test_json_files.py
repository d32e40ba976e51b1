"""Strict JSON: what is refused, in one line that begins with the place, and what is not."""

import json

import pytest

from saap_jax.formats.json_files import DEPTH, parse_json, read_json, read_lines, read_object, shown

REFUSED = {
    "no JSON": (b'{"a": }', "Expecting value"),
    "nothing": (b"", "Expecting value"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "BOM"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "no UTF-8"),
    "no UTF-8": (b'{"a": "\xff"}', "byte 0xff at 7 that is no UTF-8"),
    "a doubled key": (b'[{"a": 1, "b": 2, "a": 1}]', "'a' twice"),
    "NaN": (b'{"a": NaN}', "NaN"),
    "an infinity": (b'{"a": -Infinity}', "-Infinity"),
    "a float beyond floats": (b'{"a": 1e999}', "too large"),
    "an integer beyond floats": (b'{"a": 1' + b"0" * 400 + b"}", "too large"),
    "more digits than Python reads": (b"1" * 5000, "digits"),
    "half a surrogate pair": (b'{"a": "\\ud800"}', "surrogate"),
    "half a surrogate pair in a key": (b'{"\\udc00": 1}', "surrogate"),
    "nesting": (b"[" * (DEPTH + 1) + b"]" * (DEPTH + 1), "nested deeper"),
    "deep nesting": (b"[" * 100_000 + b"]" * 100_000, "nested deeper"),
    "deep nesting of objects": (b'{"a":' * 100_000, "nested deeper"),
    "many values": (b"[" + b"0," * 2**23 + b"0]", "at most 8,388,608 values"),
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


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2.5, "text", None, True], "b": {"a": 1}},  # the same key in another object
        10**30,  # tokenizers say so for a length without limit
        [1e300, -1e-320],
        "\U0001f600 \ufffe",  # as escapes a whole surrogate pair
        json.loads("[" * DEPTH + "1" + "]" * DEPTH),
        [[[]]] * 1000,
    ],
    ids=lambda value: shown(value)[:20],
)
def test_other_values_come_back(value):
    assert parse_json(json.dumps(value).encode(), "here") == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode(), "here") == value


def test_files_have_a_limit(tmp_path):
    path = tmp_path / "value.json"
    path.write_text(' {"a": 1}')
    assert read_json(path, limit=9) == {"a": 1}
    with pytest.raises(ValueError, match=r"value\.json: expected JSON of at most 8 bytes"):
        read_json(path, limit=8)
    with pytest.raises(FileNotFoundError, match="expected a file"):
        read_json(tmp_path)
    assert read_object(path) == {"a": 1}
    path.write_text("[1]")
    with pytest.raises(ValueError, match="expected a JSON object, got list"):
        read_object(path)


def test_lines_have_a_limit(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"one\n\nthree")
    assert list(read_lines(path, limit=5)) == [(1, b"one\n"), (2, b"\n"), (3, b"three")]
    with pytest.raises(ValueError, match=r"lines\.jsonl: line 3: expected at most 4 bytes"):
        list(read_lines(path, limit=4))


def test_messages_stay_short():
    value = {"key" * 1000: [["x" * 1000] * 1000] * 1000, "number": 10**4000}
    assert len(shown(value)) <= 200
    assert shown({"a": 1}) == "{'a': 1}"
