"""Accidents that happen to files of users: a command says in one line which file is damaged, and writes nothing."""

import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from saap_jax.cli.main import main
from tests.accidents.conftest import RUNS, SCORED
from tests.accidents.harm import (
    a_directory,
    a_list,
    appended,
    doubled_key,
    empty,
    field,
    missing,
    missing_array,
    not_a_number,
    not_utf8,
    torn_line,
    truncated,
    wrong_shape,
    zeros,
)


class Kind(NamedTuple):
    """A kind of file, the command that reads it, and what may happen to it."""

    file: str
    words: list[str]
    accidents: tuple[Callable[[Path], None], ...]
    """Of kinds that need no run, the first one is of the default suite."""

    @property
    def needs(self) -> str:
        """Name the fixture that makes its files."""
        return "made" if re.search("runs/|mine|small", f"{self.file} {self.words}") else "files"


def evaluated(model: str, *sources: str) -> list[str]:
    """Judge a model on a text."""
    sizes = ["--windows", "3", "--length", "8", "--batch-size", "2", "--json", "result.json"]
    return ["evaluate", model, "--sources", *(sources or ["text:text.txt"]), *sizes]


def reported(run: str) -> list[str]:
    """Write the page of a run."""
    return ["report", run, "--out", "page.html"]


AB = ["ab", "runs/c:wanda@0.3", "runs/c:dense", "--limits", "limits.toml"]
PRUNE = ["prune", "--model.name", "tiny", "--from-run", "runs/s", "--method", "wanda", "--ratio", "0.3", "--out", "cut"]
EXPORT = ["export", "runs/c/best", "out", "--format", "ragged"]
DISCOVER = ["discover", "traced.py:cut"]
RESCORE = ["score", *SCORED, "--estimators", "wanda", "--from-run", "runs/s", "--name", "new"]

KINDS = (
    Kind(
        "tiny/config.json", evaluated("tiny"),
        (truncated, missing, a_directory, doubled_key, not_utf8, field("hidden_size", "16"), field("rms_norm_eps", [])),
    ),
    Kind("tiny/model.safetensors", evaluated("tiny"), (wrong_shape, truncated, missing_array, not_a_number, zeros)),
    Kind(
        "sharded/model.safetensors.index.json", evaluated("sharded"),
        (a_list, truncated, field("weight_map", ["a"]), field("weight_map", {"model.norm.weight": 3})),
    ),
    Kind("sharded/model-00002-of-00002.safetensors", evaluated("sharded"), (missing, a_directory, truncated)),
    Kind("tiny/tokenizer.json", evaluated("tiny"), (truncated, missing, not_utf8, field("model", 3))),
    Kind("tiny.gguf", evaluated("tiny.gguf"), (truncated, empty, zeros)),
    Kind("text.txt", evaluated("tiny"), (not_utf8, empty, a_directory)),
    Kind("lines.jsonl", evaluated("tiny", "jsonl:lines.jsonl#text"), (torn_line, field("text", 3), doubled_key)),
    Kind("tasks.jsonl", [*evaluated("tiny"), "--tasks", "tasks.jsonl"], (empty, torn_line, field("gold", "1"))),
    Kind("limits.toml", AB, (appended("surprise = 1\n"), torn_line, not_utf8, a_directory)),
    Kind("mine.py", ["score", "mine.py"], (truncated, empty, not_utf8, a_directory, appended("1 / 0\n"))),
    Kind(
        "runs/c/run.json", reported("runs/c"),
        (truncated, a_list, field("stages", 3), field("dense", []), field("schema", 99)),
    ),
    Kind("runs/c/metrics.jsonl", reported("runs/c"), (a_directory, field("ppl", 3))),
    Kind(
        "runs/c/run.json", AB,
        (torn_line, field("dense.losses", 3), field("metrics", 3), field("config", 3), field("dense.parameters", [])),
    ),
    Kind("runs/c/metrics.jsonl", AB, (zeros, field("losses", 3), missing)),
    Kind("runs/f/fidelity.json", reported("runs/f"), (truncated, field("0.value", "high"))),
    Kind("runs/s/run.json", RESCORE, (truncated, empty, field("scenarios", 3))),
    Kind("runs/s/run.json", PRUNE, (field("config.calibration", 3), field("config", 3), field("seeds", 3))),
    Kind("runs/s/scores.npz", reported("runs/s"), (truncated, zeros, missing_array, a_directory)),
    Kind("runs/s/statistics/other.safetensors", RESCORE, (truncated, wrong_shape, missing_array, not_a_number)),
    Kind(
        "runs/c/best/saap.json", EXPORT, (truncated, field("base", {}), field("steps", 3), field("steps.0.kind", 3)),
    ),
    Kind(
        "small/pruned.json", DISCOVER,
        (truncated, field("shapes", 3), field("keep", 3), field("format", 9), field("program", 3), missing),
    ),
    Kind("small/params.safetensors", DISCOVER, (truncated, wrong_shape, missing_array, missing)),
)  # fmt: skip


def contents(place: Path) -> dict[str, str]:
    """Tell what a directory holds: a digest of each file by path."""
    return {
        str(path.relative_to(place)): hashlib.sha1(path.read_bytes()).hexdigest() if path.is_file() else "directory"
        for path in place.rglob("*")
    }


@pytest.fixture
def place(kind, request, tmp_path, monkeypatch) -> Path:
    """A copy of what a kind needs, as the current directory."""
    copy = tmp_path / "place"
    shutil.copytree(request.getfixturevalue(kind.needs), copy)
    monkeypatch.chdir(copy)
    return copy


def cases() -> list:
    """List each accident of each kind; one each of those that need no run is of the default suite."""
    return [
        pytest.param(
            kind,
            accident,
            id=f"{kind.file}-{kind.words[0]}-{accident.__name__}",
            marks=() if accident is kind.accidents[0] and kind.needs == "files" else pytest.mark.slow,
        )
        for kind in KINDS
        for accident in kind.accidents
    ]


@pytest.mark.parametrize(("kind", "accident"), cases())
def test_an_accident_is_said_in_one_line(place, kind, accident, capsys):
    accident(place / kind.file)
    before = contents(place)
    capsys.readouterr()
    code = main(kind.words)
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith("saap: "), error
    assert error.count("\n") == 1, error
    file = Path(kind.file)
    assert file.name in error or f"{file.parent}:" in error, error  # what a model lacks may be in any file of it
    assert "nobody foresaw" not in error
    assert contents(place) == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.file}-{kind.words[0]}")
def test_the_same_command_reads_the_whole_file(place, kind, capsys):
    assert main(kind.words) == 0, capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS[-1:], ids=["cache"])
def test_what_is_cached_is_made_again(place, kind):
    """The cache holds scores, keep-sets and losses by digests: no user's files, so nothing has to be said."""
    rows = lines_of(place / "runs/c/metrics.jsonl")
    cached = list((place / "runs/.cache").glob("*.*"))
    assert len(cached) > 2
    for path, accident in zip(cached, itertools.cycle((truncated, zeros, empty))):
        accident(path)
    assert main([*RUNS[0][:-1], "again"]) == 0
    assert lines_of(place / "runs/again/metrics.jsonl") == rows


def lines_of(path: Path) -> list[dict[str, object]]:
    """Read rows without what depends on the clock."""
    return [json.loads(line) | {"seconds": 0} for line in path.read_text().splitlines()]
