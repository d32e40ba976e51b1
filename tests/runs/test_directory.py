"""Run directories: picked up, refused, torn, overwritten."""

import io
import json
import math
import os
import subprocess
import zipfile
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from saap_jax.runs import stages
from saap_jax.runs.directory import RunDirectory, read_run
from saap_jax.runs.tensorboard import write_scalars
from saap_jax.runtime import files
from saap_jax.runtime.files import plain
from saap_jax.runtime.provenance import git_commit, provenance

CONFIG = {"seed": 0, "search": {"ratios": (0.2, 0.5), "min_keep": 1}, "limit": math.inf}


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "runs" / "one"


def contents(directory: Path) -> dict[str, bytes | None]:
    """Return every path below a directory, with the bytes of files; links are not followed."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() and not path.is_symlink() else None
        for path in directory.rglob("*")
    }


class TestOpen:
    def test_creates_a_running_record(self, path):
        run = RunDirectory.open(path, CONFIG).begin()
        record = json.loads((path / "run.json").read_text())
        assert (record["schema"], record["name"], record["status"]) == (1, "one", "running")
        assert record["config"] == {"seed": 0, "search": {"ratios": [0.2, 0.5], "min_keep": 1}, "limit": "Infinity"}
        assert run.candidates() == []
        assert not run.finished

    def test_writes_nothing_before_it_begins(self, path):
        run = RunDirectory.open(path, CONFIG)
        with run.stage("load"):
            pass
        assert not path.exists()
        run.update(kind="compare")
        assert [stage["name"] for stage in read_run(path)["stages"]] == ["load"]

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
        assert "search.ratios [0.2, 0.5] -> [0.3]" in message
        assert "seed 0 -> (absent)" in message
        assert "new (absent) -> null" in message
        assert "--overwrite" in message
        assert "--name" in message
        assert "min_keep" not in message
        assert "limit" not in message
        assert "\n" not in message

    def test_names_a_few_of_many_fields(self, path):
        RunDirectory.open(path, {"a": {str(i): 0 for i in range(9)}}).begin()
        with pytest.raises(ValueError, match=r"a\.0 0 -> 1, a\.1 0 -> 1, a\.2 0 -> 1 and 6 more;"):
            RunDirectory.open(path, {"a": {str(i): 1 for i in range(9)}})

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_never_takes_over_somebody_elses_directory(self, path, overwrite):
        path.mkdir(parents=True)
        (path / "thesis.tex").write_text("years of work")
        with pytest.raises(ValueError, match="expected a run"):
            RunDirectory.open(path, CONFIG, overwrite=overwrite)
        assert (path / "thesis.tex").read_text() == "years of work"
        assert not (path / "run.json").exists()

    def test_takes_an_empty_directory_and_one_killed_before_its_first_record(self, path):
        path.mkdir(parents=True)
        RunDirectory.open(path, CONFIG).begin()
        os.rename(path / "run.json", path / ".run.json.partial")
        assert RunDirectory.open(path, CONFIG).candidates() == []

    def test_refuses_a_file(self, tmp_path):
        (tmp_path / "file").write_text("x")
        with pytest.raises(ValueError, match="found a file"):
            RunDirectory.open(tmp_path / "file", CONFIG)

    def test_overwrite_removes_what_runs_write_and_nothing_else(self, path):
        run = RunDirectory.open(path, CONFIG).begin()
        run.append({"candidate": "a"})
        run.save_arrays("scores", {"x": np.zeros(2)})
        run.save_json("keep", {})
        for name in ("report.html", "notes.txt", "other.json", "best/model.safetensors", "mine/notes.txt"):
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_text("x")
        run.update(status="finished")
        run.claim("best")
        again = RunDirectory.open(path, {"seed": 1}, overwrite=True)
        assert read_run(path)["status"] == "finished", "nothing is removed before the new run begins"
        again.begin()
        left = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
        assert left == {"run.json", "notes.txt", "other.json", "mine/notes.txt"}
        assert again.record["config"] == {"seed": 1}
        assert (again.record["files"], again.record["status"]) == ([], "running")

    @pytest.mark.parametrize(
        "name", ["..", ".", "", "../two", "/tmp", "mine/notes.txt", "thesis.md", "run.json", "a.npz"]
    )
    def test_overwrite_refuses_names_that_no_run_writes(self, path, name):
        run = RunDirectory.open(path, CONFIG)
        run.save_json("keep", {})
        for file in (path.parent / "two" / "run.json", path / "mine" / "notes.txt", path / "thesis.md", path / "a.npz"):
            file.parent.mkdir(exist_ok=True)
            file.write_text("years of work")
        run.update(files=["keep.json", name])
        before = contents(path.parent)
        with pytest.raises(
            ValueError, match=f"names {name!r} among its files, which no run writes; nothing was removed"
        ):
            RunDirectory.open(path, CONFIG, overwrite=True)
        assert contents(path.parent) == before
        assert RunDirectory.open(path, CONFIG).record["files"][-1] == name, "without overwrite it is no matter"

    @pytest.mark.parametrize("name", ["best", "keep.json", "metrics.jsonl"])
    @pytest.mark.parametrize("kind", ["link", "other"])
    def test_overwrite_refuses_what_it_did_not_write_under_its_names(self, path, tmp_path, name, kind):
        run = RunDirectory.open(path, CONFIG)
        for each in ("best", "keep.json"):
            run.claim(each)
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.tex").write_text("years of work")
        if kind == "link":
            (path / name).symlink_to(tmp_path / "mine" / ("" if name == "best" else "thesis.tex"))
        elif name == "best":
            (path / name).write_text("a file")
        else:
            (path / name).mkdir()
        before = contents(tmp_path)
        with pytest.raises(
            ValueError, match=f"expected a .* of the run at .*{name}, found something else; nothing was"
        ):
            RunDirectory.open(path, CONFIG, overwrite=True)
        assert contents(tmp_path) == before

    def test_overwrite_removes_what_a_kill_left(self, path):
        RunDirectory.open(path, CONFIG).claim("best")
        for name in (".run.json.partial", ".best.partial", ".best.lock", ".mine.partial"):
            (path / name).write_text("half")
        RunDirectory.open(path, CONFIG, overwrite=True).begin()
        assert sorted(os.listdir(path)) == [".mine.partial", "run.json"]

    def test_refuses_a_record_of_another_schema(self, path):
        RunDirectory.open(path, CONFIG).update(schema=99)
        with pytest.raises(ValueError, match="a run of version 99, where this program reads version 1; make it again"):
            RunDirectory.open(path, CONFIG)
        content = (path / "run.json").read_bytes()
        RunDirectory.open(path, CONFIG, overwrite=True).begin()
        assert read_run(path)["schema"] == 1
        (path / "run.json").write_bytes(content.replace(b'"files": []', b'"files": ["mine"]'))
        with pytest.raises(ValueError, match="names 'mine' among its files"):
            RunDirectory.open(path, CONFIG, overwrite=True)

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"{", "expected JSON in"),
            (b"\xff", "expected JSON in .*utf-8"),
            (b"[" * 200_000, "nested too deeply"),
            (b'{"schema": 1, "a": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, "nested too deeply"),
            (b'{"schema": 1, "name": "\\ud800"}', "half of a surrogate pair"),
            (b'{"schema": 1, "name": "a", "name": "b"}', "the key 'name' twice"),
            (b'{"schema": 1, "rows": ' + b"9" * 5000 + b"}", "rows: expected a whole number, got inf"),
            (b'{"schema": 1, "config": []}', "config: expected an object, got a list"),
            (b'{"schema": 1, "stages": [{"name": "load", "seconds": "1"}]}', r"stages\[0\].seconds: expected a number"),
            (b'{"schema": 1, "files": [1]}', r"files\[0\]: expected text, got 1"),
            (b'{"schema": 1, "best": {"ppl": {"x": null}}}', "best.ppl.x: expected a number, got None"),
            (b'{"schema": 1, "best": 3}', "best: expected an object, got 3"),
            (b'{"schema": 1, "metrics": [{"name": "x"}]}', r"metrics\[0\]: expected a field domain, got name"),
            (
                b'{"schema": 1, "dense": {"ppl": {"x": 2.0}, "losses": {"x": [1.0, 2.0]}}}',
                "expected 4.48169 by the losses",
            ),
            (
                b'{"schema": 1, "dense": {"ppl": {"x": 2.0}}, "metrics": [{"name": "y", "domain": "in"}]}',
                "metrics: expected those that dense was measured by, x, got 'y'",
            ),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_refuses_a_damaged_record_in_one_sentence(self, path, content, said):
        RunDirectory.open(path, CONFIG).begin()
        (path / "run.json").write_bytes(content)
        with pytest.raises(ValueError, match=said) as caught:
            RunDirectory.open(path, CONFIG)
        assert "run.json" in str(caught.value)
        assert "changed or damaged" in str(caught.value)
        assert len(str(caught.value)) < 600


class TestInputs:
    INPUTS = MappingProxyType({"model": "a" * 64, "evaluation text": "b" * 64})

    def test_a_run_goes_on_with_the_same_inputs_only(self, path):
        RunDirectory.open(path, CONFIG).begin(self.INPUTS).append({"candidate": "a"})
        assert RunDirectory.open(path, CONFIG).begin(self.INPUTS).record["inputs"] == self.INPUTS
        for other, said in (({"model": "c" * 64}, "model"), ({"training text": "c" * 64}, "training text")):
            with pytest.raises(ValueError, match=rf"by the digests of {said} \(.* -> cccccccccccc\)") as caught:
                RunDirectory.open(path, CONFIG).begin(self.INPUTS | other)
            assert "evaluation text" not in str(caught.value)
        RunDirectory.open(path, CONFIG, overwrite=True).begin(self.INPUTS | {"model": "c" * 64})
        assert read_run(path)["inputs"]["model"] == "c" * 64

    def test_results_of_unknown_inputs_are_refused(self, path):
        RunDirectory.open(path, CONFIG).begin()
        RunDirectory.open(path, CONFIG).begin(self.INPUTS)
        assert read_run(path)["inputs"] == self.INPUTS, "there were no results yet"
        old = RunDirectory.open(path.with_name("old"), CONFIG)
        old.append({"candidate": "a"})
        with pytest.raises(ValueError, match="does not say of which weights and text"):
            RunDirectory.open(old.path, CONFIG).begin(self.INPUTS)


class TestCandidates:
    def test_skips_a_torn_line_and_goes_on_after_it(self, path):
        run = RunDirectory.open(path, CONFIG).begin()
        run.append({"candidate": "a", "seconds": 1.5})
        whole = (path / "metrics.jsonl").read_bytes()
        (path / "metrics.jsonl").write_bytes(whole + b'{"candidate": "b", "seco')
        assert ([c["candidate"] for c in run.candidates()], run.corrupt_lines) == (["a"], 1)
        run.append({"candidate": "c"})
        assert ([c["candidate"] for c in run.candidates()], run.corrupt_lines) == (["a", "c"], 1)

    def test_whole_lines_are_not_corrupt(self, path):
        run = RunDirectory.open(path, CONFIG).begin()
        run.append({"candidate": "a"})
        run.append({"candidate": "b"})
        assert ([c["candidate"] for c in run.candidates()], run.corrupt_lines) == (["a", "b"], 0)
        assert (path / "metrics.jsonl").read_bytes().count(b"\n") == 2

    @pytest.mark.parametrize(
        "line",
        [
            *(b"\xff\xfe", b"[1]", b"{}", b"null", b'{"candidate": 3}', b"[" * 100_000, b'{"candidate": "\\udc00"}'),
            b'{"candidate": "a", "candidate": "b"}',
            b'{"candidate": "a", "ratio_asked": "0.2"}',
            b'{"candidate": "a", "kept": {"mlp": 1.5}}',
            b'{"candidate": "a", "losses": {"x": [1.0, 2.0]}, "ppl": {"x": 4.0}}',
            b'{"candidate": "a", "losses": {"y": [1.0, 2.0]}, "ppl": {"x": 4.4816890703}}',
            b'{"candidate": "a", "losses": {"x": [1.0, 2.0]}, "ppl": {"x": 4.4816890703, "y": 2.0}}',
        ],
    )
    def test_counts_lines_that_are_no_candidate(self, path, line):
        run = RunDirectory.open(path, CONFIG).begin()
        good = b'{"candidate": "c", "losses": {"x": [1.0, 2.0]}, "ppl": {"x": 4.4816890703}}'
        (path / "metrics.jsonl").write_bytes(line + b"\n" + good + b"\n")
        assert ([c["candidate"] for c in run.candidates()], run.corrupt_lines) == (["c"], 1)

    def test_a_line_without_end_is_not_held(self, path, monkeypatch):
        monkeypatch.setattr(files, "LONGEST_LINE", 1000)
        run = RunDirectory.open(path, CONFIG).begin()
        long = b'{"candidate": "' + b"a" * 5000 + b'"}\n'
        (path / "metrics.jsonl").write_bytes(b'{"candidate": "a"}\n' + long + b'{"candidate": "b"}\n')
        assert ([c["candidate"] for c in run.candidates()], run.corrupt_lines) == (["a", "b"], 1)

    def test_the_last_record_of_a_name_counts(self, path):
        run = RunDirectory.open(path, CONFIG).begin()
        for name, seconds in (("a", 1), ("b", 2), ("a", 3)):
            run.append({"candidate": name, "seconds": seconds})
        assert [(c["candidate"], c["seconds"]) for c in run.candidates()] == [("a", 3), ("b", 2)]

    def test_settled_rows_are_what_was_read_and_one_line_each(self, path):
        run = RunDirectory.open(path, CONFIG)
        for loss in (0.1, 1 / 3):
            for step in (1, 2):
                run.append({"candidate": f"step {step}", "loss": step * loss})
        before = run.candidates()
        run.settle_rows()
        assert run.candidates() == before == [{"candidate": f"step {n}", "loss": n / 3} for n in (1, 2)]
        content = (path / "metrics.jsonl").read_bytes()
        assert content.count(b"\n") == 2
        with (path / "metrics.jsonl").open("ab") as file:
            file.write(b'{"torn\n' + content)
        damaged = (path / "metrics.jsonl").read_bytes()
        run.settle_rows()
        assert (path / "metrics.jsonl").read_bytes() == damaged, "damage is not hidden"

    def test_non_finite_numbers_survive_as_strict_json(self, path):
        run = RunDirectory.open(path, CONFIG).begin()
        run.append({"candidate": "a", "ppl": {"x": math.inf, "y": np.float32("nan"), "z": -math.inf}})

        def refuse(constant):
            raise AssertionError(constant)

        json.loads((path / "metrics.jsonl").read_text(), parse_constant=refuse)
        ppl = run.candidates()[0]["ppl"]
        assert (ppl["x"], ppl["z"]) == (math.inf, -math.inf)
        assert math.isnan(ppl["y"])

    def test_refuses_a_record_without_a_name(self, path):
        with pytest.raises(ValueError, match="string `candidate`"):
            RunDirectory.open(path, CONFIG).append({"estimator": "a"})


class TestUpdate:
    def test_merges_fields(self, path):
        run = RunDirectory.open(path, CONFIG).begin()
        run.update(dense={"ppl": {"x": math.inf}}, seeds={"root": np.int64(3)})
        run.update(model={"name": "m"})
        for record in (run.record, read_run(path)):
            assert record["dense"]["ppl"]["x"] == math.inf
            assert (record["seeds"], record["model"]) == ({"root": 3}, {"name": "m"})

    def test_a_failed_write_leaves_the_old_record(self, path, monkeypatch):
        run = RunDirectory.open(path, CONFIG).begin()

        def fail(descriptor):
            raise OSError("disk full")

        run.append({"candidate": "a"})
        before = contents(path)
        monkeypatch.setattr(files.os, "fsync", fail)
        for write in (
            lambda: run.update(status="finished"),
            lambda: run.append({"candidate": "b"}),
            lambda: run.save_json("keep", {}),
            lambda: run.save_arrays("keeps", {"x": np.ones(3)}),
            lambda: write_scalars(run),
        ):
            with pytest.raises(OSError, match="disk full"):
                write()
        assert contents(path) == before
        assert read_run(path)["status"] == run.record["status"] == "running"
        monkeypatch.undo()
        run.append({"candidate": "b"})
        assert (len(run.candidates()), run.corrupt_lines) == (2, 0)

    def test_refuses_what_json_cannot_hold(self, path):
        run = RunDirectory.open(path, CONFIG).begin()
        with pytest.raises(ValueError, match="got set"):
            run.update(oops={1, 2})
        assert "oops" not in read_run(path)


class TestStage:
    def test_records_seconds_and_memory_and_adds_up(self, path, monkeypatch):
        clock = iter([10.0, 12.5, 20.0, 21.0, 30.0, 31.0])
        monkeypatch.setattr(stages.time, "perf_counter", lambda: next(clock))
        run = RunDirectory.open(path, CONFIG).begin()
        for name in ("load", "observe", "load"):
            with run.stage(name):
                pass
        load, observe = read_run(path)["stages"]
        assert (load["name"], load["seconds"], load["times"]) == ("load", 3.5, 2)
        assert (observe["name"], observe["seconds"], observe["times"]) == ("observe", 1.0, 1)
        assert 0.01 < load["peak_host_gib"] < 10_000

    def test_records_a_stage_that_fails_and_what_was_updated_meanwhile(self, path):
        run = RunDirectory.open(path, CONFIG).begin()

        def fail():
            with run.stage("load"):
                run.update(model={"name": "m"})
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        assert [stage["name"] for stage in read_run(path)["stages"]] == ["load"]
        assert read_run(path)["model"] == {"name": "m"}


class TestArrays:
    def test_round_trip(self, path):
        run = RunDirectory.open(path, CONFIG).begin()
        arrays = {"a/mlp": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([True, False])}
        run.save_arrays("scores", arrays)
        found = run.load_arrays("scores")
        assert found.keys() == arrays.keys()
        for key, array in arrays.items():
            assert found[key].dtype == array.dtype
            np.testing.assert_array_equal(found[key], array)
        assert [file.name for file in path.iterdir() if file.name.startswith(".")] == []

    def test_refuses_objects_and_missing_files(self, path):
        run = RunDirectory.open(path, CONFIG).begin()
        with pytest.raises(ValueError, match=r"'x' of scores\.npz, got object"):
            run.save_arrays("scores", {"x": np.array([object()])})
        with pytest.raises(FileNotFoundError, match="expected arrays at"):
            run.load_arrays("scores")

    @pytest.mark.parametrize("name", ["run", "../keep", "a/b"])
    def test_refuses_names_that_leave_the_directory_or_take_the_record(self, path, name):
        run = RunDirectory.open(path, CONFIG).begin()
        with pytest.raises(ValueError, match="expected one of the names"):
            run.save_json(name, {})

    def test_what_the_run_did_not_write_is_one_sentence(self, path):
        run = RunDirectory.open(path, CONFIG).begin()
        run.save_arrays("scores", {"a": np.arange(6.0).reshape(2, 3), "b": np.ones(4)})
        good = (path / "scores.npz").read_bytes()
        changed = good.replace(np.float64(5).tobytes(), np.float64(6).tobytes())
        assert len(changed) == len(good)
        assert changed != good
        other = io.BytesIO()
        np.savez(other, a=np.zeros((2, 3)), b=np.ones(4))
        for content in (b"", good[:-30], good[:100], changed, other.getvalue()):
            (path / "scores.npz").write_bytes(content)
            with pytest.raises(ValueError, match=r"scores\.npz.*; the file was changed or damaged: remove it, and"):
                RunDirectory.open(path, CONFIG).load_arrays("scores")
        (path / "scores.npz").write_bytes(good)
        assert RunDirectory.open(path, CONFIG).load_arrays("scores")["a"][1, 2] == 5

    def test_killed_between_arrays_and_record(self, path, monkeypatch):
        """The digest is recorded first: until the new file is there, the old one counts."""
        run = RunDirectory.open(path, CONFIG).begin()
        run.save_arrays("keeps", {"a": np.zeros(2)})
        old = (path / "keeps.npz").read_bytes()
        run.save_arrays("keeps", {"a": np.ones(2)})
        (path / "keeps.npz").write_bytes(old)
        again = RunDirectory.open(path, CONFIG)
        assert again.load_arrays("keeps")["a"].tolist() == [0, 0]
        before, after = again.record["digests"]["keeps.npz"]
        (path / "keeps.npz").write_bytes(b"harmed")
        again.settle_arrays()
        assert again.record["digests"]["keeps.npz"] == [before, after], "what the run did not write is not taken over"
        (path / "keeps.npz").write_bytes(old)
        again.settle_arrays()
        assert again.record["digests"]["keeps.npz"] == [before]

    def test_json_round_trip(self, path):
        run = RunDirectory.open(path, CONFIG).begin()
        run.save_json("keep", {"mlp": np.array([[1, 2], [3, 4]])})
        assert run.load_json("keep") == {"mlp": [[1, 2], [3, 4]]}
        assert run.record["files"] == ["keep.json"]


class TestProvenance:
    def test_holds_versions_and_devices(self):
        found = provenance()
        assert found["versions"]["jax"]
        assert found["versions"]["python"].startswith("3.")
        assert found["devices"]["count"] >= 1
        assert 1 <= found["devices"]["cores"] <= (os.cpu_count() or 1)
        assert plain(found) == found

    def test_commit_only_of_tracked_directories(self, tmp_path):
        def git(*arguments: str) -> str:
            identity = ("-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false")
            done = subprocess.run(
                ("git", *identity, *arguments), cwd=tmp_path, capture_output=True, text=True, check=True
            )
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


class TestReadArrays:
    def declared(self, shape: str, dtype: str = "<f8", method: int = zipfile.ZIP_STORED) -> bytes:
        """Return an npz of one array whose header says this shape and type, before eight bytes of zeros."""
        text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
        member = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(8)
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", method) as archive:
            archive.writestr("x.npy", member)
        return file.getvalue()

    def test_what_is_declared_is_held_against_the_bytes(self):
        assert files.read_arrays(self.declared("(1,)"))["x"].tolist() == [0]
        for shape in ("(10**12,)", "(1000000000000,)", "(2,)", "(-1, -1)", "(1,", "[1]", "(" * 300):
            with pytest.raises(ValueError, match="."):
                files.read_arrays(self.declared(shape))
        with pytest.raises(ValueError, match="expected numbers or text"):
            files.read_arrays(self.declared("(1,)", "|O"))

    def test_what_unpacks_to_more_is_refused(self):
        with pytest.raises(ValueError, match="parts of at most|compressed"):
            files.read_arrays(self.declared("(1,)", method=zipfile.ZIP_DEFLATED))
