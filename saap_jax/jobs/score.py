"""What `saap score` runs: every unit scored by every estimator, from text or from the statistics of another run."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from saap_jax.config.jobs import USUAL, PruneConfig, ScoreConfig
from saap_jax.config.method import CalibrationConfig
from saap_jax.errors import reading
from saap_jax.jobs.candidates import cache_of, runner_of
from saap_jax.jobs.job import check, load, run_job
from saap_jax.jobs.since import changed_inputs
from saap_jax.records import RunRecord
from saap_jax.report.pages.score import find_patterns, fusion_table, pattern_table, rank_table
from saap_jax.runs.directory import RunDirectory, read_run
from saap_jax.runs.scores import kept_scores, read_scores, rescored, save_scores, served
from saap_jax.runtime.digests import inputs_of, provenance
from saap_jax.runtime.progress import Passes, Track, quiet, step
from saap_jax.steps.base import TextSize
from saap_jax.steps.chain import steps_of
from saap_jax.steps.run import codes_of
from saap_jax.steps.score.calibrate import Calibrated
from saap_jax.steps.score.score import Score
from saap_jax.subjects.base import Examples, Subject, structures_record
from saap_jax.subjects.llama import open_subject


def scores_of(texts: Sequence[str]) -> dict[str, Score]:
    """Read the scores that texts name, by the text that they are written as.

    Raises:
        ValueError: something else than a score, one that is named twice, or none.
    """
    found: dict[str, Score] = {}
    for text in texts:
        for each in steps_of(text):
            if not isinstance(each, Score):
                raise ValueError(f"estimators: expected a score, such as wanda, got {each.written}")
            if each.written in found:
                raise ValueError(f"estimators: expected each once, got {each.written} twice")
            found[each.written] = each
    if not found:
        raise ValueError("estimators: expected at least one, such as wanda, got none")
    return found


def score_run(
    config: ScoreConfig, *, overwrite: bool | None = False, track: Track = quiet
) -> tuple[RunDirectory, Calibrated]:
    """Score every unit by every estimator, and keep the scores in a run directory (or return those it holds).

    With `from_run` the statistics of that run are scored, and no text is read; unless estimators are named, those of
    the usual ones that it serves.
    """
    scores = scores_of(config.estimators)
    left_out = []
    if config.from_run and config.estimators == USUAL:
        names = served(config.from_run, scores)
        left_out = [name for name in USUAL if name not in names]
        config = dataclasses.replace(config, estimators=tuple(names))
        scores = scores_of(names)
    layout = check(config)

    def work(run: RunDirectory) -> None:
        if config.from_run:
            source = source_run(config.from_run, config.model.name)
            with run.stage("load"), step(track, "load the model"):
                subject = open_subject(config.model, layout=layout)
            check_scores(scores, subject)
            check_observed(config.from_run, source, digests := subject.digests())
            about = source.get("scenarios", {})
            with run.stage("score"), step(track, "score the statistics"):
                calibrated = rescored(config.from_run, subject, scores)
            run.begin(digests | codes_of(scores.values(), [*subject.existing]))
        else:
            material = load(config, run, layout, track)
            subject = material.subject
            scenarios = material.calibration[config.calibration.seed]
            check_scores(scores, subject)
            about = {name: list(subject.size(examples)[:2]) for name, examples in scenarios.items()}
            run.begin(material.inputs | codes_of(scores.values(), [*subject.existing]))
            passes = Passes(config.calibration.batch_size, config.remat, track)
            with run.stage("score") as stage:
                calibrated = kept_scores(run, subject, scenarios, config, scores, track)
                runner = runner_of(subject, scenarios, (), passes, cache_of(run))
                runner.steps = scores
                runner.first(calibrated)  # for chains on this text, as `saap prune --from-run`
                stage.tokens = sum(subject.size(examples).tokens for examples in scenarios.values())
        run.update(kind="score", scenarios=about, **structures_record(subject), **provenance())
        save_scores(run, calibrated)
        if left_out:
            run.update(left_out=left_out)

    run = run_job(config, work, overwrite=overwrite, track=track)
    return run, read_scores(run)


def check_scores(scores: dict[str, Score], subject: Subject) -> None:
    """Raise ValueError for an estimator that looks at what a model does not have."""
    for score in scores.values():
        score.check(subject, TextSize(0, 1))


def source_run(path: str, model: str) -> RunRecord:
    """Read the record of a run whose statistics are to be scored; raise where it is one of another model."""
    record = read_run(path)
    with reading(f"{path}/run.json", "a run's config.model"):
        of = record.get("config", {}).get("model")
    observed = of.get("name") if isinstance(of, dict) else of
    if observed != model:
        raise ValueError(f"from_run: {path} observed the model {observed}, got {model}; give --model {observed}")
    return record


def observing_run(path: str, model: str) -> RunRecord:
    """Read the record of the run that observed the text of a run's statistics."""
    record = source_run(path, model)
    with reading(f"{path}/run.json", "a run's config.from_run"):
        source = record["config"].get("from_run")
    if source:
        return source_run(str(source), model)
    return record


