"""The method from end to end: the calls in their order. Read this file first.

    load model and text -> observe and score (2a) -> search (2c) -> mask and evaluate -> cut the best (2d) -> measure

The first half are the few functions that a Python session needs; the second half is the comparison that `saap compare`
runs, which keeps its results in a run directory and picks up what is already there.
"""

import dataclasses
import gc
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from saap_jax.config import CalibrationConfig, CompareConfig, EvaluateConfig, PruneConfig, ScoreConfig, SearchConfig
from saap_jax.data import Windows, batches, calibration_windows, check_disjoint, evaluation_windows
from saap_jax.discovery import count_parameters, discover, prunable_parameters, unit_costs
from saap_jax.estimation import make_estimators, observe, score, union_of_needs
from saap_jax.evaluation.cost import directory_bytes, forward_seconds, weight_bytes
from saap_jax.evaluation.perplexity import metric_name, window_losses
from saap_jax.llama import Llama, load_model, load_tokenizer, save_model
from saap_jax.llama.runs import existing_units
from saap_jax.report import RunDirectory, provenance, read_run, write_report
from saap_jax.search import Selection, search
from saap_jax.surgery import cut, keep_to_json, masks
from saap_jax.types import STRUCTURES, Keep, Remat, Scores

Track = Callable[[str, Iterable[Any], int], Iterator[Any]]
"""Wraps an iterable, to show progress: (what is being done, items, how many)."""


def quiet(doing: str, items: Iterable[Any], total: int) -> Iterator[Any]:
    """Show no progress."""
    return iter(items)


# --- what a Python session needs -----------------------------------------------------------------


def score_units(
    model: Llama,
    windows: Windows,
    estimators: Iterable[str],
    *,
    batch_size: int = 8,
    remat: Remat = "dots",
    track: Track = quiet,
) -> dict[str, Scores]:
    """Score every unit of a model by every estimator named, from one pass over the calibration windows.

    Returns:
        `{estimator: {"attention": [layers, kv_heads], "mlp": [layers, mlp]}}`, larger = more important.
    """
    made = make_estimators(estimators)
    pairs = _pairs(windows, batch_size)
    statistics = observe(
        model,
        pairs,
        union_of_needs(made.values()),
        remat=remat,
        progress=lambda items: track("observe the calibration text", items, len(pairs)),
    )
    return score(made, statistics, model)


def select_units(model: Llama, scores: Scores, ratio: float, config: SearchConfig | None = None) -> Selection:
    """Choose the units to keep so that at least `ratio` of the model's prunable parameters goes."""
    return search(scores, unit_costs(discover(model)), existing_units(model.runs), ratio, config or SearchConfig())


def perplexity(model: Llama, windows: Windows, keep: Keep | None = None, *, batch_size: int = 8) -> float:
    """Return exp(mean next-token loss) over the windows; with `keep`, of the model with all other units masked."""
    return window_losses(model, _pairs(windows, batch_size), None if keep is None else masks(keep)).perplexity


def kept_parameters(model: Llama, keep: Keep) -> int:
    """Count the parameters that a model has after a cut."""
    exists, costs = existing_units(model.runs), unit_costs(discover(model))
    removed = sum(((exists[n] & ~keep[n]).sum(axis=1) * costs[n]).sum() for n in STRUCTURES)
    return count_parameters(model) - int(removed)


def _pairs(windows: Windows, batch_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(batch.tokens, batch.mask) for batch, _ in batches(windows, min(batch_size, len(windows.tokens)))]


# --- the comparison --------------------------------------------------------------------------------


def score_run(
    config: ScoreConfig, *, overwrite: bool = False, track: Track = quiet
) -> tuple[RunDirectory, dict[str, Scores]]:
    """Score every unit by every estimator, and keep the scores in a run directory (or return those it holds)."""
    make_estimators(config.estimation.estimators)
    run = RunDirectory.open(Path(config.runs) / config.name, dataclasses.asdict(config), overwrite=overwrite)
    if not run.finished:
        with run.stage("load"):
            model, tokenizer = load_model(config.model.name, config.model.dtype), load_tokenizer(config.model.name)
        with run.stage("score"):
            calibration = _calibration(config.calibration, tokenizer)
            kept_scores(run, model, calibration, config, track)
        run.update(kind="score", status="finished", **provenance())
    return run, read_scores(run)


class Pruned(NamedTuple):
    """What `prune` did."""

    selection: Selection
    parameters: tuple[int, int]
    """Before and after."""
    bytes: tuple[int, int]
    """Of the weights in memory before, of the saved file after."""
    runs: int


