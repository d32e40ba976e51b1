"""The main job: compare variants on one model, evaluate every candidate by masks, cut and check the best.

A variant is an estimator with its fusion and search; at a ratio, on the calibration text of a seed, it is a candidate.
Results are kept in a run directory as they come; the same configuration again does only what is missing.
"""

import dataclasses
import gc
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saap_jax.calibration import Calibrated, Track, check_estimators, check_scenarios, pairs, quiet, scenarios_of
from saap_jax.config import CompareConfig
from saap_jax.data import Windows, check_disjoint, evaluation_windows, parse_scenario
from saap_jax.discovery import count_parameters, discover, prunable_parameters
from saap_jax.evaluation.candidates import candidate_losses, keep_digest
from saap_jax.evaluation.cost import directory_bytes, forward_seconds, weight_bytes
from saap_jax.evaluation.perplexity import WindowLosses, metric_name
from saap_jax.evaluation.price import read_prices, run_cost
from saap_jax.kept import kept_scores
from saap_jax.llama import Llama, load_model, load_tokenizer, save_model
from saap_jax.llama.runs import existing_units
from saap_jax.pipeline import kept_parameters, perplexity, select_path, select_units, step, tokens_to_observe
from saap_jax.report import RunDirectory, provenance, write_report, write_scalars
from saap_jax.report.monitor import Stage
from saap_jax.report.rows import comparison_rows
from saap_jax.surgery import cut, keep_to_json
from saap_jax.types import STRUCTURES, Keep, Scores
from saap_jax.variants import ALL, Candidate, Variant, candidates_of, seeds_of, variants_of


def compare(config: CompareConfig, *, overwrite: bool = False, track: Track = quiet) -> RunDirectory:
    """Compare variants: score from one pass a seed, evaluate each candidate by masks, cut and check the best.

    Raises:
        ValueError: bad input, or a cut model whose perplexity is not that of the masked one.
    """
    check_estimators(config.estimation.estimators, config.fusion)
    variants = variants_of(config)
    for variant in variants:
        check_scenarios(config.calibration, variant.search)
    sources = [parse_scenario(text).source for text in config.calibration.scenarios]
    check_disjoint(sources, [config.evaluation.in_domain, config.evaluation.out_of_domain])
    prices = read_prices()  # a wrong table is refused before any time is spent
    run = RunDirectory.open(Path(config.runs) / config.name, dataclasses.asdict(config), overwrite=overwrite)
    if run.finished:
        return run
    with run.stage("load"), step(track, "load the model"):
        model = load_model(config.model.name, config.model.dtype)
        tokenizer = load_tokenizer(config.model.name)
    with run.stage("text"), step(track, "tokenise the texts"):
        calibration = {
            seed: scenarios_of(dataclasses.replace(config.calibration, seed=seed), tokenizer)
            for seed in seeds_of(config)
        }
        texts = evaluation_texts(config, tokenizer)
    equal: Scores = {name: np.ones(units.shape) for name, units in existing_units(model.runs).items()}
    for variant in variants:  # an impossible budget is refused before any time is spent
        for ratio in config.ratios:
            select_units(model, equal, ratio, variant.search, equal)
    run.begin()
    run.update(**_about(config, model, list(texts)))
    with run.stage("score") as stage:
        scores = _scores(config, run, model, calibration, variants, track, stage)
    candidates = candidates_of(variants, seeds_of(config), config.ratios)
    with run.stage("search"):
        keeps = kept_units(config, run, model, calibration, scores, candidates, track)
    with run.stage("evaluate") as stage:
        _evaluate(config, run, model, texts, candidates, keeps, track, stage)
    with run.stage("cut"), step(track, "cut the best, save it, load it back, check and time it"):
        _cut_best(config, run, model, tokenizer, texts, keeps)
    run.update(cost=run_cost(run.record, prices))
    write_scalars(run)
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


def _about(config: CompareConfig, model: Llama, metrics: list[str]) -> dict[str, Any]:
    """Describe the run: what was used, on what, and what the metrics mean."""
    structures = discover(model)
    return {
        "kind": "compare",
        **provenance(),
        "seeds": {"calibration": list(seeds_of(config))},
        "model": {
            "name": config.model.name,
            "parameters": count_parameters(model),
            "prunable_parameters": prunable_parameters(structures),
            "layers": len(model.spec.layers),
            "units": {name: max(structure.units) for name, structure in structures.items()},
        },
        "metrics": [{"name": n, "domain": d} for n, d in zip(metrics, ("in", "out"), strict=True)],
    }


# --- score and search ----------------------------------------------------------------------------


