"""How well do estimators predict the exact effect of removing a unit? What `saap fidelity` runs."""

from collections.abc import Iterator
from typing import Any

from saap_jax.config.jobs import FidelityConfig
from saap_jax.errors import reading
from saap_jax.estimation.ablation import changes_from_lines, changes_to_lines, sample_units
from saap_jax.evaluation.rank_correlation import fidelity
from saap_jax.jobs.candidates import cache_of, runner_of
from saap_jax.jobs.job import check, load, run_job
from saap_jax.jobs.score import check_scores, scores_of
from saap_jax.report.pages.fidelity import correlations, fidelity_table
from saap_jax.report.write import finding_files
from saap_jax.runs.directory import RunDirectory
from saap_jax.runs.scores import read_changes, save_scores
from saap_jax.runtime.digests import provenance
from saap_jax.runtime.files import append_line
from saap_jax.runtime.progress import Passes, Track, quiet
from saap_jax.subjects.base import explained, joined, structures_record


def judge(config: FidelityConfig, *, overwrite: bool | None = False, track: Track = quiet) -> RunDirectory:
    """Compare every estimator's scores with the oracle, the exact change of loss on the calibration windows themselves.

    Ablation is the longest job: finished units are appended to `ablation.jsonl`, and the same call goes on from there.
    """
    # a wrong word is refused at once
    estimators = scores_of(config.estimators)
    layout = check(config)

    def work(run: RunDirectory) -> None:
        material = load(config, run, layout, track)
        subject = material.subject
        scenarios = material.calibration[config.calibration.seed]
        run.begin(material.inputs)
        about = {name: list(subject.size(examples)[:2]) for name, examples in scenarios.items()}
        run.update(kind="fidelity", scenarios=about, **structures_record(subject), **provenance())
        check_scores(estimators, subject)
        with run.stage("score") as stage:
            passes = Passes(config.calibration.batch_size, config.remat, track)
            runner = runner_of(subject, scenarios, (), passes, cache_of(run))
            runner.steps = estimators
            save_scores(run, runner.first())
            stage.tokens = sum(subject.size(examples).tokens for examples in scenarios.values())
        units = sample_units(subject.existing, config.channels_per_layer, config.seed)
        path = run.claim("ablation.jsonl")
        known = set(units)
        there = {}
        if path.exists():
            with reading(path, "changes of loss; remove the file, and the same command measures them again"):
                there = changes_from_lines(path.read_text())
        with run.stage("ablate"), explained("fidelity", subject, scenarios, config.calibration.batch_size):
            subject.ablate(
                joined([*scenarios.values()]),
                units,
                batch_size=config.calibration.batch_size,
                done={unit: change for unit, change in there.items() if unit in known},
                save=lambda changes: append_line(path, changes_to_lines(changes).encode()),
                progress=lambda groups: track("ablate units", groups, len(groups)),
            )
        scores, exact = read_changes(run)
        windows = sum(rows for rows, *_ in run.record["scenarios"].values())
        rows = fidelity(scores, exact, windows=windows, resamples=config.resamples, seed=config.seed)
        run.save_json("fidelity", [row._asdict() for row in rows])

    return run_job(config, work, finding_files, overwrite=overwrite, track=track)


def shown(config: FidelityConfig, run: RunDirectory) -> Iterator[Any]:
    """Show the rank correlations of each scope."""
    rows = correlations(run)
    yield from (fidelity_table(rows, scope) for scope in dict.fromkeys(row.scope for row in rows))
    yield {"report": run.path / "report.html", "beside it": "fidelity.svg, fidelity.md, fidelity.csv"}
