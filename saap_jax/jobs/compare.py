"""The main job: compare variants on one model, evaluate every candidate by masks, cut and check the best.

A variant is an estimator with its fusion and search; at a ratio, on the calibration text of a seed, it is a candidate.
Results are kept in a run directory as they come; the same configuration again does only what is missing.
"""

import dataclasses
import gc
import math
from collections.abc import Callable, Mapping, Sequence

from saap_jax.config.jobs import CompareConfig
from saap_jax.config.method import ALL
from saap_jax.evaluation.cost import directory_bytes
from saap_jax.evaluation.price import Price, read_prices, run_cost
from saap_jax.evaluation.scales import scale_of
from saap_jax.jobs import origins
from saap_jax.jobs.job import Ending, check, finish, job, load
from saap_jax.jobs.racing import Race, check_race
from saap_jax.jobs.sweep import (
    Compensate,
    Evaluator,
    about_run,
    check_compensations,
    compensator,
    methods_of,
    scores_of_seeds,
    unpruned,
)
from saap_jax.jobs.written import written_by
from saap_jax.report.figures.couplings import coupling_files
from saap_jax.runs.directory import RunDirectory
from saap_jax.runs.keeps import Training, read_keeps, save_keeps
from saap_jax.runs.records import Row
from saap_jax.runs.standing import DENSE, comparison_rows
from saap_jax.runs.suggestions import suggestions_of
from saap_jax.runtime.mesh import Layout, taken_in
from saap_jax.runtime.processes import broadcast
from saap_jax.runtime.progress import Track, quiet, step
from saap_jax.selection.calibrate import Calibrated
from saap_jax.selection.choose import check_ratios, choose_path
from saap_jax.selection.search import Selection
from saap_jax.selection.variants import Candidate, Variant, candidates_of, seeds_of, variants_of
from saap_jax.subjects.base import Examples, Subject
from saap_jax.surgery.cut import keep_to_json
from saap_jax.types import Keep

ENDING = Ending(lambda run: coupling_files(run.record), further=("keeps.npz", "best"))


@taken_in
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
    subject, calibration, texts = material.subject, material.calibration, material.texts
    for search in dict.fromkeys(variant.search for variant in variants):
        check_ratios(subject, config.ratios, search)  # an impossible budget is refused before any time is spent
    check_compensations(config, subject, calibration)
    if config.race:
        check_race(subject, texts, config.evaluation)
    run.begin(material.inputs)
    run.update(**about_run("compare", subject, list(texts), seeds_of(config), methods_of(config)))
    with run.stage("score") as stage:
        scores = scores_of_seeds(config, run, subject, calibration, variants, track, stage)
    candidates = candidates_of(variants, seeds_of(config), config.ratios)
    with run.stage("search"):
        keeps = kept_units(config, run, subject, calibration, scores, candidates, track)
    with run.stage("evaluate") as stage:
        at_once = min(config.evaluation.candidates_at_once, 1 + len(candidates))
        compensated = compensator(config, subject, calibration)
        evaluator = Evaluator(run, subject, texts, config.evaluation, at_once, compensated)
        chosen = {candidate.name: keeps[candidate.name] for candidate in candidates}
        about = {candidate.name: candidate.about for candidate in candidates}
        first = {} if config.race else chosen
        doing = "evaluate dense model" + " and candidates" * bool(first)
        evaluator.measure(unpruned(subject) | first, about, doing=doing, track=track, stage=stage)
        if config.race:
            race = Race(evaluator, chosen, about, margin=config.race_margin, track=track, stage=stage)
            run.update(race=race.run())
    evaluator.check_rows()
    with run.stage("cut"), step(track, "cut the best, save it, load it back, check and time it"):
        _cut_best(config, run, subject, compensated, texts, keeps, track)
    run.update(cost=run_cost(run.record, prices))
    run.update(couplings=subject.couplings())
    run.update(suggestions=[each._asdict() for each in suggestions_of(run.record, run.candidates())])
    finish(run, ENDING)


# --- search ------------------------------------------------------------------------------------


