"""The method from end to end: the calls in their order. Read this file first.

    load model and text -> observe and score (2a) -> fuse (2b) -> search (2c) -> mask and evaluate -> compensate and cut
    (2d) -> save

The first half are the few functions that a Python session needs, the second half what `saap score` and `saap evaluate`
run. Pruning to a ratio or to targets is in `pruning`, the comparison of estimators in `comparison`, their judgement by
the oracle in `fidelity`.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from saap_jax.calibration import (
    Calibrated,
    Track,
    calibrate,
    check_estimators,
    check_scenarios,
    lengths_of,
    pairs,
    quiet,
    scenarios_of,
)
from saap_jax.config import ScoreConfig
from saap_jax.config_use import EvaluateConfig
from saap_jax.data import Windows, evaluation_windows
from saap_jax.digests import inputs_of
from saap_jax.discovery import count_parameters, discover, query_head_parameters, unit_costs
from saap_jax.evaluation.perplexity import metric_name, window_losses
from saap_jax.evaluation.tasks.likelihood import Progress
from saap_jax.evaluation.tasks.named import find_tasks, run_named
from saap_jax.kept import kept_scores, read_scores, rescored, save_scores, served, statistics_path
from saap_jax.llama import Llama, load_model, load_tokenizer
from saap_jax.llama.runs import existing_units
from saap_jax.options import EstimationConfig, FusionConfig, SearchConfig
from saap_jax.query_stage import heads_of
from saap_jax.report import RunDirectory, provenance, read_run
from saap_jax.report.files import check_target, write_atomically
from saap_jax.report.finish import Ending, finish, job
from saap_jax.report.kinds.tasks import Evaluated, evaluation_json
from saap_jax.search import Selection, search
from saap_jax.sharding import Layout, layout_of_job
from saap_jax.surgery import masks
from saap_jax.types import QUERY_HEADS, STRUCTURES, Keep, Remat, Scores


@contextlib.contextmanager
def step(track: Track, doing: str) -> Iterator[None]:
    """Show a step that cannot be counted as one item of work."""
    items = track(doing, [None], 1)
    next(items)
    yield
    next(items, None)


# --- what a Python session needs -----------------------------------------------------------------


def score_units(
    model: Llama, windows: Windows, estimators: Iterable[str], *, batch_size: int = 8, track: Track = quiet
) -> dict[str, Scores]:
    """Return the scores of `calibrate`: `{estimator: {structure: [layers, units]}}`, larger = more important."""
    calibrated = calibrate(model, windows, estimators, batch_size=batch_size, track=track)
    return {name: calibrated.scores(name) for name in calibrated.estimators}


def select_units(
    model: Llama,
    scores: Scores,
    ratio: float,
    config: SearchConfig | None = None,
    stability: Scores | None = None,
    gone: Keep | None = None,
) -> Selection:
    """Choose the units to keep so that at least `ratio` of the model's prunable parameters goes; see `search`."""
    config, costs = config or SearchConfig(), unit_costs(discover(model))
    return search(scores, costs, existing_units(model.runs), ratio, config, stability, gone)


def select_calibrated(
    model: Llama,
    calibrated: Calibrated,
    estimator: str,
    ratio: float,
    config: SearchConfig,
    gone: Keep | None = None,
) -> Selection:
    """Choose the units to keep by one estimator; `config` says how scenarios are reduced and what has to be stable."""
    scores = calibrated.scores(estimator, config.scenario_reduction)
    adaptive = config.allocation == "adaptive"
    stability = calibrated.indicator(estimator, config.stability_over) if adaptive else None
    return select_units(model, scores, ratio, config, stability, gone)


def select_path(
    model: Llama,
    calibrated: Calibrated,
    scenarios: Mapping[str, Windows],
    estimator: str,
    ratios: Iterable[float],
    config: SearchConfig,
    *,
    fusion: FusionConfig | None = None,
    batch_size: int = 8,
    remat: Remat = "dots",
    track: Track = quiet,
) -> dict[float, Selection]:
    """Choose the units to keep at each ratio, estimating again on the way there if `config.rescore_every` says so.

    A score tells what a unit matters to the model as it is. Once others are gone, what is left matters more, and not
    all of it equally: so the model is observed again, with the removed units masked and all statistics anew, whenever
    a share `rescore_every` has gone. Removed units stay removed on the way to higher ratios.

    Args:
        calibrated: scores of the whole model.
        scenarios: the calibration text of each scenario; read only on the way.
        ratios: shares of the prunable parameters, in any order.
    """
    ratios = tuple(ratios)
    selections: dict[float, Selection] = {}
    gone = None
    for ratio in checkpoints(ratios, config.rescore_every):
        if gone is not None:
            keep = {name: units & ~gone[name] for name, units in existing_units(model.runs).items()}
            calibrated = calibrate(
                model,
                scenarios,
                [estimator],
                fusion=fusion,
                stability=config.allocation == "adaptive",
                keep=keep,
                batch_size=batch_size,
                remat=remat,
                track=track,
            )
        selections[ratio] = select_calibrated(model, calibrated, estimator, ratio, config, gone)
        if config.rescore_every is not None:
            gone = {name: ~kept for name, kept in selections[ratio].keep.items()}
    return {ratio: selections[ratio] for ratio in ratios}


def checkpoints(ratios: Iterable[float], every: float | None) -> list[float]:
    """Return the ratios of a path in ascending order: those asked for, and the multiples of `every` on the way there.

    >>> checkpoints((0.5, 0.2), 0.15)
    [0.15, 0.2, 0.3, 0.45, 0.5]
    """
    asked = sorted(set(ratios))
    if every is None:
        return asked
    steps = [round(n * every, 9) for n in range(1, math.ceil(asked[-1] / every))]
    return sorted(set(asked) | {step for step in steps if step < asked[-1] and not np.isclose(step, asked).any()})


