"""Run directories: picked up, refused, killed, overwritten."""

import contextlib
import errno
import json
import math
import os
import subprocess
from pathlib import Path
from types import MappingProxyType
from unittest import mock

import numpy as np
import pytest

from saap_jax.runs.cache import FileCache
from saap_jax.runs.directory import RunDirectory, read_run, write_scalars
from saap_jax.runtime import digests, files
from saap_jax.runtime.digests import computed_by, git_commit, provenance
from saap_jax.runtime.files import plain

CONFIG = {"seed": 0, "search": {"ratios": (0.2, 0.5), "min_keep": 1}, "limit": math.inf}


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "runs" / "one"


def contents(directory: Path) -> dict[str, bytes | None]:
    """Read every path below a directory: the bytes of files; links are not followed."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() and not path.is_symlink() else None
        for path in directory.rglob("*")
    }


class TestOpen:
    def test_writes_nothing_before_it_begins(self, path):
        run = RunDirectory.open(path, CONFIG)
        with run.stage("load"):
            pass
        assert not path.exists()
        run.update(kind="compare")
        record = json.loads((path / "run.json").read_text())
        assert [stage["name"] for stage in record["stages"]] == ["load"]
        assert (record["schema"], record["name"], record["status"]) == (1, "one", "running")
        assert record["config"] == {"seed": 0, "search": {"ratios": [0.2, 0.5], "min_keep": 1}, "limit": "Infinity"}
        assert run.candidates() == []
        assert not run.finished

    def test_picks_up_the_same_config(self, path):
        RunDirectory.open(path, CONFIG).append({"candidate": "a"})
        again = RunDirectory.open(path, json.loads(json.dumps(CONFIG)))  # tuples became lists: the same configuration
        assert [found["candidate"] for found in again.candidates()] == ["a"]
        again.update(status="finished")
        assert RunDirectory.open(path, CONFIG).finished

    def test_refuses_another_config_in_one_line(self, path):
        RunDirectory.open(path, CONFIG).append({"candidate": "a"})
        other = {"search": {"ratios": [0.3], "min_keep": 1}, "limit": math.inf, "new": None}
        with pytest.raises(ValueError, match="another configuration") as caught:
            RunDirectory.open(path, other)
        message = str(caught.value)
        for said in ("search.ratios [0.2, 0.5] -> [0.3]", "seed 0 -> (absent)", "new (absent) -> null", "--overwrite"):
            assert said in message
        assert not any(silent in message for silent in ("min_keep", "limit", "\n"))
        RunDirectory.open(path.with_name("b"), {"a": {str(i): 0 for i in range(9)}}).begin()
        with pytest.raises(ValueError, match=r"a\.0 0 -> 1, a\.1 0 -> 1, a\.2 0 -> 1 and 6 more;"):
            RunDirectory.open(path.with_name("b"), {"a": {str(i): 1 for i in range(9)}})

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_never_takes_over_somebody_elses_directory(self, path, overwrite):
        path.mkdir(parents=True)
        (path / "thesis.tex").write_text("years of work")
        for place in (path, path / "thesis.tex"):
            with pytest.raises(ValueError, match="expected a run"):
                RunDirectory.open(place, CONFIG, overwrite=overwrite)
        assert contents(path) == {"thesis.tex": b"years of work"}

    def test_takes_a_directory_that_was_killed_before_its_first_record(self, path):
        RunDirectory.open(path, CONFIG).begin()
        os.rename(path / "run.json", path / ".run.json.partial")
        again = RunDirectory.open(path, CONFIG)
        assert again.candidates() == []
        again.begin()
        assert os.listdir(path) == ["run.json"], "what the kill left is written over"


class TestOverwrite:
    def test_removes_what_runs_write_and_nothing_else(self, path, tmp_path):
        run = RunDirectory.open(path, CONFIG).begin()
        run.append({"candidate": "a"})
        run.save_arrays("scores", {"x": np.zeros(2)})
        run.save_json("keep", {})
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "thesis.tex").write_text("years of work")
        run.claim("model").symlink_to(tmp_path / "elsewhere")
        for name in ("report.html", "notes.txt", "other.json", "best/model.safetensors", "mine/notes.txt"):
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_text("x")
        (path / ".best.partial").write_text("half")
        run.update(status="finished", schema=99)
        run.claim("best")
        before = contents(path)
        again = RunDirectory.open(path, {"seed": 1}, overwrite=True)
        assert contents(path) == before, "nothing is removed before the new run begins"
        again.begin()
        left = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
        assert left == {"run.json", "notes.txt", "other.json", "mine/notes.txt"}
        assert (tmp_path / "elsewhere" / "thesis.tex").exists(), "no link is followed"
        assert again.record["config"] == {"seed": 1}
        assert (again.record["files"], again.record["status"]) == ([], "running")

    @pytest.mark.parametrize("name", ["..", ".", "", "../two", "/tmp", "mine/notes.txt"])
    def test_never_removes_what_lies_elsewhere(self, path, name):
        run = RunDirectory.open(path, CONFIG)
        for file in (path.parent / "two" / "run.json", path / "mine" / "notes.txt"):
            file.parent.mkdir(exist_ok=True, parents=True)
            file.write_text("years of work")
        run._begun = True
        run.update(files=[name])
        RunDirectory.open(path, CONFIG, overwrite=True).begin()
        assert set(contents(path.parent)) == {
            "one", "one/run.json", "one/mine", "one/mine/notes.txt", "two", "two/run.json",
        }  # fmt: skip


def test_a_run_goes_on_with_the_same_inputs_only(path):
    inputs = MappingProxyType({"model": "a" * 64, "evaluation text": "b" * 64})
    RunDirectory.open(path, CONFIG).begin(inputs).append({"candidate": "a"})
    assert RunDirectory.open(path, CONFIG).begin(inputs).record["inputs"] == inputs
    for other, said in (({"model": "c" * 64}, "model a"), ({"training text": "c" * 64}, r"training text \(absent")):
        with pytest.raises(ValueError, match=rf"by the digests of: {said}.* -> cccccccccccc") as caught:
            RunDirectory.open(path, CONFIG).begin(inputs | other)
        assert "evaluation text" not in str(caught.value)
    RunDirectory.open(path, CONFIG, overwrite=True).begin(inputs | {"model": "c" * 64})
    assert read_run(path)["inputs"]["model"] == "c" * 64


class TestCandidates:
    def test_an_unfinished_line_is_written_over(self, path):
        run = RunDirectory.open(path, CONFIG).begin()
        run.append({"candidate": "a", "seconds": 1.5})
        whole = (path / "metrics.jsonl").read_bytes()
        (path / "metrics.jsonl").write_bytes(whole + b'{"candidate": "b", "seco')
        assert [c["candidate"] for c in run.candidates()] == ["a"]
        run.append({"candidate": "c"})
        assert (path / "metrics.jsonl").read_bytes() == whole + b'{"candidate": "c"}\n'
        run.append({"candidate": "a", "seconds": 3})
        assert [(c["candidate"], c.get("seconds")) for c in run.candidates()] == [("a", 3), ("c", None)]

    def test_non_finite_numbers_survive_as_strict_json(self, path):
        run = RunDirectory.open(path, CONFIG).begin()
        run.append({"candidate": "a", "ppl": {"x": math.inf, "y": np.float32("nan"), "z": -math.inf}})

        def refuse(constant):
            raise AssertionError(constant)

        json.loads((path / "metrics.jsonl").read_text(), parse_constant=refuse)
        ppl = run.candidates()[0]["ppl"]
        assert (ppl["x"], ppl["z"]) == (math.inf, -math.inf)
        assert math.isnan(ppl["y"])


class TestWriting:
    def test_merges_fields_and_refuses_what_json_cannot_hold(self, path):
        run = RunDirectory.open(path, CONFIG).begin()
        run.update(dense={"ppl": {"x": math.inf}}, seeds={"root": np.int64(3)})
        run.update(model={"name": "m"})
        with pytest.raises(ValueError, match="got set"):
            run.update(oops={1, 2})
        for record in (run.record, read_run(path)):
            assert record["dense"]["ppl"]["x"] == math.inf
            assert (record["seeds"], record["model"]) == ({"root": 3}, {"name": "m"})
            assert "oops" not in record

    def test_a_failed_write_leaves_what_was_there(self, path, monkeypatch):
        run = RunDirectory.open(path, CONFIG).begin()

        def fail(descriptor):
            raise OSError("disk full")

        run.append({"candidate": "a"})
        before = contents(path)
        monkeypatch.setattr(files.os, "fsync", fail)
        for write in (
            lambda: run.update(status="finished"),
            lambda: run.save_json("keep", {}),
            lambda: run.save_arrays("keeps", {"x": np.ones(3)}),
        ):
            with pytest.raises(OSError, match="disk full"):
                write()
        assert contents(path) == before
        assert read_run(path)["status"] == run.record["status"] == "running"
        monkeypatch.undo()
        run.append({"candidate": "b"})
        assert len(run.candidates()) == 2

    def test_arrays_and_values_come_back(self, path):
        run = RunDirectory.open(path, CONFIG).begin()
        arrays = {"a/mlp": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([True, False])}
        run.save_arrays("scores", arrays)
        found = run.load_arrays("scores")
        assert found.keys() == arrays.keys()
        for key, array in arrays.items():
            assert found[key].dtype == array.dtype
            np.testing.assert_array_equal(found[key], array)
        run.save_json("keep", {"mlp": np.array([[1, 2], [3, 4]])})
        assert json.loads((path / "keep.json").read_text()) == {"mlp": [[1, 2], [3, 4]]}
        assert run.record["files"] == ["scores.npz", "keep.json"]
        with pytest.raises(ValueError, match=r"'x' of none\.npz, got object"):
            run.save_arrays("none", {"x": np.array([object()])})
        with pytest.raises(FileNotFoundError, match="expected arrays at"):
            run.load_arrays("none")


def scalars_in(directory: Path) -> list[tuple[str, int, float]]:
    """Read tag, step and value of each scalar of the one event file of a directory."""
    from tensorboardX.proto.event_pb2 import Event

    [file], found = directory.iterdir(), []
    content = file.read_bytes()
    while content:
        length = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + length])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        content = content[16 + length :]
    return found


def test_tensorboard_has_stages_candidates_and_steps_once_however_often_written(path):
    run = RunDirectory.open(path, CONFIG).begin()
    with run.stage("score") as stage:
        stage.tokens = 64
    run.append({"candidate": "wanda@0.2", "ppl": {"ppl@16": 12.5}})
    run.append({"candidate": "step 3", "step": 3, "loss": 0.5, "norm": None})
    for _ in range(2):
        found = scalars_in(write_scalars(run))
    assert {("candidates/ppl_16", 1, 12.5), ("training/loss", 3, 0.5), ("tokens/score", 0, 64.0)} < {*found}
    assert "training/norm" not in [tag for tag, *_ in found]
    assert len(found) == len({*found})


def test_two_jobs_may_keep_the_same_at_once(tmp_path, monkeypatch):
    real = os.fsync

    def meanwhile(file):
        monkeypatch.setattr(os, "fsync", real)
        monkeypatch.setattr(os, "getpid", lambda: 0)
        FileCache(tmp_path).keep("key", [1, 2])
        real(file)

    monkeypatch.setattr(os, "fsync", meanwhile)
    FileCache(tmp_path).keep("key", [1])
    assert FileCache(tmp_path).value("key") == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["key.json"]


@pytest.mark.parametrize(("number", "kept"), [(errno.EACCES, True), (errno.EROFS, True), (errno.ENOSPC, False)])
def test_a_cache_that_cannot_be_written_is_read_alone(tmp_path, monkeypatch, number, kept):
    FileCache(tmp_path).keep("old", 1)
    monkeypatch.setattr(Path, "mkdir", mock.Mock(side_effect=OSError(number, "no")))
    cache = FileCache(tmp_path)
    with contextlib.nullcontext() if kept else pytest.raises(OSError, match="no"):
        cache.keep("new", 2)
    assert [cache.value(key) for key in ("old", "new")] == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]


def test_the_cache_is_cleared_of_all_that_commands_leave_there(tmp_path):
    """Cut models, and halves of files and models, of killed processes too."""
    cache, (one, other, third) = FileCache(tmp_path / ".cache"), (letter * 64 for letter in "abc")
    for name in (
        f"{one}/model.safetensors",
        f".{other}.partial/x",
        f"..{third}.json.7.partial",
        f"{one}.npz",
        "mine.npz",
    ):
        (cache.path / name).parent.mkdir(exist_ok=True, parents=True)
        (cache.path / name).touch()
    cache.clear()
    assert [path.name for path in cache.path.iterdir()] == ["mine.npz"]


def test_what_is_kept_is_of_one_state_of_all_sources(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(digests, "HOME", tmp_path)
    for source in ("class Calibrated:\n    a: int", "class Calibrated:\n    b: int", "class Calibrated:\n    a: int"):
        (tmp_path / "records.py").write_text(source)
        digests._digest_of_files.cache_clear()
        found.append(computed_by())
    assert found[0] == found[2] != found[1]


def test_provenance_holds_versions_devices_and_the_commit_of_tracked_directories(tmp_path):
    found = provenance()
    assert found["versions"]["jax"]
    assert found["versions"]["python"].startswith("3.")
    assert found["devices"]["count"] >= 1
    assert 1 <= found["devices"]["cores"] <= (os.cpu_count() or 1)
    assert plain(found) == found

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false")
        done = subprocess.run(("git", *identity, *arguments), cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert git_commit(tmp_path) is None
    git("init", "-q")
    for name in ("tracked", "untracked"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    git("add", "tracked/file")
    git("commit", "-q", "-m", "m", "--no-verify")
    head = git("rev-parse", "HEAD")
    assert git_commit(tmp_path / "tracked") == head
    assert git_commit(tmp_path / "untracked") is None
    (tmp_path / "tracked" / "file").write_text("y")
    assert git_commit(tmp_path / "tracked") == f"{head}-dirty"
