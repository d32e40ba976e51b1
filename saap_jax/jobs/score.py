"""What `saap score` runs: every unit scored by every estimator, from text or from the statistics of another run."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saap_jax.config.jobs import ScoreConfig
from saap_jax.config.method import EstimationConfig
from saap_jax.jobs.job import Ending, check, finish, job, load
from saap_jax.runs.directory import RunDirectory, read_run
from saap_jax.runs.records import RunRecord
from saap_jax.runs.scores import kept_scores, read_scores, rescored, save_scores, served, statistics_path
from saap_jax.runtime.mesh import Layout
from saap_jax.runtime.progress import Track, quiet, step
from saap_jax.runtime.provenance import provenance
from saap_jax.selection.calibrate import Calibrated
from saap_jax.subjects.base import Examples, Subject
from saap_jax.subjects.opened import open_subject

SCORED = Ending(further=("scores.npz", "stability.npz"))


def score_run(config: ScoreConfig, *, overwrite: bool = False, track: Track = quiet) -> tuple[RunDirectory, Calibrated]:
    """Score every unit by every estimator, and keep the scores in a run directory (or return those it holds).

    With `from_run` the statistics of that run are scored, and no text is read; unless estimators are named, those of
    the usual ones that it serves.
    """
    left_out, usual = [], EstimationConfig().estimators
    if config.from_run and config.estimation.estimators == usual:
        names = served(config.from_run, usual, config.fusion)
        left_out = [name for name in usual if name not in names]
        config = dataclasses.replace(config, estimation=dataclasses.replace(config.estimation, estimators=tuple(names)))
    layout = check(config)
    importance = config.patterns.importance
    if importance and importance not in config.estimation.estimators:
        names = ", ".join(config.estimation.estimators)
        raise ValueError(f"patterns.importance: expected one of estimation.estimators ({names}), got {importance!r}")
    with job(config, SCORED, overwrite=overwrite) as run:
        if not run.finished:
            _score(config, run, layout, left_out, track)
    return run, read_scores(run)


def _score(config: ScoreConfig, run: RunDirectory, layout: Layout | None, left_out: list[str], track: Track) -> None:
    """Do what `score_run` does, as far as the run does not hold it yet."""
    source = source_run(config.from_run, config.model.name) if config.from_run else {}
    if config.from_run:
        with run.stage("load"), step(track, "load the model"):
            subject = open_subject(config.model, layout=layout)
        with run.stage("score"), step(track, "score the statistics"):
            calibrated = rescored(config.from_run, subject, config.estimation.estimators, config.fusion)
        about = source.get("scenarios", {})
        run.begin(subject.digests())
        run.update(**structures(subject))
        save_scores(run, calibrated)
    else:
        material = load(config, run, layout, track)
        subject, scenarios = material.subject, material.scenarios
        about = {name: subject.shape(examples) for name, examples in scenarios.items()}
        run.begin(material.inputs)
        run.update(**structures(subject))
        with run.stage("score") as stage:
            tokens = tokens_to_observe(run, subject, scenarios)
            kept_scores(run, subject, scenarios, config, stability=True, keep=config.keep_statistics, track=track)
            stage.tokens = tokens
    run.update(kind="score", scenarios=about, **provenance())
    if left_out:
        run.update(left_out=left_out)
    finish(run, SCORED)


def structures(subject: Subject) -> dict[str, Any]:
    """Return what a run records of structures that have names of their own."""
    record = subject.structures_record()
    return {} if record is None else {"structures": record}


def tokens_to_observe(run: RunDirectory, subject: Subject, scenarios: Mapping[str, Examples], suffix: str = "") -> int:
    """Count the calibration tokens, without padding, that `kept_scores` has yet to observe.

    None of a run that holds its scores (`scores<suffix>.npz`), nor of a scenario whose statistics it keeps.
    """
    if run.has(f"scores{suffix}.npz"):
        return 0
    new = [examples for name, examples in scenarios.items() if not run.has(str(statistics_path(Path(), name)))]
    return sum(subject.count(examples)[1] for examples in new)


def source_run(path: str, model: str) -> RunRecord:
    """Return the record of a run whose statistics are to be scored; raise where it is one of another model."""
    record = read_run(path)
    of = record.get("config", {}).get("model")
    observed = of.get("name") if isinstance(of, dict) else of
    if observed != model:
        raise ValueError(f"from_run: {path} observed the model {observed}, got {model}; give --model.name {observed}")
    return record
