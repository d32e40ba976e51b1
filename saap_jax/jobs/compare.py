"""The main job: compare methods on one model, evaluate every candidate by masks, cut and check the best.

A method is a chain of steps; at a ratio, on the calibration text of a seed, it is a candidate. What was scored, chosen
and evaluated is kept as it comes; the same command again does only what is missing.
"""

import dataclasses
import gc
import math
from collections.abc import Sequence

from saap_jax.config.jobs import CompareConfig
from saap_jax.evaluation.cost import directory_bytes
from saap_jax.evaluation.price import Price, read_prices, run_cost
from saap_jax.evaluation.scales import scale_of
from saap_jax.jobs import origins
from saap_jax.jobs.candidates import (
    Candidate,
    Evaluator,
    about_run,
    candidates_of,
    keeps_file,
    runners_of,
)
from saap_jax.jobs.job import Ending, check, finish, job, load
from saap_jax.jobs.racing import Race, check_race
from saap_jax.jobs.written import written_by
from saap_jax.report.figures.couplings import coupling_files
from saap_jax.runs.directory import RunDirectory
from saap_jax.runs.scores import save_scores
from saap_jax.runs.standing import DENSE, comparison_rows
from saap_jax.runs.suggestions import suggestions_of
from saap_jax.runtime.mesh import Layout, taken_in
from saap_jax.runtime.processes import broadcast
from saap_jax.runtime.progress import Track, quiet, step
from saap_jax.steps.chain import Chain, expand
from saap_jax.surgery.cut import keep_to_json

ENDING = Ending(lambda run: coupling_files(run.record), further=("keeps.npz", "best"))


@taken_in
def compare(config: CompareConfig, *, overwrite: bool = False, track: Track = quiet) -> RunDirectory:
    """Compare methods: score from one pass a seed, evaluate each candidate by masks, cut and check the best.

    Raises:
        ValueError: bad input, or a cut model whose perplexity is not that of the masked one.
    """
    if config.best_ratio is None:
        config = dataclasses.replace(config, best_ratio=config.cut_ratio)  # on record is what was done
    chains, layout = expand(config.methods), check(config)
    prices = read_prices()  # a wrong amount is refused before any time is spent
    with job(config, ENDING, overwrite=overwrite) as run:
        if not run.finished:
            _compare(config, run, chains, layout, prices, track)
    return run


def _compare(
    config: CompareConfig,
    run: RunDirectory,
    chains: Sequence[Chain],
    layout: Layout | None,
    prices: Sequence[Price],
    track: Track,
) -> None:
    """Do what `compare` does, as far as the run does not hold it yet."""
    seeds = config.seeds_drawn
    material = load(config, run, layout, track, seeds)
    subject, texts = material.subject, material.texts
    runners = runners_of(config, run, subject, material.calibration, chains, track)
    for chain in chains:
        for runner in runners.values():
            runner.check(chain, config.ratios)  # what is impossible is refused before any time is spent
    if config.race:
        check_race(subject, texts, config.evaluation)
    run.begin(material.inputs)
    left = {chain.name: reasons for chain in chains if (reasons := chain.unrepaired(subject))}
    run.update(**about_run("compare", subject, list(texts), seeds), unrepaired=left)
    with run.stage("score") as stage:
        for seed, runner in runners.items():
            stage.tokens += sum(subject.count(text)[1] for text in material.calibration[seed].values())
            runner.first()
        save_scores(run, runners[seeds[0]].first())
    candidates = candidates_of(chains, seeds, config.ratios)
    at_once = min(config.evaluation.candidates_at_once, 1 + len(candidates))
    evaluator = Evaluator(run, texts, config.evaluation, runners, at_once)
    with run.stage("search"):
        evaluator.choose(candidates)
        run.save_arrays("keeps", keeps_file(evaluator))
    with run.stage("evaluate") as stage:
        about = {candidate.name: candidate.about for candidate in candidates}
        doing = "evaluate dense model" + " and candidates" * (not config.race)
        names = [DENSE, *([] if config.race else about)]
        evaluator.measure(names, about, doing=doing, track=track, stage=stage)
        if config.race:
            run.update(race=Race(evaluator, candidates, config.race_margin, track, stage).run())
    with run.stage("cut"), step(track, "cut the best, save it, load it back, check and time it"):
        _cut_best(config, evaluator, best_of(run, candidates, config.cut_ratio), track)
    run.update(cost=run_cost(run.record, prices))
    run.update(couplings=subject.couplings())
    run.update(suggestions=[each._asdict() for each in suggestions_of(run.record, run.candidates())])
    finish(run, ENDING)


def best_of(run: RunDirectory, candidates: Sequence[Candidate], ratio: float) -> Candidate:
    """Return the candidate of the first seed of the method that has the lowest perplexity out of domain at a ratio."""
    rows = comparison_rows(run.record, run.candidates())
    best = next(row.label for row in rows if row.asked == ratio and row.candidate != DENSE)
    return next(each for each in candidates if (each.chain.name, each.ratio) == (best, ratio))


def _cut_best(config: CompareConfig, evaluator: Evaluator, best: Candidate, track: Track) -> None:
    """Cut the best candidate, save it, load it back, and check and measure what was loaded beside the dense model."""
    run, subject, keep = evaluator.run, evaluator.subject, evaluator.keeps[best.name]
    row = next(each for each in run.candidates() if each["candidate"] == best.name)
    directory = run.claim("best")
    run.save_json("keep", keep_to_json(keep))
    if not run.has("best"):
        cut = evaluator.state(best).subject.cut(keep)
        made = origins.chosen(config, run.record, row, cut.parameters)
        if texts_written := written_by(subject, cut, config.new_tokens, track):
            run.update(written=texts_written)
            made["written"] = texts_written
        origin, loader = origins.origin_of(config.model.name), origins.loader_of_model(cut)
        cut.save(directory, keep, further=origins.files_of(origin, made, loader, run.path.name))
        del cut
    gc.collect()
    loaded, whole = subject.load(directory), subject.whole()
    size = config.evaluation.batch_size
    ppl = {name: scale_of(name).value(loaded.losses(text, size).mean) for name, text in evaluator.texts.items()}
    for name, value in ppl.items():
        if not abs(value - row["ppl"][name]) <= subject.tolerance * max(abs(row["ppl"][name]), 1e-6):
            raise ValueError(
                f"{directory}: expected the cut model to have the masked one's {name} of {row['ppl'][name]:.4f} "
                f"within {subject.tolerance:g}, got {value:.4f}; please report this with {run.path / 'run.json'}"
            )
    text = next(iter(evaluator.texts.values()))
    dense_seconds, seconds = subject.seconds([whole, loaded], text, size)
    run.update(
        best={
            "candidate": best.name,
            "parameters": loaded.parameters,
            "bytes": broadcast(lambda: directory_bytes(directory, "*.safetensors")),
            "dense_bytes": whole.bytes,
            "forward_seconds": seconds,
            "dense_forward_seconds": dense_seconds,
            "forward_tokens": math.prod(subject.shape(text, size)),
            "ppl": ppl,
            "ppl_masked": row["ppl"],
            "segments": loaded.segments,
        }
    )