def prune(config: PruneConfig, *, track: Track = quiet) -> Pruned:
    """Prune a model by one estimator at one ratio, and save the smaller model as a directory."""
    out = Path(config.out)
    if out.exists():
        raise ValueError(f"out: expected a directory that does not exist yet, found {out}; choose another --out")
    estimators = make_estimators([config.estimator])
    model = load_model(config.model.name, config.model.dtype)
    tokenizer = load_tokenizer(config.model.name)
    if config.from_run:
        scores = read_scores(RunDirectory(Path(config.from_run), read_run(config.from_run)))
        if config.estimator not in scores:
            raise ValueError(f"from_run: {config.from_run} has no scores of {config.estimator}; it has {list(scores)}")
    else:
        calibration = _calibration(config.calibration, tokenizer)
        size = config.calibration.batch_size
        scores = score_units(model, calibration, estimators, batch_size=size, remat=config.remat, track=track)
    selection = select_units(model, scores[config.estimator], config.ratio, config.search)
    pruned = cut(model, selection.keep)
    save_model(pruned, out, tokenizer=tokenizer, keep=selection.keep)
    return Pruned(
        selection=selection,
        parameters=(count_parameters(model), count_parameters(pruned)),
        bytes=(weight_bytes(model), directory_bytes(out, "*.safetensors")),
        runs=len(pruned.runs),
    )


class Evaluated(NamedTuple):
    """Perplexities of one model, by metric name."""

    parameters: int
    ppl: dict[str, float]


def evaluate(config: EvaluateConfig, *, track: Track = quiet) -> dict[str, Evaluated]:
    """Return the perplexity of every model on every text; one model is in memory at a time."""
    rows = {}
    for name in track("evaluate models", config.models, len(config.models)):
        model, tokenizer = load_model(name, config.dtype), load_tokenizer(name)
        ppl = {}
        for source in config.sources:
            windows = evaluation_windows(source, tokenizer, config.length, config.windows or None)
            ppl[metric_name(config.length, source)] = perplexity(model, windows, batch_size=config.batch_size)
        rows[name] = Evaluated(count_parameters(model), ppl)
    return rows


def compare(config: CompareConfig, *, overwrite: bool = False, track: Track = quiet) -> RunDirectory:
    """Compare estimators: score from one pass, evaluate each candidate by masks, cut and check the best.

    Results are kept in the run directory as they come; the same configuration again does only what is missing.

    Raises:
        ValueError: bad input, or a cut model whose perplexity is not that of the masked one.
    """
    estimators = make_estimators(config.estimation.estimators)
    check_disjoint([config.calibration.source], [config.evaluation.in_domain, config.evaluation.out_of_domain])
    run = RunDirectory.open(Path(config.runs) / config.name, dataclasses.asdict(config), overwrite=overwrite)
    if run.finished:
        return run
    with run.stage("load"):
        model = load_model(config.model.name, config.model.dtype)
        tokenizer = load_tokenizer(config.model.name)
    with run.stage("text"):
        calibration = _calibration(config.calibration, tokenizer)
        texts = evaluation_texts(config, tokenizer)
    run.update(**_about(config, model, list(texts)))
    with run.stage("score"):
        scores = kept_scores(run, model, calibration, config, track)
    with run.stage("evaluate"):
        _evaluate_candidates(config, run, model, texts, scores, list(estimators), track)
    with run.stage("cut"):
        _cut_best(config, run, model, tokenizer, texts, scores)
    run.update(status="finished")
    write_report(run.path)
    return run


def evaluation_texts(config: CompareConfig, tokenizer: Any) -> dict[str, Windows]:
    """Return the evaluation windows by metric name, the calibration domain first."""
    texts = {}
    for source in (config.evaluation.in_domain, config.evaluation.out_of_domain):
        texts[metric_name(config.evaluation.length, source)] = evaluation_windows(
            source, tokenizer, config.evaluation.length, config.evaluation.windows or None
        )
    return texts


def candidate_name(estimator: str, ratio: float) -> str:
    """Return the name of a candidate within a run.

    >>> candidate_name("gate_fisher", 0.2)
    'gate_fisher@0.2'
    """
    return f"{estimator}@{ratio:g}"


def _about(config: CompareConfig, model: Llama, metrics: list[str]) -> dict[str, Any]:
    """Describe the run: what was used, on what, and what the metrics mean."""
    structures = discover(model)
    return {
        "kind": "compare",
        **provenance(),
        "seeds": {"calibration": config.calibration.seed},
        "model": {
            "name": config.model.name,
            "parameters": count_parameters(model),
            "prunable_parameters": prunable_parameters(structures),
            "layers": len(model.spec.layers),
            "units": {name: max(structure.units) for name, structure in structures.items()},
        },
        "metrics": [{"name": n, "domain": d} for n, d in zip(metrics, ("in", "out"), strict=True)],
    }


