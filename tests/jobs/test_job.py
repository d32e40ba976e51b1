"""How runs end: everything that is named is there before the status says so, and is made again where it is missing."""

import datetime
import platform

import pytest

from saap_jax.config import ScoreConfig
from saap_jax.jobs import job as module
from saap_jax.jobs.job import Ending, run_job
from saap_jax.runs.directory import read_run

ENDING = Ending(lambda run: {"curve.csv": f"{len(run.candidates())}\n"}, further=("keeps.npz", "best"))


@pytest.fixture
def config(tmp_path) -> ScoreConfig:
    return ScoreConfig(runs=str(tmp_path / "runs"), name="one")


def work(config: ScoreConfig, ending: Ending = ENDING, **options) -> bool:
    """Run a job that measures two candidates and makes a model; say whether there was anything to do."""
    done = []

    def measure(run) -> None:
        assert (module.Path(config.runs) / f".{config.name}.lock").exists(), "the run is held"
        run.begin({"model": "a"})
        run.update(kind="compare")
        known = {row["candidate"] for row in run.candidates()}
        for name in {"a", "b"} - known:
            run.append({"candidate": name, "ppl": {"x": 2.0}})
        run.save_arrays("keeps", {})
        run.claim("best").mkdir(exist_ok=True)
        done.append(run)

    run = run_job(config, ending, measure, **options)
    assert {row["candidate"] for row in run.candidates()} == {"a", "b"} or not ending.rows
    return bool(done)


def test_the_record_says_how_when_and_where(config):
    """A run that is made again keeps when it began; one that starts afresh does not."""
    assert work(config)
    first = read_run(f"{config.runs}/one")
    assert first["command"] == f"saap score --runs {config.runs} --name one"
    began, ended = (datetime.datetime.fromisoformat(first[name]) for name in ("started", "finished"))
    assert datetime.timedelta(0) <= ended - began < datetime.timedelta(minutes=5)
    assert began.utcoffset() == datetime.timedelta(0)
    assert first["host"] == platform.node()
    page = (module.Path(config.runs) / "one" / "report.html").read_text()
    assert all(first[name] in page for name in ("command", "started", "finished", "host"))
    (module.Path(config.runs) / "one" / "keeps.npz").unlink()
    assert work(config)
    again = read_run(f"{config.runs}/one")
    assert [again[name] for name in ("started", "finished")] == [first[name] for name in ("started", "finished")]


def test_the_status_comes_last(config, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    for name in ("write_report", "write_scalars"):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
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


@pytest.mark.parametrize("name", ["report.html", "curve.csv"])
def test_what_the_records_suffice_for_is_made_again_at_once(config, name):
    assert work(config)
    path = module.Path(config.runs) / "one" / name
    before = path.read_bytes()
    path.unlink()
    assert not work(config), "nothing was measured"
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["keeps.npz", "best", "metrics.jsonl", "line"])
def test_what_takes_the_model_makes_the_run_go_on(config, name):
    assert work(config)
    path = module.Path(config.runs) / "one"
    before = (path / "metrics.jsonl").read_bytes()
    if name == "line":
        (path / "metrics.jsonl").write_bytes(before[:-4])
    else:
        (path / name).rmdir() if name == "best" else (path / name).unlink()
    assert work(config)
    assert not work(config)
    assert (path / "keeps.npz").exists()
    assert (path / "best").exists()


def test_steps_of_a_training_are_not_done_again(config):
    ending = ENDING._replace(rows=False)
    assert work(config, ending)
    (module.Path(config.runs) / "one" / "metrics.jsonl").unlink()
    assert not work(config, ending)
