"""Programs that are kept from one command to the next; a folder that nothing can be kept in stops no command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from saap_jax.runtime.programs import keep_programs, remembered, trim

OWN = "JAX_COMPILATION_CACHE_DIR"


@pytest.fixture
def home(monkeypatch, tmp_path) -> Path:
    """A cache folder of a user who has set nothing."""
    for name in [name for name in os.environ if name.startswith(("JAX_COMPILATION", "JAX_PERSISTENT", "NPROC"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", dict(os.environ) | {"XDG_CACHE_HOME": str(tmp_path / "cache")})
    return tmp_path / "cache"


class TestFolder:
    def test_it_lies_in_the_cache_of_the_user_and_is_one_for_each_number_of_cores(self, home, monkeypatch):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
        keep_programs()
        assert Path(os.environ[OWN]) == home / "saap_jax" / "programs" / "3"
        assert Path(os.environ[OWN]).is_dir()
        assert os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "0"

    def test_what_the_user_names_stays(self, home):
        os.environ |= {OWN: "gs://bucket/programs", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "9"}
        keep_programs()
        assert (os.environ[OWN], os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]) == (
            "gs://bucket/programs", "9",
        )  # fmt: skip
        assert not home.exists()

    def test_processes_of_one_job_keep_none_of_their_own(self, home):
        keep_programs(["compare", "quickstart", "--distributed", "auto"])
        assert OWN not in os.environ

    def test_no_place_to_write_stops_nobody(self, home, monkeypatch):
        home.write_text("a file in the way")
        keep_programs()
        assert OWN not in os.environ
        os.environ["XDG_CACHE_HOME"] = "not/absolute"
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
        keep_programs()
        assert OWN not in os.environ

    def test_what_was_not_used_for_longest_goes_and_so_does_what_is_empty(self, tmp_path):
        for age, (name, size) in enumerate({"new": 40, "old": 40, "older": 40, "empty": 0}.items()):
            (tmp_path / f"{name}-cache").write_bytes(b"x" * size)
            os.utime(tmp_path / f"{name}-cache", (1000 - age, 1000))
        (tmp_path / "empty-cache").touch()  # now: it is not its age that removes it
        trim(tmp_path, 200)
        assert {path.name for path in tmp_path.iterdir()} == {"new-cache", "old-cache", "older-cache"}
        trim(tmp_path, 90)
        assert {path.name for path in tmp_path.iterdir()} == {"new-cache", "old-cache"}


def test_a_value_is_made_once_where_programs_are_kept_and_each_time_where_they_are_not(tmp_path):
    made = []

    def make():
        made.append(len(made))
        return {"of": made[-1]}

    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        assert [remembered(["a"], make), remembered(["a"], make), remembered(["b"], make)] == [
            {"of": 0}, {"of": 0}, {"of": 1},
        ]  # fmt: skip
        for path in tmp_path.iterdir():
            path.write_bytes(b'{"of"')
        assert remembered(["a"], make) == {"of": 2}, "a damaged file is made again"
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "nowhere"))
        assert [remembered(["a"], make), remembered(["a"], make)] == [{"of": 3}, {"of": 4}]
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.slow
@pytest.mark.nightly
def test_a_second_process_compiles_nothing_and_a_damaged_or_other_program_is_compiled(tiny_model_directory, tmp_path):
    """The table is the same, whether programs are compiled or read."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(Path(__file__).parents[2])}

    def programs(name: str, **more: str) -> tuple[int, int, int, list, str]:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "saap_jax", "compare", "--name", name, "--runs", str(tmp_path / name)),
                *("--model.name", str(tiny_model_directory), "--methods", "magnitude > bias", "wanda > uniform"),
                *("--calibration.examples", "3", "--calibration.length", "16", "--calibration.batch-size", "2"),
                *("--evaluation.windows", "3", "--evaluation.length", "16", "--ratios", "0.3"),
            ],
            env=environment | more, capture_output=True, text=True, check=True,
        )  # fmt: skip
        folder = tmp_path / name / name
        stages = json.loads((folder / "run.json").read_text())["stages"]
        counts = [sum(stage[key] for stage in stages) for key in ("compiles", "cache_hits", "cache_misses")]
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return *counts, [(row["candidate"], row["losses"]) for row in rows], done.stderr

    compiled, hits, misses, table, _ = programs("first")
    assert misses > 0
    assert compiled == hits + misses
    again, hits, misses, same, said = programs("second")
    assert (hits, misses) == (again, 0)
    assert same == table
    assert "cache" not in said
    assert programs("off", JAX_ENABLE_COMPILATION_CACHE="false")[1:4] == (0, 0, table)
    [folder] = (tmp_path / "cache" / "saap_jax" / "programs").iterdir()
    for number, path in enumerate(sorted(folder.glob("jit_*-cache"))):
        path.write_bytes(path.read_bytes()[: number % 2 * 50])
    *_, misses, other, said = programs("damaged")
    assert misses > 0
    assert other == table
    assert "cache" not in said
