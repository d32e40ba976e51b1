"""How a job begins, holds its run, and ends: with everything that its command names, before it says "finished".

`check` refuses what cannot work before any time is spent, `run_job` holds the run directory, `load` brings model and
text into memory.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from saap_jax.config.jobs import FidelityConfig, ScoreConfig
from saap_jax.data.sources import check_disjoint
from saap_jax.data.windows import parse_scenario
from saap_jax.jobs.since import Config, warn_of_changes
from saap_jax.llama.attention import attending
from saap_jax.report.blocks import Column, Table
from saap_jax.report.render import table_csv
from saap_jax.runs.commands import command_of
from saap_jax.runs.directory import RunDirectory, now, write_scalars
from saap_jax.runs.scores import Run
from saap_jax.runtime.digests import inputs_of
from saap_jax.runtime.files import held
from saap_jax.runtime.mesh import Layout, layout_of_job
from saap_jax.runtime.processes import alone, is_primary
from saap_jax.runtime.progress import Track, quiet, step
from saap_jax.subjects.base import Examples, Subject
from saap_jax.subjects.llama import open_subject
from saap_jax.wings import wing


class Material(NamedTuple):
    """What a job works on."""

    subject: Subject
    calibration: dict[int, dict[str, Examples]]
    """Calibration examples by seed and scenario."""
    texts: dict[str, Examples]
    """What the model is judged on by metric, the one of the calibration domain first; none of a job that judges
    nothing."""
    inputs: dict[str, str]
    """Digests of all this, see `RunDirectory.begin`."""


def check(config: Config) -> Layout | None:
    """Check what a configuration names, as far as that takes neither model nor tokenizer; return where arrays lie.

    Raises:
        ValueError: an unknown estimator or source, a text that serves calibration and evaluation, or batches that the
            devices do not divide.
    """
    sizes = {"calibration.batch_size": config.calibration.batch_size}
    sources = []
    if not config.model.traced:
        sources = [parse_scenario(text).source for text in config.calibration.scenarios]
    if not isinstance(config, FidelityConfig | ScoreConfig):
        if not config.model.traced:
            check_disjoint(sources, [config.evaluation.in_domain, config.evaluation.out_of_domain])
        sizes["evaluation.batch_size"] = config.evaluation.batch_size
    return layout_of_job(config.mesh, **sizes)


def load(config: Config, run: RunDirectory, layout: Layout | None, track: Track, seeds: Sequence[int] = ()) -> Material:
    """Load the model and the examples that a configuration names, as stages of the run.

    Args:
        seeds: of the calibration examples; that of the configuration if none is given.
    """
    with run.stage("load"), step(track, "load the model"):
        subject = open_subject(config.model, layout=layout, lengths=lengths_of(config))
    with run.stage("text"), step(track, "tokenise the texts"):
        return _read(config, subject, seeds)


def _read(config: Config, subject: Subject, seeds: Sequence[int] = ()) -> Material:
    calibration = {
        seed: subject.scenarios(dataclasses.replace(config.calibration, seed=seed))
        for seed in seeds or (config.calibration.seed,)
    }
    if isinstance(config, FidelityConfig | ScoreConfig):
        texts = {}
    else:
        texts = subject.texts(config.evaluation)
    return Material(subject, calibration, texts, inputs_of(subject.digests(), calibration, texts))


def _digests(config: Config, track: Track) -> dict[str, str]:
    """Digest the model and the text that a configuration names, as they are now."""
    with step(track, "see whether the model and the text are those of the run"):
        subject = open_subject(config.model, layout=check(config), lengths=lengths_of(config))
        if isinstance(config, ScoreConfig) and config.from_run:  # reads no text
            return subject.digests()
        return _read(config, subject, getattr(config, "seeds_drawn", ())).inputs


def lengths_of(config: Any) -> dict[str, int]:
    """Name the lengths of the windows that a job calibrates and evaluates on, as `load_model` takes them."""
    parts = {name: getattr(config, name, None) for name in ("calibration", "data", "evaluation")}
    return {f"{name}.length": part.length for name, part in parts.items() if part is not None}


Files = Callable[[RunDirectory], dict[str, str]]
"""Makes tables and figures, by file name, of what a run holds alone."""


def run_job(
    config: Any,
    work: Callable[[RunDirectory], None],
    files: Files = lambda run: {},
    *,
    overwrite: bool | None = False,
    track: Track = quiet,
) -> RunDirectory:
    """Open the run directory of a configuration (its `runs` and `name`), hold it while `work` does what it does not
    hold yet, and finish it: with `files`, the report and the scalars. Programs compute attention as the configuration
    says. A finished run is returned as it is, at once; where its model or text is another now, with a warning.

    Raises:
        ValueError: see `RunDirectory.open`; or another process holds the run.
    """
    options: dict[str, Any] = {"overwrite": overwrite, "command": command_of(config)}

    recovers = isinstance(config.model, str)  # a directory, which the run does not watch
    path = Path(config.runs) / config.name
    run = RunDirectory.open(path, dataclasses.asdict(config), **options)
    if run.finished:
        if not recovers:
            warn_of_changes(config, run, lambda: _digests(config, track))
        return run
    if recovers:
        attention = config.attention
    else:
        attention = config.model.attention
    with attending(attention), held(path, f"the run {path}"):
        run = RunDirectory.open(path, dataclasses.asdict(config), **options)  # another may have gone on meanwhile
        if not run.finished:
            work(run)
            _finish(run, files)
    return run


def _finish(run: RunDirectory, files: Files) -> None:
    """Write what follows from what the run holds, and then say that it is finished."""
    write_scalars(run)
    if rows := list(Run(run.path, run.record, run.candidates()).rows()):
        timed = ("seconds", "tokens_per_second")  # a run that was killed and went on has the same table
        columns = [Column(name, (name,)) for name in rows[0] if name not in timed]
        run.save_text("results.csv", table_csv(Table("results", columns, rows)))
    for name, text in files(run).items():
        run.save_text(name, text)
    run.update(finished=now())
    if is_primary():
        with alone():
            wing("write_report")(run.path, status="finished")
    run.update(status="finished")
