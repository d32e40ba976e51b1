"""Runs at addresses: another machine goes on with what was sent; what dies on the way is there whole or not."""

import shutil
from pathlib import Path

import pytest

from saap_jax.cli import main
from saap_jax.runs.directory import read_run
from saap_jax.runs.mirror import mirrored
from tests.buckets import Bucket, use
from tests.cli.test_main import refused

ADDRESS = "gs://bucket/runs/one"
OLD = {"run.json": "1", "best/model": "old", "gone.npz": "old"}
NEW = {"run.json": "2", "best/model": "new", "best/config": "new"}


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "first"))
    return use(Bucket(tmp_path / "bucket"), monkeypatch)


def write(path: Path, files: dict[str, str]) -> None:
    shutil.rmtree(path, ignore_errors=True)
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)


def read(path: Path) -> dict[str, str]:
    return {str(each.relative_to(path)): each.read_text() for each in path.rglob("*") if each.is_file()}


def sent(files: dict[str, str]) -> None:
    with mirrored(ADDRESS) as mirror:
        write(mirror.path, files)
        mirror.send()


def found() -> dict[str, str]:
    with mirrored(ADDRESS) as mirror:
        return read(mirror.path)


def test_another_machine_finds_what_was_sent(bucket, tmp_path, monkeypatch):
    sent(OLD)
    sent(NEW)
    names = {name for name in bucket.names(ADDRESS) if not name.startswith(".saap-sync/")}
    assert names == set(NEW), "what was removed here is removed there"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "second"))
    assert found() == NEW
    bucket.written.clear()
    with mirrored(ADDRESS) as mirror:
        mirror.send()
    assert not bucket.written, "nothing has changed"


def test_what_was_not_sent_yet_is_kept_here_until_another_machine_sends(bucket, tmp_path, monkeypatch):
    sent(OLD)
    with mirrored(ADDRESS) as mirror:
        write(mirror.path, NEW)
    assert found() == NEW
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "second"))
    assert found() == OLD
    sent(OLD | {"more": "of the second"})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "first"))
    assert found() == OLD | {"more": "of the second"}


def test_two_that_send_are_told(bucket, tmp_path, monkeypatch):
    sent(OLD)
    with mirrored(ADDRESS) as first:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "second"))
        sent(NEW)
        write(first.path, OLD | {"more": ""})
        with pytest.raises(ValueError, match="another machine has sent it meanwhile"):
            first.send()
    assert found() == NEW


@pytest.mark.slow
@pytest.mark.parametrize("renames", range(8))
@pytest.mark.parametrize("here", ["first", "second"])
def test_a_change_that_dies_is_there_whole_or_not(renames, here, bucket, tmp_path, monkeypatch):
    """Three files are sent, the change is written, three get their names, then the state: each a change of name."""
    sent(OLD)
    bucket.renames_left = renames
    with pytest.raises(ValueError, match="the line went dead; the run is whole at|the line went dead\\); the run"):
        sent(NEW)
    bucket.renames_left = -1
    committed = renames >= 4
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / here))
    assert found() == (NEW if committed or here == "first" else OLD)
    sent(NEW | {"more": "x"})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "third"))
    assert found() == NEW | {"more": "x"}


def test_a_fetch_that_dies_leaves_what_was_here(bucket, tmp_path, monkeypatch):
    sent(OLD)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "second"))
    sent(NEW)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "first"))
    copy = shutil.copyfileobj
    monkeypatch.setattr(shutil, "copyfileobj", lambda *_: (_ for _ in ()).throw(ConnectionResetError("dead")))
    with pytest.raises(ValueError, match="dead"):
        found()
    monkeypatch.setattr(shutil, "copyfileobj", copy)
    assert found() == NEW


def test_files_of_others_are_left_alone(bucket):
    write(Path(bucket.here(ADDRESS)), {"mine": "x"})
    with pytest.raises(ValueError, match="expected a run that was sent there, or nothing, found mine"):
        found()


@pytest.mark.slow
def test_the_same_command_elsewhere_goes_on(bucket, tiny_model_directory, tmp_path, monkeypatch, capsys):
    words = [
        *("score", "--model.name", str(tiny_model_directory), "--runs", "gs://bucket/runs", "--name", "one"),
        *("--calibration.examples", "3", "--calibration.length", "16", "--estimators", "magnitude"),
    ]
    assert "expected a run at gs://bucket/runs/one, found none" in refused(capsys, [*words, "--resume"])
    assert main.main(words) == 0
    there = read_run(bucket.here(ADDRESS))
    assert there["status"] == "finished"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "second"))
    bucket.written.clear()
    assert main.main([*words, "--resume"]) == 0
    assert not bucket.written, "a finished run is shown, and nothing of it is made again"
    assert "another configuration" in refused(capsys, [*words, "--calibration.examples", "4"])
    assert main.main([*words, "--calibration.examples", "4", "--overwrite"]) == 0
    assert read_run(bucket.here(ADDRESS))["config"]["calibration"]["examples"] == 4
