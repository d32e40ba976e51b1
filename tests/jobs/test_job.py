"""How runs end: everything that is named is there before the status says so."""

import datetime
import platform

import pytest

from saap_jax.config.jobs import ScoreConfig
from saap_jax.jobs import job as module
from saap_jax.jobs.job import run_job
from saap_jax.runs.directory import read_run


@pytest.fixture
def config(tmp_path) -> ScoreConfig:
    return ScoreConfig(runs=str(tmp_path / "runs"), name="one")


def work(config: ScoreConfig) -> bool:
    """Run a job that measures two candidates and makes a model; say whether there was anything to do."""
    done = []

    def measure(run) -> None:
        assert (module.Path(config.runs) / f".{config.name}.lock").exists(), "the run is held"
        run.begin({"model": "a"})
        run.update(kind="compare")
        known = {row["candidate"] for row in run.candidates()}
        for name in {"a", "b"} - known:
            run.append({"candidate": name, "variant": name, "ratio_asked": 0.2, "ppl": {"x": 2.0}})
        done.append(run)

    run = run_job(config, measure, lambda run: {"curve.csv": f"{len(run.candidates())}\n"})
    assert {row["candidate"] for row in run.candidates()} == {"a", "b"}
    assert (run.path / "curve.csv").read_text() == "2\n"
    return bool(done)


def test_the_record_says_how_when_and_where(config):
    assert work(config)
    first = read_run(f"{config.runs}/one")
    assert first["command"] == f"saap score --runs {config.runs} --name one"
    began, ended = (datetime.datetime.fromisoformat(first[name]) for name in ("started", "finished"))
    assert datetime.timedelta(0) <= ended - began < datetime.timedelta(minutes=5)
    assert began.utcoffset() == datetime.timedelta(0)
    assert first["host"] == platform.node()
    page = (module.Path(config.runs) / "one" / "report.html").read_text()
    assert all(first[name] in page for name in ("command", "started", "finished", "host"))


def test_the_status_comes_last(config, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    for place in ("saap_jax.report.write.write_report", "saap_jax.jobs.job.write_scalars"):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            with pytest.raises(OSError, match="No space"):
                work(config)
        assert read_run(f"{config.runs}/one")["status"] == "running"
    assert work(config)
    path = module.Path(config.runs) / "one"
    assert read_run(path)["status"] == "finished"
    page = (path / "report.html").read_text()
    assert "finished" in page
    assert "running" not in page
    assert not work(config)
    assert sorted(each.name for each in path.parent.iterdir()) == ["one"], "no lock is left"


def test_work_that_fails_leaves_no_lock(config):
    def wrong(run) -> None:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        run_job(config, wrong)
    assert not module.Path(config.runs).exists() or not [*module.Path(config.runs).iterdir()]