def _scores(
    config: CompareConfig,
    run: RunDirectory,
    model: Llama,
    calibration: Mapping[int, dict[str, Windows]],
    variants: Sequence[Variant],
    track: Track,
    stage: Stage,
) -> dict[int, Calibrated]:
    """Return the scores of each seed, all variants from one pass over its text; the first seed's are `scores.npz`."""
    first, plan = next(iter(calibration)), {variant.scores: (variant.estimator, variant.fusion) for variant in variants}
    adaptive = any(variant.search.allocation == "adaptive" for variant in variants)
    scores = {}
    for seed, scenarios in calibration.items():
        suffix = "" if seed == first else f"-seed{seed}"
        tokens = tokens_to_observe(run, scenarios, suffix)
        scores[seed] = kept_scores(
            run, model, scenarios, config, stability=adaptive, plan=plan, suffix=suffix, track=track
        )
        stage.tokens += tokens
    return scores


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
    path = run.path / "keeps.npz"
    arrays = run.load_arrays("keeps") if path.exists() else {}
    paths: dict[tuple[int, Variant], dict[float, str]] = {}
    for candidate in candidates:
        paths.setdefault((candidate.seed, candidate.variant), {})[candidate.ratio] = candidate.name
    for (seed, variant), names in paths.items():
        if all(f"{name}/{STRUCTURES[-1]}" in arrays for name in names.values()):
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
            arrays |= {f"{names[ratio]}/{part}": kept for part, kept in selection.keep.items()}
        if variant.search.rescore_every is not None:
            run.save_arrays("keeps", arrays)
    if not path.exists():
        run.save_arrays("keeps", arrays)
    keeps: dict[str, Keep] = {}
    for key, kept in arrays.items():
        name, _, part = key.rpartition("/")
        keeps.setdefault(name, {})[part] = kept
    return keeps


# --- evaluate ------------------------------------------------------------------------------------


def _evaluate(
    config: CompareConfig,
    run: RunDirectory,
    model: Llama,
    texts: dict[str, Windows],
    candidates: Sequence[Candidate],
    keeps: dict[str, Keep],
    track: Track,
    stage: Stage,
) -> None:
    """Evaluate the dense model and each candidate that the run does not hold yet; append as they finish.

    Equal keep-sets are evaluated once. The dense model is one of them, so that it differs in nothing from a candidate
    that removes nothing.
    """
    done = {row["candidate"] for row in run.candidates()}
    by_digest: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        by_digest.setdefault(keep_digest(keeps[candidate.name]), []).append(candidate)
    dense = existing_units(model.runs)
    sets = {keep_digest(dense): dense} | {digest: keeps[same[0].name] for digest, same in by_digest.items()}
    digests = list(sets)
    finished = {
        number
        for number, digest in enumerate(digests)
        if all(each.name in done for each in by_digest.get(digest, ())) and (number > 0 or "dense" in run.record)
    }
    windows = Windows(*(np.concatenate(parts) for parts in zip(*texts.values(), strict=True)))
    start = time.perf_counter()
    for group in candidate_losses(
        model,
        pairs(windows, config.evaluation.batch_size),
        list(sets.values()),
        done=finished,
        at_once=config.evaluation.candidates_at_once,
        progress=lambda groups: track("evaluate dense model and candidates", groups, len(groups)),
    ):
        seconds = (time.perf_counter() - start) / len(group)
        stage.tokens += len(group) * int(windows.mask.sum())
        for number, losses in group.items():
            measured = _measured(losses, texts) | {"seconds": seconds}
            if number == 0 and "dense" not in run.record:
                run.update(dense=measured | {"parameters": count_parameters(model)})
            same = by_digest.get(digests[number], [])
            for candidate in same:
                if candidate.name not in done:
                    twin = same[0].name if candidate is not same[0] else None
                    run.append(_row(candidate, model, keeps[candidate.name], measured, twin))
        start = time.perf_counter()


def _measured(losses: WindowLosses, texts: dict[str, Windows]) -> dict[str, Any]:
    """Return perplexity and mean loss of each window, by metric; `losses` holds the texts one behind the other."""
    ends = np.cumsum([len(windows.tokens) for windows in texts.values()])[:-1]
    parts = zip(texts, np.split(losses.sums, ends), np.split(losses.counts, ends), strict=True)
    each = {name: WindowLosses(sums, counts) for name, sums, counts in parts}
    return {
        "ppl": {name: part.perplexity for name, part in each.items()},
        "losses": {name: part.sums / part.counts for name, part in each.items()},
    }


def _row(candidate: Candidate, model: Llama, keep: Keep, measured: dict[str, Any], twin: str | None) -> dict[str, Any]:
    """Return the record of a candidate."""
    variant, parameters = candidate.variant, kept_parameters(model, keep)
    adaptive = variant.search.allocation == "adaptive"
    fusion = {"method": variant.fusion.method, "scope": variant.fusion.scope}
    return {
        "candidate": candidate.name,
        "variant": variant.name,
        "seed": candidate.seed,
        "estimator": variant.estimator,
        "fusion": fusion if variant.fused else None,
        "allocation": variant.search.allocation,
        "rank_by": variant.search.rank_by,
        "stability_weight": variant.search.stability_weight if adaptive else None,
        "scenario": variant.scenario,
        "ratio_asked": candidate.ratio,
        "ratio_actual": (count_parameters(model) - parameters) / prunable_parameters(discover(model)),
        "parameters": parameters,
        **measured,
        "kept": {name: keep[name].sum(axis=1) for name in STRUCTURES},
        "keep": keep_digest(keep),
        "same_as": twin,
    }


# --- the best one --------------------------------------------------------------------------------


def best_candidate(run: RunDirectory, ratio: float) -> dict[str, Any]:
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
