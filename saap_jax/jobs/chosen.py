"""Which units go: to a ratio, or as few as targets allow; by new scores or those of a run."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from saap_jax.config.method import CalibrationConfig
from saap_jax.config.prune import PruneConfig
from saap_jax.config.registries import ALLOCATIONS
from saap_jax.evaluation.targets import Costs, Target
from saap_jax.jobs.score import source_run
from saap_jax.runs.directory import RunDirectory, plain
from saap_jax.runs.records import RunRecord
from saap_jax.runs.scores import read_scores, rescored, statistics_path
from saap_jax.runtime.processes import broadcast
from saap_jax.runtime.progress import Track, quiet
from saap_jax.selection.bisection import bisected
from saap_jax.selection.calibrate import Calibrated, calibrate
from saap_jax.selection.choose import choose_calibrated, choose_path, chosen_again, most_removable
from saap_jax.selection.search import Selection
from saap_jax.selection.variants import is_fused
from saap_jax.subjects.base import Examples, Subject
from saap_jax.subjects.llama import LlamaSubject
from saap_jax.surgery.cut import pruned_spec
from saap_jax.types import Keep

DEFAULT_RATIO = 0.2
"""Share of the prunable parameters that goes where neither a ratio nor a target says more."""


Recalibrate = Callable[[Keep], Calibrated]
"""Returns the scores of a model that keeps only some units."""


def chosen_units(
    config: PruneConfig,
    subject: Subject,
    scenarios: Mapping[str, Examples],
    calibration: CalibrationConfig,
    track: Track = quiet,
    *,
    costs: Costs | None = None,
    targets: Sequence[Target] = (),
) -> Selection:
    """Choose the units to keep, by the scores of a run or new ones."""
    options: dict[str, Any] = {
        "fusion": config.fusion,
        "batch_size": calibration.batch_size,
        "remat": config.remat,
        "track": track,
    }
    ratio = ratio_of(config)
    adaptive = ALLOCATIONS[config.search.allocation].stability
    observe = functools.partial(calibrate, subject, scenarios, [config.estimator], stability=adaptive, **options)
    calibrated = _calibrated_by(config, subject) if config.from_run else observe()
    if targets and costs is not None:
        assert isinstance(subject, LlamaSubject)
        spec = subject.model.spec
        selection = select_smallest(
            subject, calibrated, config, lambda keep: costs.of(pruned_spec(spec, keep)), targets,
            lambda keep: observe(keep=keep),
        )  # fmt: skip
        own = {"batch_size": calibration.batch_size, "track": track}
        return chosen_again(subject, selection, scenarios, config.search, config.compensation, **own)
    options["compensation"] = config.compensation
    return choose_path(subject, calibrated, scenarios, config.estimator, [ratio], config.search, **options)[ratio]


def ratio_of(config: PruneConfig) -> float:
    """Return the share of the prunable parameters that goes where no target says how much."""
    return DEFAULT_RATIO if config.ratio is None else config.ratio


def select_smallest(
    subject: Subject,
    calibrated: Calibrated,
    config: PruneConfig,
    costs: Callable[[Keep], Mapping[str, float]],
    targets: Sequence[Target],
    recalibrate: Recalibrate,
) -> Selection:
    """Choose the units to keep at the smallest ratio, to `TOLERANCE`, at which all targets hold.

    Found by bisection, since each target is met the better the more goes; with `rescore_every`, within the first step
    at whose end they hold.

    Raises:
        ValueError: targets that do not hold at the largest ratio that the search can meet.
    """
    search, existing = config.search, subject.existing
    top = most_removable(subject, search)
    every, least = search.rescore_every or top or 1.0, config.ratio or 0.0
    if least > top:
        raise ValueError(f"ratio: expected at most {top:.4f}, the largest that the search can meet, got {least}")
    ends = sorted({*(round(n * every, 9) for n in range(1, math.ceil(top / every))), top})
    low, gone = 0.0, None

    def select(ratio: float) -> Selection:
        return choose_calibrated(subject, calibrated, config.estimator, ratio, search, gone)

    def missed(keep: Keep) -> list[str]:
        found = costs(keep)
        return [f"{t.name} {t.asked} ({found[t.name]:.4g})" for t in targets if not t.holds(found[t.name])]

    for end in ends:
        if end >= least and not missed(select(end).keep):
            return bisected(max(low, least), end, select, lambda keep: not missed(keep))
        if end < top:
            keep = select(end).keep
            low, calibrated = end, recalibrate(keep)
            gone = {name: units & ~keep[name] for name, units in existing.items()}
    raise ValueError(
        f"targets: cannot be met by removing {top:.2%} of the prunable parameters, the most that the search can: "
        f"{', '.join(missed(select(top).keep))}; ask for less, or relax search.min_keep, max_ratio, skip_layers, …"
    )


def calibration_of(path: str, model: str) -> CalibrationConfig:
    """Return on which text a run's scores were made: of several seeds, the first."""
    record = source_run(path, model)
    if record["config"].get("from_run"):
        record = source_run(record["config"]["from_run"], model)
    calibration = record["config"]["calibration"]
    try:
        known = CalibrationConfig(**{**calibration, "scenarios": tuple(calibration["scenarios"])})
        return dataclasses.replace(known, seed=record.get("seeds", {}).get("calibration", [known.seed])[0])
    except TypeError as error:
        raise ValueError(f"from_run: {path}: expected the fields of a calibration, got others ({error})") from None


def _check_model(config: PruneConfig, record: RunRecord, subject: Subject) -> None:
    """Raise where a run has scored another model, or by another loss, under the same name, as far as it says."""
    inputs, of = record.get("inputs", {}), record["config"]["model"]
    if isinstance(of, dict) and of.get("dtype") == config.model.dtype:
        for name, digest in subject.digests().items():
            if inputs.get(name, digest) != digest:
                raise ValueError(
                    f"from_run: {config.from_run} has scored another {name} of the name {config.model.name}, which has "
                    "changed since; leave from_run out to score it now"
                )


def _check_fusion(config: PruneConfig, record: RunRecord) -> None:
    """Raise where a run has fused an estimator otherwise than the configuration does."""
    if not is_fused(config.estimator, config.fusion):
        return
    ours, theirs = plain(dataclasses.asdict(config.fusion)), record["config"].get("fusion", {})
    if differ := [name for name in ours if theirs.get(name, ours[name]) != ours[name]]:
        raise ValueError(
            f"fusion.{differ[0]}: expected {theirs[differ[0]]}, by which {config.from_run} has fused "
            f"{config.estimator}, got {ours[differ[0]]}; give the same, or leave from_run out to score now"
        )


def _calibrated_by(config: PruneConfig, subject: Subject) -> Calibrated:
    """Return the scores that a run holds, or else score the statistics that it holds."""
    record = source_run(config.from_run, config.model.name)
    _check_model(config, record, subject)
    calibrated = read_scores(RunDirectory(Path(config.from_run), record))
    if config.estimator in calibrated.estimators:
        _check_fusion(config, record)
        return calibrated
    if not all(broadcast(statistics_path(Path(config.from_run), name).exists) for name in calibrated.scenarios):
        known = ", ".join(calibrated.estimators)
        raise ValueError(
            f"from_run: {config.from_run} has no scores of {config.estimator} and no statistics; it has {known}. For "
            "others, run `saap score` with --keep-statistics all"
        )
    return rescored(config.from_run, subject, [config.estimator], config.fusion)
