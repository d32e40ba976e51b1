"""What `saap compare FACTORY` and `saap prune FACTORY` run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from saap_jax.config.registries import ALLOCATIONS
from saap_jax.config.traced import TracedCompareConfig, TracedPruneConfig
from saap_jax.discovery.tracing.factory import made_problem
from saap_jax.evaluation.resample import FEWEST
from saap_jax.jobs.job import Ending, finish, job
from saap_jax.llama.segments import masks
from saap_jax.report.figures.couplings import coupling_record
from saap_jax.report.kinds.traced import traced_files
from saap_jax.runs.digests import digest_of
from saap_jax.runs.directory import RunDirectory
from saap_jax.runs.standing import DENSE
from saap_jax.runtime.locks import held
from saap_jax.runtime.progress import Track, quiet, step
from saap_jax.runtime.provenance import provenance
from saap_jax.selection.search import Selection
from saap_jax.traced.saved import described, save_pruned
from saap_jax.traced.select import (
    calibrate,
    check_ratios_met,
    check_traced_estimators,
    count_parameters,
    prunable_parameters,
    select,
)
from saap_jax.traced.subject import Losses, Subject, check_cut, cut, cut_losses, subject_of
from saap_jax.types import Keep

ENDING = Ending(lambda run: traced_files(run.record, run.candidates()), page=True)


def compare(config: TracedCompareConfig, *, overwrite: bool = False, track: Track = quiet) -> RunDirectory:
    """Compare estimators on a factory's model, each candidate judged by masks; the best of each ratio is cut to check.

    Raises:
        ValueError: bad input, or a cut model whose held-out loss is not that of the masked one.
    """
    check_traced_estimators(config.estimators, config.fusion)
    with job(config, ENDING, overwrite=overwrite) as run:
        if not run.finished:
            _compare(config, run, track)
    return run


def _compare(config: TracedCompareConfig, run: RunDirectory, track: Track) -> None:
    """Do what `compare` does; of a run that was killed, all of it again."""
    with step(track, "trace the model"):
        subject = subject_of(made_problem(config.factory), norms=config.norms, refused=config.refused)
    check_ratios_met(subject, config.ratios, config.search)  # before any time is spent
    problem = subject.problem
    run.begin(
        {
            "parameters": digest_of(problem.params),
            "calibration": digest_of(problem.calibration),
            "held-out examples": digest_of(problem.held_out),
        }
    )
    run.update(kind="traced", **about_subject(config.factory, subject), **provenance())
    adaptive = ALLOCATIONS[config.search.allocation].stability
    with run.stage("score"):
        calibrated = calibrate(
            subject,
            config.estimators,
            fusion=config.fusion,
            stability=adaptive,
            batch_size=config.batch_size,
            track=track,
        )
    with run.stage("search"):
        selections = {
            (estimator, ratio): select(subject, calibrated, estimator, ratio, config.search)
            for ratio in config.ratios
            for estimator in config.estimators
        }
    with run.stage("evaluate"):
        rows = evaluated(run, subject, selections, config, track)
    with run.stage("cut"), step(track, "cut the best of each ratio and check it"):
        run.update(best=[_best(subject, rows, selections, ratio, config.batch_size) for ratio in config.ratios])
    run.update(couplings=coupling_record(subject.traced))
    finish(run, ENDING)


def evaluated(
    run: RunDirectory,
    subject: Subject,
    selections: dict[tuple[str, float], Selection],
    config: TracedCompareConfig,
    track: Track,
) -> list[dict[str, Any]]:
    """Judge the dense model and every selection on the held-out examples by masks, and keep the results."""
    losses = Losses(subject, batch_size=config.batch_size)
    problem, dense = subject.problem, losses.of(subject.ones, subject.problem.params, subject.problem.held_out)
    total, prunable = count_parameters(subject.traced.shapes), prunable_parameters(subject)
    rows = [{"candidate": DENSE, "loss": float(dense.mean()), "parameters": total}]
    for (estimator, ratio), selection in track("evaluate candidates", selections.items(), len(selections)):
        each = losses.of(masks(selection.keep), problem.params, problem.held_out)
        rows.append(
            {
                "candidate": f"{estimator}@{ratio:g}",
                "estimator": estimator,
                "ratio_asked": ratio,
                "ratio": selection.removed / prunable,
                "parameters": total - selection.removed,
                "loss": float(each.mean()),
                "change": float((each - dense).mean()),
                "change_error": float((each - dense).std(ddof=1) / np.sqrt(len(each)))
                if len(each) >= FEWEST
                else np.nan,
                "kept": {name: int(kept.sum(1)[0]) for name, kept in selection.keep.items()},
            }
        )
    for row in rows:
        if not np.isfinite(row["loss"]):
            raise ValueError(f"evaluation: the held-out loss of {row['candidate']} is not finite: {row['loss']}")
        run.append(row)
    return rows


def _best(
    subject: Subject,
    rows: Sequence[dict[str, Any]],
    selections: dict[tuple[str, float], Selection],
    ratio: float,
    batch_size: int,
) -> dict[str, Any]:
    """Cut the candidate of lowest loss at a ratio and return its losses, masked and cut."""
    best = min((row for row in rows if row.get("ratio_asked") == ratio), key=lambda row: row["loss"])
    keep = selections[best["estimator"], ratio].keep
    return {
        "candidate": best["candidate"],
        "masked": best["loss"],
        "cut": checked_cut(subject, keep, best["loss"], batch_size),
    }


def checked_cut(subject: Subject, keep: Keep, masked: float, batch_size: int) -> float:
    """Return the mean held-out loss of the cut model; raise ValueError unless it is that of the masked one."""
    _, params = cut(subject, keep)
    loss = float(cut_losses(subject, keep, params, batch_size).mean())
    check_cut(subject, masked, loss)
    return loss


class PrunedModel(NamedTuple):
    """What `prune` did."""

    selection: Selection
    structures: list[tuple[str, int, int, int]]
    """Name, copies, units before and after, of each structure."""
    parameters: tuple[int, int]
    losses: tuple[float, float]
    """Held-out, of the dense and of the cut model."""
    own_code: str
    """What the model's own code does with the smaller parameters."""


