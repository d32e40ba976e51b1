"""The main job: compare variants on one model, evaluate every candidate by masks, cut and check the best.

A variant is an estimator with its fusion and search; at a ratio, on the calibration text of a seed, it is a candidate.
Results are kept in a run directory as they come; the same configuration again does only what is missing.
"""

import dataclasses
import gc
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from saap_jax.api import perplexity, select_path, select_units
from saap_jax.config.jobs import CompareConfig
from saap_jax.config.method import ALL
from saap_jax.data import Windows
from saap_jax.discovery import count_parameters
from saap_jax.discovery.listing import traced_model
from saap_jax.evaluation.cost import directory_bytes, forward_seconds, weight_bytes
from saap_jax.evaluation.price import Price, read_prices, run_cost
from saap_jax.jobs.job import Ending, check, finish, job, load
from saap_jax.jobs.sweep import Compensate, Evaluator, about_run, compensator, scores_of_seeds, unpruned
from saap_jax.llama import Llama, load_model, save_model
from saap_jax.llama.segments import existing_units
from saap_jax.report.figures.couplings import coupling_files, coupling_record
from saap_jax.report.suggestions import suggestions_of
from saap_jax.runs.directory import RunDirectory
from saap_jax.runs.keeps import read_keeps, save_keeps
from saap_jax.runs.records import Row
from saap_jax.runs.standing import comparison_rows
from saap_jax.runtime.mesh import Layout
from saap_jax.runtime.processes import broadcast
from saap_jax.runtime.progress import Track, quiet, step
from saap_jax.selection.calibrate import Calibrated
from saap_jax.selection.variants import Candidate, Variant, candidates_of, seeds_of, variants_of
from saap_jax.surgery.cut import cut, keep_to_json
from saap_jax.types import Keep, Scores

ENDING = Ending(lambda run: coupling_files(run.record), page=True, further=("keeps.npz", "best"))


def compare(config: CompareConfig, *, overwrite: bool = False, track: Track = quiet) -> RunDirectory:
    """Compare variants: score from one pass a seed, evaluate each candidate by masks, cut and check the best.

    Raises:
        ValueError: bad input, or a cut model whose perplexity is not that of the masked one.
    """
    if config.best_ratio is None:
        config = dataclasses.replace(config, best_ratio=config.cut_ratio)  # on record is what was done
    variants = variants_of(config)
    layout = check(config)
    prices = read_prices()  # a wrong table is refused before any time is spent
    with job(config, ENDING, overwrite=overwrite) as run:
        if not run.finished:
            _compare(config, run, variants, layout, prices, track)
    return run


def _compare(
    config: CompareConfig,
    run: RunDirectory,
    variants: Sequence[Variant],
    layout: Layout | None,
    prices: Sequence[Price],
    track: Track,
) -> None:
    """Do what `compare` does, as far as the run does not hold it yet."""
    material = load(config, run, layout, track, seeds_of(config))
    model, calibration, texts = material.model, material.calibration, material.texts
    equal: Scores = {name: np.ones(units.shape) for name, units in existing_units(model.runs).items()}
    for variant in variants:  # an impossible budget is refused before any time is spent
        for ratio in config.ratios:
            select_units(model, equal, ratio, variant.search, equal)
    run.begin(material.inputs)
    run.update(**about_run("compare", config.model.name, model, list(texts), seeds_of(config)))
    with run.stage("score") as stage:
        scores = scores_of_seeds(config, run, model, calibration, variants, track, stage)
    candidates = candidates_of(variants, seeds_of(config), config.ratios)
    with run.stage("search"):
        keeps = kept_units(config, run, model, calibration, scores, candidates, track)
    with run.stage("evaluate") as stage:
        at_once = min(config.evaluation.candidates_at_once, 1 + len(candidates))
        compensated = compensator(config, model, calibration)
        evaluator = Evaluator(run, model, texts, config.evaluation, at_once, compensated)
        evaluator.measure(
            unpruned(model) | {candidate.name: keeps[candidate.name] for candidate in candidates},
            {candidate.name: candidate.about for candidate in candidates},
            doing="evaluate dense model and candidates",
            track=track,
            stage=stage,
        )
    evaluator.check_rows()
    with run.stage("cut"), step(track, "cut the best, save it, load it back, check and time it"):
        _cut_best(config, run, model, material.tokenizer, compensated, texts, keeps, layout)
    run.update(cost=run_cost(run.record, prices))
    run.update(couplings=coupling_record(traced_model(model)))
    run.update(suggestions=[each._asdict() for each in suggestions_of(run.record, run.candidates())])
    finish(run, ENDING)