def perplexity(model: Llama, windows: Windows, keep: Keep | None = None, *, batch_size: int = 8) -> float:
    """Return exp(mean next-token loss) over the windows; with `keep`, of the model with all other units masked."""
    return window_losses(model, pairs(windows, batch_size), None if keep is None else masks(keep)).perplexity


def kept_parameters(model: Llama, keep: Keep) -> int:
    """Count the parameters that a model has after a cut."""
    exists, costs = existing_units(model.runs), unit_costs(discover(model))
    removed = sum(((exists[n] & ~keep[n]).sum(axis=1) * costs[n]).sum() for n in STRUCTURES)
    if QUERY_HEADS in keep:  # those of kept KV heads
        heads = keep[QUERY_HEADS]
        gone = heads_of(keep["attention"], model.spec.layers, heads.shape) & ~heads
        removed += gone.sum() * query_head_parameters(model)
    return count_parameters(model) - int(removed)


# --- what the commands run -----------------------------------------------------------------------


SCORED = Ending(page=True, further=("scores.npz", "stability.npz"))


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
    check_estimators(config.estimation.estimators, config.fusion)
    importance = config.patterns.importance
    if importance and importance not in config.estimation.estimators:
        names = ", ".join(config.estimation.estimators)
        raise ValueError(f"patterns.importance: expected one of estimation.estimators ({names}), got {importance!r}")
    if not config.from_run:
        check_scenarios(config.calibration, SearchConfig())
    layout = layout_of_job(config.mesh, **{"calibration.batch_size": config.calibration.batch_size})
    with job(config, SCORED, overwrite=overwrite) as run:
        if not run.finished:
            _score(config, run, layout, left_out, track)
    return run, read_scores(run)


def _score(config: ScoreConfig, run: RunDirectory, layout: Layout | None, left_out: list[str], track: Track) -> None:
    """Do what `score_run` does, as far as the run does not hold it yet."""
    source = source_run(config.from_run, config.model.name) if config.from_run else {}
    with run.stage("load"), step(track, "load the model"):
        lengths = {} if config.from_run else lengths_of(config)
        model = load_model(config.model.name, config.model.dtype, layout=layout, lengths=lengths)
    if config.from_run:
        with run.stage("score"), step(track, "score the statistics"):
            calibrated = rescored(config.from_run, model, config.estimation.estimators, config.fusion)
        about = source.get("scenarios", {})
        run.begin(inputs_of(model))
        save_scores(run, calibrated)
    else:
        scenarios = scenarios_of(config.calibration, load_tokenizer(config.model.name))
        about = {name: list(windows.tokens.shape) for name, windows in scenarios.items()}
        run.begin(inputs_of(model, {config.calibration.seed: scenarios}))
        with run.stage("score") as stage:
            tokens = tokens_to_observe(run, scenarios)
            kept_scores(run, model, scenarios, config, stability=True, keep=config.keep_statistics, track=track)
            stage.tokens = tokens
    run.update(kind="score", scenarios=about, **provenance())
    if left_out:
        run.update(left_out=left_out)
    finish(run, SCORED)


def tokens_to_observe(run: RunDirectory, scenarios: Mapping[str, Windows], suffix: str = "") -> int:
    """Count the calibration tokens, without padding, that `kept_scores` has yet to observe.

    None of a run that holds its scores (`scores<suffix>.npz`), nor of a scenario whose statistics it keeps.
    """
    if run.has(f"scores{suffix}.npz"):
        return 0
    new = [windows for name, windows in scenarios.items() if not run.has(str(statistics_path(Path(), name)))]
    return sum(int(windows.mask.sum()) for windows in new)


def source_run(path: str, model: str) -> dict:
    """Return the record of a run whose statistics are to be scored; raise where it is one of another model."""
    record = read_run(path)
    of = record.get("config", {}).get("model")
    observed = of.get("name") if isinstance(of, dict) else of
    if observed != model:
        raise ValueError(f"from_run: {path} observed the model {observed}, got {model}; give --model.name {observed}")
    return record


def evaluate(config: EvaluateConfig, *, track: Track = quiet) -> dict[str, Evaluated]:
    """Return the perplexity of every model on every text and its results on tasks; one model is in memory at a time.

    The results are written to `config.json` if it is named.
    """
    check_target("json", config.json)
    layout = layout_of_job(config.mesh, batch_size=config.batch_size)
    if layout is not None and config.tasks:
        raise ValueError(f"tasks: expected none on a mesh of several devices, got {', '.join(config.tasks)}")
    rows, tasks = {}, find_tasks(config)
    for name in track("evaluate models", config.models, len(config.models)):
        lengths = {"length": config.length} if config.sources else {}
        model, tokenizer = load_model(name, config.dtype, layout=layout, lengths=lengths), load_tokenizer(name)
        ppl = {}
        for source in config.sources:
            windows = evaluation_windows(source, tokenizer, config.length, config.windows or None)
            ppl[metric_name(config.length, source)] = perplexity(model, windows, batch_size=config.batch_size)
        results = run_named(model, tokenizer, tasks, batch_size=config.batch_size, progress=scoring(track, name))
        rows[name] = Evaluated(count_parameters(model), ppl, results)
    if config.json:
        write_atomically(Path(config.json), evaluation_json(rows))
    return rows


def scoring(track: Track, name: str) -> Progress:
    """Return what shows the progress of a model's tasks."""
    return lambda batches: track(f"score tasks of {name}", batches, len(batches))
