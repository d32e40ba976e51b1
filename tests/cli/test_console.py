"""What is printed: whole words and no control characters; progress as plain lines where no terminal is."""

import io
import re
import time

import pytest

from saap_jax.cli import console as terminal
from saap_jax.cli.console import show_blocks
from saap_jax.report.blocks import text_table
from saap_jax.runtime.progress import within

HOSTILE = "a\x1b[31m\x07\x9b2Jb\u202ec\x7f\ud800\r"


def rendered(width: int, *blocks, monkeypatch) -> str:
    console = terminal.Terminal(width=width, file=io.StringIO())
    monkeypatch.setattr(terminal, "console", console)
    with console.capture() as caught:
        show_blocks(*blocks)
    return caught.get()


@pytest.mark.parametrize("width", [20, 40, 100])
def test_a_table_loses_no_letter_in_a_narrow_terminal(width, monkeypatch):
    cells = [("a" * 60, "1.25"), ("some words of a row", "[bold]x[/y]")]
    text = rendered(width, text_table("a title of some words", ("name", "value"), cells), monkeypatch=monkeypatch)
    assert max(map(len, text.splitlines())) <= width
    letters = sorted("".join(cell for row in cells for cell in row).replace(" ", ""))
    assert not [each for each in set(letters) if text.count(each) < letters.count(each)]


def test_nothing_is_folded_in_a_pipe(monkeypatch):
    monkeypatch.delenv("COLUMNS")
    assert terminal.Terminal(file=io.StringIO()).width == terminal.PIPED


def test_control_characters_are_written_out(monkeypatch):
    for printed in (
        rendered(200, text_table(HOSTILE, [], [("x", "y")]), monkeypatch=monkeypatch),
        rendered(200, text_table("", [], [(HOSTILE, "x")]), monkeypatch=monkeypatch),
        terminal.visible(HOSTILE),
    ):
        assert r"a\x1b[31m" in printed
        assert not any(character in printed for character in "\x1b\x07\x9b\u202e\x7f\ud800\r")
    assert terminal.visible("é\t中文\n≈ עברית") == "é\t中文\n≈ עברית"


def test_paths_are_never_broken(capsys, monkeypatch):
    monkeypatch.setattr(terminal.console, "width", 40)
    terminal.show_paths(report="runs/a/report.html", model="a b/c")
    terminal.show_paths(report="x" * 60, model="a b/c")
    assert capsys.readouterr().out.splitlines() == [
        "report: runs/a/report.html", "model: a b/c", f"report: {'x' * 60}", "model: a b/c",
    ]  # fmt: skip


@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_a_model_writes_is_raw_in_a_pipe_only(capsys, monkeypatch, is_terminal):
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal, raising=False)
    terminal.write("a\x1b]0;x\x07\n")
    assert capsys.readouterr().out == ("a\\x1b]0;x\\x07\n" if is_terminal else "a\x1b]0;x\x07\n")


def test_progress_is_a_line_a_stage_and_one_every_interval(monkeypatch):
    monkeypatch.setattr(terminal, "INTERVAL", 0.05)
    file = io.StringIO()
    monkeypatch.setattr(terminal, "progress_console", terminal.Terminal(file=file))
    with terminal.progress() as track:
        for _ in track("evaluate\x1b", range(2), 2):
            for _ in within("windows", range(3)):
                time.sleep(0.06)
        track.note("not a milestone")
        track.note("a milestone", milestone=True)
    first, *told, done, note = file.getvalue().splitlines()
    assert first == "evaluate\\x1b: 2 steps"
    assert re.fullmatch(r"windows: 1 of 3 after 0:00:00, about 0:00:00 left", told[0])
    assert all(re.fullmatch(r"(windows: \d of 3|evaluate\\x1b: 1 of 2) after .* left", line) for line in told)
    assert re.fullmatch(r"evaluate\\x1b: done in \d\.\d s", done)
    assert note == "a milestone"
