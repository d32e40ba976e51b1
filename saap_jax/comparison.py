"""The main job: compare estimators on one model, evaluate every candidate by masks, cut and check the best.

Results are kept in a run directory as they come; the same configuration again does only what is missing.
"""

import dataclasses
import gc
import time
from pathlib import Path
from typing import Any

import numpy as np

from saap_jax.config import CompareConfig
from saap_jax.data import Windows, check_disjoint, evaluation_windows
from saap_jax.discovery import count_parameters, discover, prunable_parameters
from saap_jax.evaluation.cost import directory_bytes, forward_seconds, weight_bytes
from saap_jax.evaluation.perplexity import metric_name
from saap_jax.llama import Llama, load_model, load_tokenizer, save_model
from saap_jax.llama.runs import existing_units
from saap_jax.pipeline import (
    Calibrated,
    Track,
    calibration_of,
    check_estimators,
    kept_parameters,
    kept_scores,
    perplexity,
    quiet,
    select_units,
    step,
)
from saap_jax.report import RunDirectory, provenance, write_report
from saap_jax.surgery import cut, keep_to_json
from saap_jax.types import STRUCTURES, Scores


def compare(config: CompareConfig, *, overwrite: bool = False, track: Track = quiet) -> RunDirectory:
    """Compare estimators: score from one pass, evaluate each candidate by masks, cut and check the best.

    Raises:
        ValueError: bad input, or a cut model whose perplexity is not that of the masked one.
    """
    check_estimators(config.estimation.estimators, config.fusion)
    check_disjoint([config.calibration.source], [config.evaluation.in_domain, config.evaluation.out_of_domain])
    run = RunDirectory.open(Path(config.runs) / config.name, dataclasses.asdict(config), overwrite=overwrite)
    if run.finished:
        return run
    with run.stage("load"), step(track, "load the model"):
        model = load_model(config.model.name, config.model.dtype)
        tokenizer = load_tokenizer(config.model.name)
    with run.stage("text"), step(track, "tokenise the texts"):
        calibration = calibration_of(config.calibration, tokenizer)
        texts = evaluation_texts(config, tokenizer)
    equal: Scores = {name: np.ones(units.shape) for name, units in existing_units(model.runs).items()}
    for ratio in config.ratios:  # an impossible budget is refused before any time is spent
        select_units(model, equal, ratio, config.search, equal)
    run.begin()
    run.update(**_about(config, model, list(texts)))
    with run.stage("score"):
        scores = kept_scores(run, model, calibration, config, config.search.allocation == "adaptive", track)
    with run.stage("evaluate"):
        _evaluate_candidates(config, run, model, texts, scores, track)
    with run.stage("cut"), step(track, "cut the best, save it, load it back, check and time it"):
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


def _evaluate_candidates(
    config: CompareConfig,
    run: RunDirectory,
    model: Llama,
    texts: dict[str, Windows],
    calibrated: Calibrated,
    track: Track,
) -> None:
    """Evaluate the dense model and each candidate that the run does not hold yet; append as they finish."""
    size = config.evaluation.batch_size
    done = {candidate["candidate"] for candidate in run.candidates()}
    todo: list[tuple[str, float] | None] = [None] if "dense" not in run.record else []
    chosen = {
        (name, ratio): select_units(model, calibrated.scores[name], ratio, config.search, calibrated.stability)
        for ratio in config.ratios
        for name in config.estimation.estimators
    }
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
    calibrated: Calibrated,
) -> None:
    """Cut the best candidate, save it, load it back, and check and measure what was loaded beside the dense model."""
    best = best_candidate(run, config.best_ratio)
    scores = calibrated.scores[best["estimator"]]
    keep = select_units(model, scores, config.best_ratio, config.search, calibrated.stability).keep
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
