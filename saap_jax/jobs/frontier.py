"""How far can a model be pruned? What `saap frontier` runs: curves of perplexity against ratio, and where they end.

Each variant and seed has a *line*: its points on the grid of `ratios` first, all lines in batches of one compiled
program; then bisection of the largest ratio that holds the limit, all lines together, a batch a round.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from saap_jax.config.amounts import read_percent
from saap_jax.config.jobs import FrontierConfig
from saap_jax.config.method import ALL
from saap_jax.config.registries import ALLOCATIONS
from saap_jax.config.search import SearchConfig
from saap_jax.evaluation.crossing import Bracket, bisect, first_bracket
from saap_jax.evaluation.scales import scale_of
from saap_jax.jobs.job import Ending, check, check_judged, finish, job, load
from saap_jax.jobs.sweep import (
    Evaluator,
    Row,
    about_run,
    check_compensations,
    compensator,
    methods_of,
    scores_of_seeds,
    unpruned,
)
from saap_jax.report.kinds.frontier import frontier_files
from saap_jax.runs.directory import RunDirectory
from saap_jax.runs.keeps import save_keeps
from saap_jax.runs.scores import check_scores, read_scores, save_scores
from saap_jax.runs.stages import Stage
from saap_jax.runs.standing import DENSE, first_metric
from saap_jax.runs.suggestions import suggestions_of
from saap_jax.runtime.mesh import Layout
from saap_jax.runtime.progress import Track, quiet
from saap_jax.selection.calibrate import Calibrated, calibrate
from saap_jax.selection.choose import checkpoints, choose_calibrated, chosen_again, most_removable, priority_of
from saap_jax.selection.search import Selection
from saap_jax.selection.variants import Candidate, Variant, candidate_name, seeds_of, variants_of
from saap_jax.subjects.base import Examples, Subject
from saap_jax.types import Keep

Key = tuple[str, int]
"""Variant and seed: a line."""


ENDING = Ending(lambda run: frontier_files(run.record, run.candidates()), further=("keeps.npz",))


def frontier(config: FrontierConfig, *, overwrite: bool = False, track: Track = quiet) -> RunDirectory:
    """Measure the curve of each variant and seed, and find the largest ratio that still holds the limit.

    Raises:
        ValueError: bad input, or a ratio that a variant's search cannot meet.
    """
    variants, layout = variants_of(config), check(config)
    with job(config, ENDING, overwrite=overwrite) as run:
        if not run.finished:
            _frontier(config, run, variants, layout, track)
    return run


def _frontier(
    config: FrontierConfig, run: RunDirectory, variants: Sequence[Variant], layout: Layout | None, track: Track
) -> None:
    """Do what `frontier` does, as far as the run does not hold it yet."""
    seeds = seeds_of(config)
    material = load(config, run, layout, track, seeds)
    subject, calibration, texts = material.subject, material.calibration, material.texts
    tops = _largest_ratios(config, subject, variants)
    check_compensations(config, subject, calibration)
    check_judged(config.judged, texts)
    run.begin(material.inputs)
    run.update(**about_run("frontier", subject, list(texts), seeds, methods_of(config)))
    with run.stage("score") as stage:
        scores = scores_of_seeds(config, run, subject, calibration, variants, track, stage)
    lines = {
        (variant.name, seed): Line(
            variant,
            seed,
            Road(config, run, subject, variant, scores[seed], calibration[seed], f"-road{number}-seed{seed}", track),
            tops[variant.name],
            seed if len(seeds) > 1 else None,
        )
        for number, variant in enumerate(variants)
        for seed in seeds
    }
    at_once = min(config.evaluation.candidates_at_once, len(lines))
    evaluator = Evaluator(run, subject, texts, config.evaluation, at_once, compensator(config, subject, calibration))
    found = _measure(config, lines, evaluator, track)
    evaluator.check_rows()
    run.update(frontier=found)
    run.update(suggestions=[each._asdict() for each in suggestions_of(run.record, run.candidates())])
    finish(run, ENDING)


def _largest_ratios(config: FrontierConfig, subject: Subject, variants: Sequence[Variant]) -> dict[str, float]:
    """Return the largest ratio that each variant's search can meet; refuse a grid beyond it."""
    tops = {variant.name: most_removable(subject, variant.search) for variant in variants}
    for name, top in tops.items():
        if max(config.ratios) > top:
            raise ValueError(
                f"ratios: expected at most {top:.4f}, the largest that {name} can meet under min_keep, max_ratio, "
                f"skip_layers, multiple_of and attention_share, got {max(config.ratios)}; relax one or ask for less"
            )
    return tops


