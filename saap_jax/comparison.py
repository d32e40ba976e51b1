"""The main job: compare estimators on one model, evaluate every candidate by masks, cut and check the best.

Results are kept in a run directory as they come; the same configuration again does only what is missing.
"""

import dataclasses
import gc
import time
from pathlib import Path
from typing import Any

import numpy as np

from saap_jax.calibration import Calibrated, Track, check_estimators, check_scenarios, kept_scores, quiet, scenarios_of
from saap_jax.config import CompareConfig
from saap_jax.data import Windows, check_disjoint, evaluation_windows, parse_scenario
from saap_jax.discovery import count_parameters, discover, prunable_parameters
from saap_jax.evaluation.cost import directory_bytes, forward_seconds, weight_bytes
from saap_jax.evaluation.perplexity import metric_name
from saap_jax.llama import Llama, load_model, load_tokenizer, save_model
from saap_jax.llama.runs import existing_units
from saap_jax.pipeline import kept_parameters, perplexity, select_path, select_units, step
from saap_jax.report import RunDirectory, provenance, write_report
from saap_jax.surgery import cut, keep_to_json
from saap_jax.types import STRUCTURES, Keep, Scores


def compare(config: CompareConfig, *, overwrite: bool = False, track: Track = quiet) -> RunDirectory:
    """Compare estimators: score from one pass, evaluate each candidate by masks, cut and check the best.

    Raises:
        ValueError: bad input, or a cut model whose perplexity is not that of the masked one.
    """
    check_estimators(config.estimation.estimators, config.fusion)
    check_scenarios(config.calibration, config.search)
    sources = [parse_scenario(text).source for text in config.calibration.scenarios]
    check_disjoint(sources, [config.evaluation.in_domain, config.evaluation.out_of_domain])
    run = RunDirectory.open(Path(config.runs) / config.name, dataclasses.asdict(config), overwrite=overwrite)
    if run.finished:
        return run
    with run.stage("load"), step(track, "load the model"):
        model = load_model(config.model.name, config.model.dtype)
        tokenizer = load_tokenizer(config.model.name)
    with run.stage("text"), step(track, "tokenise the texts"):
        calibration = scenarios_of(config.calibration, tokenizer)
        texts = evaluation_texts(config, tokenizer)
    equal: Scores = {name: np.ones(units.shape) for name, units in existing_units(model.runs).items()}
    for ratio in config.ratios:  # an impossible budget is refused before any time is spent
        select_units(model, equal, ratio, config.search, equal)
    run.begin()
    run.update(**_about(config, model, list(texts)))
    with run.stage("score"):
        adaptive = config.search.allocation == "adaptive"
        scores = kept_scores(run, model, calibration, config, stability=adaptive, track=track)
    with run.stage("search"):
        keeps = kept_units(config, run, model, calibration, scores, track)
    with run.stage("evaluate"):
        _evaluate_candidates(config, run, model, texts, keeps, track)
    with run.stage("cut"), step(track, "cut the best, save it, load it back, check and time it"):
        _cut_best(config, run, model, tokenizer, texts, keeps)
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


def kept_units(
    config: CompareConfig,
    run: RunDirectory,
    model: Llama,
    calibration: dict[str, Windows],
    calibrated: Calibrated,
    track: Track = quiet,
) -> dict[str, Keep]:
    """Return which units each candidate keeps, as the run's `keeps.npz` holds them, or search and keep them.

    Searching takes a moment, but with `rescore_every` some passes over the text an estimator; so an estimator's
    keep-sets are written as soon as they are known.
    """
    path = run.path / "keeps.npz"
    arrays = run.load_arrays("keeps") if path.exists() else {}
    for name in config.estimation.estimators:
        if all(f"{candidate_name(name, ratio)}/{STRUCTURES[-1]}" in arrays for ratio in config.ratios):
            continue
        selections = select_path(
            model,
            calibrated,
            calibration,
            name,
            config.ratios,
            config.search,
            fusion=config.fusion,
            batch_size=config.calibration.batch_size,
            remat=config.estimation.remat,
            track=track,
        )
        for ratio, selection in selections.items():
            arrays |= {f"{candidate_name(name, ratio)}/{part}": kept for part, kept in selection.keep.items()}
        if config.search.rescore_every is not None:
            run.save_arrays("keeps", arrays)
    if not path.exists():
        run.save_arrays("keeps", arrays)
    keeps: dict[str, Keep] = {}
    for key, kept in arrays.items():
        candidate, _, part = key.rpartition("/")
        keeps.setdefault(candidate, {})[part] = kept
    return keeps


def _evaluate_candidates(
    config: CompareConfig,
    run: RunDirectory,
    model: Llama,
    texts: dict[str, Windows],
    keeps: dict[str, Keep],
    track: Track,
) -> None:
    """Evaluate the dense model and each candidate that the run does not hold yet; append as they finish."""
    size = config.evaluation.batch_size
    done = {candidate["candidate"] for candidate in run.candidates()}
    todo: list[tuple[str, float] | None] = [None] if "dense" not in run.record else []
    pairs = [(name, ratio) for ratio in config.ratios for name in config.estimation.estimators]
    todo += [pair for pair in pairs if candidate_name(*pair) not in done]
    prunable = prunable_parameters(discover(model))
    for pair in track("evaluate dense model and candidates", todo, len(todo)):
        start = time.perf_counter()
        keep = None if pair is None else keeps[candidate_name(*pair)]
        ppl = {name: perplexity(model, windows, keep, batch_size=size) for name, windows in texts.items()}
        seconds = time.perf_counter() - start
        if pair is None or keep is None:
            run.update(dense={"ppl": ppl, "parameters": count_parameters(model), "seconds": seconds})
            continue
        parameters = kept_parameters(model, keep)
        run.append(
            {
                "candidate": candidate_name(*pair),
                "estimator": pair[0],
                "allocation": config.search.allocation,
                "ratio_asked": pair[1],
                "ratio_actual": (count_parameters(model) - parameters) / prunable,
                "parameters": parameters,
                "ppl": ppl,
                "seconds": seconds,
                "kept": {name: keep[name].sum(axis=1) for name in STRUCTURES},
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
    keeps: dict[str, Keep],
) -> None:
    """Cut the best candidate, save it, load it back, and check and measure what was loaded beside the dense model."""
    best = best_candidate(run, config.best_ratio)
    keep = keeps[best["candidate"]]
    directory = run.claim("best")
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
