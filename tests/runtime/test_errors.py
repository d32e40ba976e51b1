"""The boundary: an error of a library becomes a line about the file, one of ours passes, and so does what is no error
of the file.
"""

import pytest

from saap_jax.runtime.errors import UnreadableFileError, reading, shown


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