# --- search ------------------------------------------------------------------------------------


def kept_units(
    config: CompareConfig,
    run: RunDirectory,
    model: Llama,
    calibration: Mapping[int, dict[str, Windows]],
    scores: Mapping[int, Calibrated],
    candidates: Sequence[Candidate],
    track: Track = quiet,
) -> dict[str, Keep]:
    """Return which units each candidate keeps, as the run's `keeps.npz` holds them, or search and keep them.

    Searching takes a moment, but with `rescore_every` some passes over the text a variant; so its keep-sets are written
    as soon as they are known.
    """
    keeps = read_keeps(run, model, {candidate.name: candidate.ratio for candidate in candidates})
    known = len(keeps)
    paths: dict[tuple[int, Variant], dict[float, list[str]]] = {}
    for candidate in candidates:
        path_names = paths.setdefault((candidate.seed, candidate.variant.chosen), {})
        path_names.setdefault(candidate.ratio, []).append(candidate.name)
    for (seed, variant), names in paths.items():
        if all(name in keeps for each in names.values() for name in each):
            continue
        own = scores[seed].renamed(variant.scores, variant.estimator)
        alone = variant.scenario != ALL
        selections = select_path(
            model,
            own.only(variant.scenario) if alone else own,
            {variant.scenario: calibration[seed][variant.scenario]} if alone else calibration[seed],
            variant.estimator,
            list(names),
            variant.search,
            fusion=variant.fusion,
            batch_size=config.calibration.batch_size,
            remat=config.estimation.remat,
            track=track,
        )
        for ratio, selection in selections.items():
            keeps |= dict.fromkeys(names[ratio], selection.keep)
        if variant.search.rescore_every is not None:
            save_keeps(run, keeps)
    if len(keeps) > known:
        save_keeps(run, keeps)
    return keeps


# --- the best one --------------------------------------------------------------------------------


def best_candidate(run: RunDirectory, ratio: float) -> Row:
    """Return the candidate of the first seed of the variant that has the lowest perplexity out of domain at a ratio."""
    candidates = run.candidates()
    rows = comparison_rows(run.record, candidates)
    best = next(row.label for row in rows if row.asked == ratio)
    first = run.record["seeds"]["calibration"][0]
    return next(row for row in candidates if (row["variant"], row["ratio_asked"], row["seed"]) == (best, ratio, first))


def _cut_best(
    config: CompareConfig,
    run: RunDirectory,
    model: Llama,
    tokenizer: Any,
    compensated: Compensate,
    texts: dict[str, Windows],
    keeps: dict[str, Keep],
    layout: Layout | None,
) -> None:
    """Cut the best candidate, save it, load it back, and check and measure what was loaded beside the dense model."""
    best = best_candidate(run, config.cut_ratio)
    keep = keeps[best["candidate"]]
    directory = run.claim("best")
    run.save_json("keep", keep_to_json(keep))
    if not run.has("best"):
        whole = compensated({**best}, keep)
        save_model(cut(whole, keep), directory, tokenizer=tokenizer, keep=keep)
    gc.collect()
    loaded = load_model(directory, config.model.dtype, layout=layout and layout.lenient())
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
            "bytes": broadcast(lambda: directory_bytes(directory, "*.safetensors")),
            "dense_bytes": weight_bytes(model),
            "forward_seconds": seconds,
            "dense_forward_seconds": dense_seconds,
            "forward_tokens": int(tokens.size),
            "ppl": ppl,
            "ppl_masked": best["ppl"],
            "runs": len(loaded.runs),
        }
    )