def prune(config: TracedPruneConfig, *, track: Track = quiet) -> PrunedModel:
    """Prune a factory's model by one estimator, check the cut model against the masked one, and save it.

    Raises:
        ValueError: bad input, a ratio that cannot be met, or a cut model that is not the masked one.
        FileExistsError: the directory exists.
    """
    out = Path(config.out)
    with held(out, f"out: {out}"):
        if out.exists():
            raise ValueError(f"out: expected a directory that does not exist yet, found {out}; choose another --out")
        return _prune(config, out, track)


def _prune(config: TracedPruneConfig, out: Path, track: Track) -> PrunedModel:
    """Do what `prune` does, into a directory that nobody else writes."""
    check_traced_estimators([config.estimator], config.fusion)
    with step(track, "trace the model"):
        subject = subject_of(made_problem(config.factory), norms=config.norms, refused=config.refused)
    check_ratios_met(subject, [config.ratio], config.search)
    calibrated = calibrate(
        subject,
        [config.estimator],
        fusion=config.fusion,
        stability=ALLOCATIONS[config.search.allocation].stability,
        batch_size=config.batch_size,
        track=track,
    )
    selection = select(subject, calibrated, config.estimator, config.ratio, config.search)
    problem, losses = subject.problem, Losses(subject, batch_size=config.batch_size)
    with step(track, "cut, check and save"):
        dense = float(losses.of(subject.ones, problem.params, problem.held_out).mean())
        masked = float(losses.of(masks(selection.keep), problem.params, problem.held_out).mean())
        after = checked_cut(subject, selection.keep, masked, config.batch_size)
        about = {
            "factory": config.factory,
            "estimator": config.estimator,
            "ratio_asked": selection.asked,
            "ratio": selection.actual,
            "held_out_loss": {"dense": dense, "masked": masked, "cut": after},
        }
        function, params = save_pruned(out, subject, selection.keep, about)
    total = count_parameters(subject.traced.shapes)
    widths = [(s.name, s.copies, s.units, int(selection.keep[s.name].sum(1)[0])) for s in subject.structures]
    said = own_code(subject, function, params)
    return PrunedModel(selection, widths, (total, total - selection.removed), (dense, after), said)


def own_code(subject: Subject, function: Any, params: Any) -> str:
    """Say what the model's own code makes of the smaller parameters, beside the pruned program."""
    problem = subject.problem
    inputs = problem.inputs(problem.row(problem.held_out, 0)[0])
    try:
        own = jax.tree.leaves(problem.function(params, *inputs))
    except Exception as error:  # whatever the user's code says about sizes
        first = " ".join(str(error).split())[:120]
        return f"the model's own code does not take the smaller parameters ({type(error).__name__}: {first})"
    pruned = jax.tree.leaves(function(params, *inputs))
    same = all(
        a.shape == b.shape
        and np.allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(np.asarray(b, np.float64)).max(initial=0))
        for a, b in zip(own, pruned, strict=True)
    )
    return f"the model's own code takes the smaller parameters, with {'the same' if same else 'other'} outputs"


def about_subject(factory: str, subject: Subject) -> dict[str, Any]:
    """Return what a run records of a subject."""
    return {
        "model": {
            "name": factory,
            "parameters": count_parameters(subject.traced.shapes),
            "prunable_parameters": prunable_parameters(subject),
        },
        "structures": [described(each) for each in subject.structures],
    }