def kept_units(
    config: CompareConfig,
    run: RunDirectory,
    subject: Subject,
    calibration: Mapping[int, dict[str, Examples]],
    scores: Mapping[int, Calibrated],
    candidates: Sequence[Candidate],
    track: Track = quiet,
) -> dict[str, Keep]:
    """Return which units each candidate keeps, as the run's `keeps.npz` holds them, or search and keep them.

    Searching takes a moment, but with `rescore_every` some passes over the text a variant; so its keep-sets are written
    as soon as they are known. What is chosen again is written ratio by ratio, training of units round by round.
    """
    keeps = read_keeps(run, subject, {candidate.name: candidate.ratio for candidate in candidates})
    known = len(keeps)
    paths: dict[tuple[int, Variant], dict[float, list[str]]] = {}
    for candidate in candidates:
        path_names = paths.setdefault((candidate.seed, candidate.variant.chosen), {})
        path_names.setdefault(candidate.ratio, []).append(candidate.name)
    for (seed, variant), names in paths.items():
        if all(name in keeps for each in names.values() for name in each):
            continue
        again = variant.search.chooses_again
        own = scores[seed].renamed(variant.scores, variant.estimator)
        alone = variant.scenario != ALL
        choose_path(
            subject,
            own.only(variant.scenario) if alone else own,
            {variant.scenario: calibration[seed][variant.scenario]} if alone else calibration[seed],
            variant.estimator,
            list(names),
            variant.search,
            fusion=variant.fusion,
            compensation=variant.compensation,
            batch_size=config.calibration.batch_size,
            remat=config.estimation.remat,
            track=track,
            done=[ratio for ratio, each in names.items() if all(name in keeps for name in each)],
            found=_keeping(run, keeps, names, at_once=again),
            store_of=lambda ratio, names=names: Training(run, names[ratio][0]),
        )
        if variant.search.rescore_every is not None and not again:
            save_keeps(run, keeps)
    if len(keeps) > known:
        save_keeps(run, keeps)
    return keeps


def _keeping(
    run: RunDirectory, keeps: dict[str, Keep], names: Mapping[float, Sequence[str]], *, at_once: bool
) -> Callable[[float, Selection], None]:
    """Return what adds the selection at a ratio to the keep-sets of candidates, and writes them if `at_once`."""

    def found(ratio: float, selection: Selection) -> None:
        keeps.update(dict.fromkeys(names[ratio], selection.keep))
        for kind, values in (("divergences", selection.divergences), ("prices", selection.price)):
            if values:
                run.update(**{kind: {**run.record.get(kind, {}), **{name: list(values) for name in names[ratio]}}})
        if at_once:
            save_keeps(run, keeps)

    return found


# --- the best one --------------------------------------------------------------------------------


def best_candidate(run: RunDirectory, ratio: float) -> Row:
    """Return the candidate of the first seed of the variant that has the lowest perplexity out of domain at a ratio."""
    candidates = run.candidates()
    rows = comparison_rows(run.record, candidates)
    best = next(row.label for row in rows if row.asked == ratio and row.candidate != DENSE)
    first = run.record["seeds"]["calibration"][0]
    return next(row for row in candidates if (row["variant"], row["ratio_asked"], row["seed"]) == (best, ratio, first))


def _cut_best(
    config: CompareConfig,
    run: RunDirectory,
    subject: Subject,
    compensate: Compensate,
    texts: dict[str, Examples],
    keeps: dict[str, Keep],
    track: Track,
) -> None:
    """Cut the best candidate, save it, load it back, and check and measure what was loaded beside the dense model."""
    best = best_candidate(run, config.cut_ratio)
    keep = keeps[best["candidate"]]
    directory = run.claim("best")
    run.save_json("keep", keep_to_json(keep))
    if not run.has("best"):
        cut = compensate({**best}, keep).cut(keep)
        made = origins.chosen(config, run.record, best, cut.parameters)
        if texts_written := written_by(subject, cut, config.new_tokens, track):
            run.update(written=texts_written)
            made["written"] = texts_written
        origin, loader = origins.origin_of(config.model.name), origins.loader_of_model(cut)
        cut.save(directory, keep, further=origins.files_of(origin, made, loader, run.path.name))
        del cut
    gc.collect()
    loaded, whole = subject.load(directory), subject.whole()
    size = config.evaluation.batch_size
    ppl = {name: scale_of(name).value(loaded.losses(text, size).mean) for name, text in texts.items()}
    for name, value in ppl.items():
        if not abs(value - best["ppl"][name]) <= subject.tolerance * max(abs(best["ppl"][name]), 1e-6):
            raise ValueError(
                f"{directory}: expected the cut model to have the masked one's {name} of {best['ppl'][name]:.4f} "
                f"within {subject.tolerance:g}, got {value:.4f}; please report this with {run.path / 'run.json'}"
            )
    text = next(iter(texts.values()))
    dense_seconds, seconds = subject.seconds([whole, loaded], text, size)
    run.update(
        best={
            "candidate": best["candidate"],
            "parameters": loaded.parameters,
            "bytes": broadcast(lambda: directory_bytes(directory, "*.safetensors")),
            "dense_bytes": whole.bytes,
            "forward_seconds": seconds,
            "dense_forward_seconds": dense_seconds,
            "forward_tokens": math.prod(subject.shape(text, size)),
            "ppl": ppl,
            "ppl_masked": best["ppl"],
            "segments": loaded.segments,
        }
    )
