"""A newcomer's hour: the commands of docs/hour.md, one after the other, print what the page says."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.docs.test_site import refusal

PAGE = (Path(__file__).parents[2] / "docs" / "hour.md").read_text()
BLOCK = re.compile(r"^```(console|python)\n(.*?)^```$", re.M | re.S)
COMMAND = re.compile(r"^\$ ((?:.*\\\n)*.*)\n((?:(?!\$ ).*\n)*)", re.M)


class Command(NamedTuple):
    """What is typed, what has to be printed, and the exit code."""

    words: str
    lines: str
    code: int


def steps(page: str) -> list[tuple[str, str] | Command]:
    """Return the files (name, text) and the commands of a page, in its order.

    A Python block is the file that its first line names. Of a command, a last line `[2]` is the exit code.
    """
    found: list[tuple[str, str] | Command] = []
    for kind, text in BLOCK.findall(page):
        if kind == "python":
            found.append((re.match(r"# (\S+)\n", text)[1], text))  # type: ignore[index]
        for words, lines in COMMAND.findall(text) if kind == "console" else ():
            lines, _, code = re.fullmatch(r"((?:.*\n)*?)(\[(\d+)\]\n)?", lines).groups()  # type: ignore[union-attr]
            found.append(Command(words, lines, int(code or 0)))
    return found


def plain(text: str) -> list[str]:
    """Return lines that are not empty, without the widths of columns."""
    lines = (" ".join(re.sub(r"([─━═])\1+", r"\1", line).split()) for line in text.split("\n"))
    return [line for line in lines if line]


def pattern(lines: str) -> str:
    """Return the pattern of shown lines: `…` is anything within a line, a line `...` any lines."""
    of = (r"(?:.*\n)*?" if line == "..." else re.escape(line).replace("…", ".*?") + r"\n" for line in plain(lines))
    return "^" + "".join(of)


def walk(page: str, place: Path) -> None:
    """Do what a page says in a directory; fail at the first command that prints or ends otherwise."""
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "XLA_FLAGS")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    for each in steps(page):
        if not isinstance(each, Command):
            (place / each[0]).write_text(each[1])
            continue
        began = time.monotonic()
        done = subprocess.run(
            ["bash", "-c", each.words], cwd=place, env=environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        printed = "".join(f"{line}\n" for line in plain(done.stdout))
        print(f"$ {each.words}\n{printed}[{done.returncode}, {time.monotonic() - began:.0f} s]", flush=True)
        assert (done.returncode, bool(re.search(pattern(each.lines), printed, re.M))) == (each.code, True), (
            f"$ {each.words}\n{printed}[{done.returncode}]\nis not\n{each.lines}[{each.code}]"
        )


@pytest.mark.hour
def test_the_hour_passes(tmp_path):
    walk(PAGE, tmp_path)


def test_the_page_has_thirty_commands_that_can_be_called(capsys):
    commands = [each for each in steps(PAGE) if isinstance(each, Command)]
    assert len(commands) >= 30
    assert all(each.lines for each in commands)
    right = [each.words.replace("\\\n", "") for each in commands if each.code == 0 and ".py" not in each.words]
    calls = [words.removeprefix("saap ") for words in right if re.match("saap [a-z]", words)]
    assert len(calls) > 20
    assert [said for call in calls if (said := refusal(call, capsys))] == []


SAMPLE = """
```python
# one.py
print("a", 1.5, "b")
print("c")
print("d")
```

```console
$ python one.py
a … b
...
d
$ python one.py; \
    exit 2
c
[2]
```
"""


@pytest.mark.parametrize(
    ("shown", "instead"),
    [
        ("a … b", "a … c"),
        ("\nd\n", "\nd\na … b\n"),
        ("...\n", ""),
        ("\nc\n[2]", "\nC\n[2]"),
        ("[2]\n", ""),
    ],
    ids=["a line", "the order", "what is between", "the last line", "the exit code"],
)
def test_a_page_that_says_something_else_fails(tmp_path, shown, instead):
    walk(SAMPLE, tmp_path)
    assert SAMPLE.count(shown) == 1
    with pytest.raises(AssertionError, match="is not"):
        walk(SAMPLE.replace(shown, instead), tmp_path)