def kept_scores(
    run: RunDirectory, model: Llama, calibration: Windows, config: CompareConfig | ScoreConfig, track: Track
) -> dict[str, Scores]:
    """Return the scores that the run holds, or make and keep them."""
    if not (run.path / "scores.npz").exists():
        scores = score_units(
            model,
            calibration,
            config.estimation.estimators,
            batch_size=config.calibration.batch_size,
            remat=config.estimation.remat,
            track=track,
        )
        run.save_arrays("scores", {f"{name}/{part}": value for name, s in scores.items() for part, value in s.items()})
    return read_scores(run)


def read_scores(run: RunDirectory) -> dict[str, Scores]:
    """Read the scores that a run keeps: `{estimator: {structure: [layers, units]}}`."""
    scores: dict[str, Scores] = {}
    for key, value in run.load_arrays("scores").items():
        name, _, structure = key.rpartition("/")
        scores.setdefault(name, {})[structure] = value
    return scores


def _calibration(config: CalibrationConfig, tokenizer: Any) -> Windows:
    return calibration_windows(config.source, tokenizer, config.examples, config.length, config.seed)


def _evaluate_candidates(
    config: CompareConfig,
    run: RunDirectory,
    model: Llama,
    texts: dict[str, Windows],
    scores: dict[str, Scores],
    estimators: list[str],
    track: Track,
) -> None:
    """Evaluate the dense model and each candidate that the run does not hold yet; append as they finish."""
    size = config.evaluation.batch_size
    done = {candidate["candidate"] for candidate in run.candidates()}
    todo: list[tuple[str, float] | None] = [None] if "dense" not in run.record else []
    # all selections are made first: an impossible budget is refused before any time is spent
    chosen = {(n, r): select_units(model, scores[n], r, config.search) for r in config.ratios for n in estimators}
    todo += [pair for pair in chosen if candidate_name(*pair) not in done]
    for pair in track("evaluate dense model and candidates", todo, len(todo)):
        start = time.perf_counter()
        keep = None if pair is None else chosen[pair].keep
        ppl = {name: perplexity(model, windows, keep, batch_size=size) for name, windows in texts.items()}
        seconds = time.perf_counter() - start
        if pair is None:
            run.update(dense={"ppl": ppl, "parameters": count_parameters(model), "seconds": seconds})
            continue
        selection = chosen[pair]
        run.append(
            {
                "candidate": candidate_name(*pair),
                "estimator": pair[0],
                "allocation": config.search.allocation,
                "ratio_asked": selection.asked,
                "ratio_actual": selection.actual,
                "parameters": kept_parameters(model, selection.keep),
                "ppl": ppl,
                "seconds": seconds,
                "kept": {name: selection.keep[name].sum(axis=1) for name in STRUCTURES},
            }
        )


def best_candidate(run: RunDirectory, ratio: float) -> dict[str, Any]:
    """Return the candidate at a ratio with the lowest perplexity out of the calibration domain."""
    metric = next(metric["name"] for metric in run.record["metrics"] if metric["domain"] == "out")
    rows = [candidate for candidate in run.candidates() if candidate["ratio_asked"] == ratio]
    return min(rows, key=lambda row: row["ppl"][metric] if np.isfinite(row["ppl"][metric]) else np.inf)


def _cut_best(
    config: CompareConfig,
    run: RunDirectory,
    model: Llama,
    tokenizer: Any,
    texts: dict[str, Windows],
    scores: dict[str, Scores],
) -> None:
    """Cut the best candidate, save it, load it back, and check and measure what was loaded beside the dense model."""
    best = best_candidate(run, config.best_ratio)
    keep = select_units(model, scores[best["estimator"]], config.best_ratio, config.search).keep
    directory = run.path / "best"
    run.save_json("keep", keep_to_json(keep))
    if not directory.exists():
        save_model(cut(model, keep), directory, tokenizer=tokenizer, keep=keep)
    gc.collect()
    loaded = load_model(directory, config.model.dtype)
    size = config.evaluation.batch_size
    ppl = {name: perplexity(loaded, windows, batch_size=size) for name, windows in texts.items()}
    for name, value in ppl.items():
        if not abs(value - best["ppl"][name]) <= 1e-3 * best["ppl"][name]:
            raise ValueError(
                f"{directory}: expected the cut model to have the masked one's {name} of {best['ppl'][name]:.4f} "
                f"within 1e-3, got {value:.4f}; please report this with {run.path / 'run.json'}"
            )
    tokens = next(iter(texts.values())).tokens[:size]
    dense_seconds, seconds = forward_seconds([model, loaded], tokens)
    run.update(
        best={
            "candidate": best["candidate"],
            "parameters": count_parameters(loaded),
            "bytes": directory_bytes(directory, "*.safetensors"),
            "dense_bytes": weight_bytes(model),
            "forward_seconds": seconds,
            "dense_forward_seconds": dense_seconds,
            "forward_tokens": int(tokens.size),
            "ppl": ppl,
            "ppl_masked": best["ppl"],
            "runs": len(loaded.runs),
        }
    )