# --- from a ratio to a keep-set ------------------------------------------------------------------


class Road:
    """How a variant goes to ever higher ratios, by the scores of one seed.

    With `rescore_every` the model is observed anew at each multiple of that, kept in the run, and a ratio goes on from
    the last one below it. This is the keep-set of `select_path` for that ratio alone: what `saap prune` and a
    comparison at this ratio make. A comparison of several ratios estimates anew at those on the way too, and so differs
    above a ratio that is no multiple of `rescore_every`.
    """

    def __init__(
        self,
        config: FrontierConfig,
        run: RunDirectory,
        subject: Subject,
        variant: Variant,
        scores: Calibrated,
        scenarios: Mapping[str, Examples],
        suffix: str,
        track: Track = quiet,
    ):
        """Start at the whole model; `suffix` ends the names of the files that hold what was scored on the way."""
        alone, own = variant.scenario != ALL, scores.renamed(variant.scores, variant.estimator)
        self.config, self.run, self.subject, self.variant, self.suffix, self.track = (
            config, run, subject, variant, suffix, track,
        )  # fmt: skip
        self.scores = own.only(variant.scenario) if alone else own
        self.scenarios = {variant.scenario: scenarios[variant.scenario]} if alone else scenarios
        self._stations: dict[tuple[SearchConfig, float], tuple[Calibrated, Keep]] = {}
        self._selected: dict[float, Selection] = {}

    def select(self, ratio: float) -> Selection:
        """Choose the units to keep at a ratio."""
        calibrated, gone, search = self.scores, None, self.variant.search.at_ratio(ratio)
        for station in checkpoints((ratio,), search.rescore_every)[:-1]:
            if (search, station) not in self._stations:
                self._stations[search, station] = self._observed(station, calibrated, gone, search, ratio)
            calibrated, gone = self._stations[search, station]
        if ratio not in self._selected:
            self._selected[ratio] = chosen_again(
                self.subject,
                self._select(ratio, calibrated, gone, search),
                self.scenarios,
                self.variant.search,
                self.variant.compensation,
                priority_of(self.subject, self.scores, self.variant.estimator, self.variant.search),
                batch_size=self.config.calibration.batch_size,
                track=self.track,
            )
        return self._selected[ratio]

    def _select(self, ratio: float, calibrated: Calibrated, gone: Keep | None, search: SearchConfig) -> Selection:
        return choose_calibrated(self.subject, calibrated, self.variant.estimator, ratio, search, gone)

    def _observed(
        self, station: float, calibrated: Calibrated, gone: Keep | None, search: SearchConfig, ratio: float
    ) -> tuple[Calibrated, Keep]:
        """Return the scores of the model pruned to a station on the way to a ratio, from the run or anew, and the units
        that are gone there."""
        keep, variant = self._select(station, calibrated, gone, search).keep, self.variant
        own = "" if search is variant.search else f"-to{ratio:g}"  # ways of their own share no station
        suffix = f"{self.suffix}-{station:g}{own}"
        if not self.run.has(f"scores{suffix}.npz"):
            made = calibrate(
                self.subject,
                self.scenarios,
                [variant.estimator],
                fusion=variant.fusion,
                stability=ALLOCATIONS[variant.search.allocation].stability,
                keep=keep,
                batch_size=self.config.calibration.batch_size,
                remat=self.config.estimation.remat,
                track=self.track,
            )
            save_scores(self.run, made, suffix)
        gone = {name: units & ~keep[name] for name, units in self.subject.existing.items()}
        kept = read_scores(self.run, suffix)
        check_scores(kept, self.run.path / f"scores{suffix}.npz", self.subject, self.scenarios, [variant.estimator])
        return kept, gone


# --- curve and bisection -------------------------------------------------------------------------