def check_observed(path: str, record: RunRecord, inputs: Mapping[str, str]) -> None:
    """Raise ValueError where a run, by the digests of its record, observed something else than is there now."""
    if other := changed_inputs(record, inputs):
        raise ValueError(
            f"from_run: {path} observed another {other[0]} than is there now, or of another type; bring back what it "
            "was, or leave out from_run"
        )


def calibration_of(config: PruneConfig) -> CalibrationConfig:
    """Tell on which text a model is pruned: with `from_run` that of the run's scores, of several seeds the first.

    Raises:
        ValueError: no run of the model, or one on other text than is asked for beside it.
    """
    path = config.from_run
    model = config.model.name
    asked = config.calibration
    if not path:
        return asked
    record = observing_run(path, model)
    with reading(f"{path}/run.json", "the fields of a calibration"):
        calibration = record["config"]["calibration"]
        known = CalibrationConfig(**{**calibration, "scenarios": tuple(calibration["scenarios"])})
        known = dataclasses.replace(known, seed=record.get("seeds", {}).get("calibration", [known.seed])[0])
    for name, value in vars(known).items():
        if getattr(asked, name) not in (value, getattr(CalibrationConfig(), name)):
            raise ValueError(
                f"calibration.{name}: expected {value}, as {path} has it, beside from_run, got {getattr(asked, name)}; "
                "leave it out, or prune without --from-run"
            )
    return known


def read_text(config: PruneConfig, subject: Subject, calibration: CalibrationConfig) -> Mapping[str, Examples]:
    """Read the text on which a model is pruned; with `from_run` it has to be what the run observed."""
    scenarios = subject.scenarios(calibration)
    if config.from_run:
        record = observing_run(config.from_run, config.model.name)
        check_observed(config.from_run, record, inputs_of(subject.digests(), {calibration.seed: scenarios}))
    return scenarios


def shown(config: ScoreConfig, result: tuple[RunDirectory, Calibrated]) -> Iterator[Any]:
    """Show how estimators rank units, and what scenarios have in common."""
    run, calibrated = result
    for scenario, scores in calibrated.scenarios.items():
        yield rank_table(scores, scenario if len(calibrated.scenarios) > 1 else None)
    if any(run.record["fusions"].values()):
        yield fusion_table(run.record["fusions"])
    if found := find_patterns(calibrated.scenarios):
        yield from (pattern_table(found, structure) for structure in found.structures)
    if left_out := run.record.get("left_out"):
        yield f"left out, since {config.from_run} does not serve them (--keep-statistics all): {', '.join(left_out)}"
    yield {"report": run.path / "report.html", "scores": run.path / "scores.npz"}