class Line(NamedTuple):
    """A variant with the scores of one seed."""

    variant: Variant
    seed: int
    road: Road
    top: float
    """Largest ratio that its search can meet."""
    told: int | None
    """The seed, where names have to tell it."""

    def at(self, ratio: float) -> Candidate:
        """Return the candidate at a ratio."""
        return Candidate(candidate_name(self.variant.name, ratio, self.told), self.variant, self.seed, ratio)


def _measure(config: FrontierConfig, lines: Mapping[Key, Line], evaluator: Evaluator, track: Track) -> Row:
    """Measure the grid, bisect every line, keep all keep-sets; return what was found."""
    run, ratios = evaluator.run, sorted(config.ratios)
    keeps: dict[str, Keep] = {}

    def candidates(asked: Sequence[tuple[Key, float]]) -> list[Candidate]:
        """Return the candidates of some lines at a ratio each, their keep-sets known."""
        made = [lines[key].at(ratio) for key, ratio in asked]
        for (key, ratio), candidate in zip(asked, made, strict=True):
            if candidate.name not in keeps:
                keeps[candidate.name] = lines[key].road.select(ratio).keep
        return made

    def measured(asked: Sequence[tuple[Key, float]], doing: str, stage: Stage, start: dict[str, Keep]) -> list[Row]:
        made = candidates(asked)
        sets = start | {candidate.name: keeps[candidate.name] for candidate in made}
        about = {candidate.name: candidate.about for candidate in made}
        rows = evaluator.measure(sets, about, doing=doing, track=track, stage=stage)
        return [rows[candidate.name] for candidate in made]

    grid = [(key, ratio) for ratio in ratios for key in lines]
    with run.stage("search"):
        candidates(grid)
    with run.stage("evaluate") as stage:
        rows = measured(grid, "evaluate dense model and curves", stage, unpruned(evaluator.subject))
    metric = str(first_metric(run.record, config.judged))
    percent = read_percent("max_ppl_increase", config.max_ppl_increase)
    limit = limit_of(metric, run.record[DENSE]["ppl"][metric], percent)
    holds = {key: [row["ppl"][metric] <= limit for (k, _), row in zip(grid, rows, strict=True) if k == key]
             for key in lines}  # fmt: skip
    with run.stage("bisect") as stage:
        rounds = 0

        def judge(asked: dict[Key, float]) -> dict[Key, bool]:
            nonlocal rounds
            rounds += 1
            found = measured(list(asked.items()), f"bisect, round {rounds}", stage, {})
            return {key: row["ppl"][metric] <= limit for key, row in zip(asked, found, strict=True)}

        starts = {key: first_bracket(ratios, holds[key], line.top) for key, line in lines.items()}
        brackets = bisect(starts, judge, config.tolerance)
    save_keeps(run, keeps)
    said = [_said(lines[key], brackets[key], starts[key], ratios, holds[key]) for key in lines]
    return {
        "metric": metric, "percent": percent, "limit": limit, "tolerance": config.tolerance,
        "ratios": ratios, "resamples": config.resamples, "rounds": rounds, "lines": said,
    }  # fmt: skip


def limit_of(metric: str, dense: float, percent: float) -> float:
    """Return the highest figure that holds, some percent above the unpruned model's.

    Raises:
        ValueError: the unpruned model's is not finite, so that nothing can be held against it.
    """
    scale = scale_of(metric)
    if not math.isfinite(dense):
        raise ValueError(
            f"max_ppl_increase: expected a finite {scale.noun} of the unpruned model on {metric}, got {dense}; check "
            "the model, or choose other text"
        )
    return scale.limit(dense, percent)


def _said(line: Line, found: Bracket, start: Bracket, ratios: Sequence[float], holds: Sequence[bool]) -> Row:
    """Return the record of a line: the largest ratio that holds, the next one known not to, where it holds again."""
    return {
        "variant": line.variant.name,
        "seed": line.seed,
        "ratio": found.low,
        "candidate": line.at(found.low).name if found.low > 0 else DENSE,
        "breaks_at": None if math.isinf(found.high) else found.high,
        "largest_possible": line.top,
        "rounds": found.rounds,
        "again": [ratio for ratio, held in zip(ratios, holds, strict=True) if held and ratio > start.high],
    }
