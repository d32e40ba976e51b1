"""How far can a model be pruned? What `saap frontier` runs: curves of perplexity against ratio, and where they end.

Each method and seed has a *line*: its points on the grid of `ratios` first, all lines in batches of one compiled
program; then bisection of the largest ratio that holds the limit, all lines together, a batch a round.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from saap_jax.config.amounts import read_percent
from saap_jax.config.jobs import FrontierConfig
from saap_jax.evaluation.crossing import Bracket, bisect, first_bracket
from saap_jax.evaluation.scales import scale_of
from saap_jax.jobs.candidates import (
    Candidate,
    Evaluator,
    Row,
    about_run,
    candidate_of,
    keeps_file,
    runners_of,
)
from saap_jax.jobs.job import Ending, check, check_judged, finish, job, load
from saap_jax.report.pages.frontier import frontier_files
from saap_jax.runs.directory import RunDirectory
from saap_jax.runs.scores import save_scores
from saap_jax.runs.stages import Stage
from saap_jax.runs.standing import DENSE, first_metric
from saap_jax.runs.suggestions import suggestions_of
from saap_jax.runtime.mesh import Layout
from saap_jax.runtime.progress import Track, quiet
from saap_jax.steps.chain import Chain, expand

Key = tuple[str, int]
"""Method and seed: a line."""

ENDING = Ending(lambda run: frontier_files(run.record, run.candidates()), further=("keeps.npz",))


class Line(NamedTuple):
    """A method with the scores of one seed."""

    chain: Chain
    seed: int
    top: float
    """Largest ratio that it can meet."""
    told: bool
    """Whether names have to tell the seed."""

    def at(self, ratio: float) -> Candidate:
        """Return the candidate at a ratio."""
        return candidate_of(self.chain, ratio, self.seed, told=self.told)


def frontier(config: FrontierConfig, *, overwrite: bool = False, track: Track = quiet) -> RunDirectory:
    """Measure the curve of each method and seed, and find the largest ratio that still holds the limit.

    Raises:
        ValueError: bad input, or a ratio that a method cannot meet.
    """
    chains, layout = expand(config.methods), check(config)
    with job(config, ENDING, overwrite=overwrite) as run:
        if not run.finished:
            _frontier(config, run, chains, layout, track)
    return run


def _frontier(
    config: FrontierConfig, run: RunDirectory, chains: Sequence[Chain], layout: Layout | None, track: Track
) -> None:
    """Do what `frontier` does, as far as the run does not hold it yet."""
    seeds = config.seeds_drawn
    material = load(config, run, layout, track, seeds)
    subject, texts = material.subject, material.texts
    runners = runners_of(config, run, subject, material.calibration, chains, track)
    tops = {}
    for chain in chains:
        for runner in runners.values():
            runner.check(chain, [])
            tops[chain.name] = runner.most_removable(chain)
        if max(config.ratios) > tops[chain.name]:
            raise ValueError(
                f"ratios: expected at most {tops[chain.name]:.4f}, the largest that {chain.name} can meet under "
                f"min_keep, max_ratio, protect, multiple_of and attention, got {max(config.ratios)}; relax one or ask "
                "for less"
            )
    check_judged(config.judged, texts)
    run.begin(material.inputs)
    run.update(**about_run("frontier", subject, list(texts), seeds))
    with run.stage("score") as stage:
        for seed, runner in runners.items():
            stage.tokens += sum(subject.count(text)[1] for text in material.calibration[seed].values())
            runner.first()
        save_scores(run, runners[seeds[0]].first())
    lines = {
        (chain.name, seed): Line(chain, seed, tops[chain.name], len(seeds) > 1) for chain in chains for seed in seeds
    }
    at_once = min(config.evaluation.candidates_at_once, len(lines))
    evaluator = Evaluator(run, texts, config.evaluation, runners, at_once)
    run.update(frontier=_measure(config, lines, evaluator, track))
    run.update(suggestions=[each._asdict() for each in suggestions_of(run.record, run.candidates())])
    finish(run, ENDING)


def _measure(config: FrontierConfig, lines: Mapping[Key, Line], evaluator: Evaluator, track: Track) -> Row:
    """Measure the grid, bisect every line, keep all keep-sets; return what was found."""
    run, ratios = evaluator.run, sorted(config.ratios)

    def measured(asked: Sequence[tuple[Key, float]], doing: str, stage: Stage, *first: str) -> list[Row]:
        made = [lines[key].at(ratio) for key, ratio in asked]
        evaluator.choose([candidate for candidate in made if candidate.name not in evaluator.keeps])
        about = {candidate.name: candidate.about for candidate in made}
        rows = evaluator.measure([*first, *about], about, doing=doing, track=track, stage=stage)
        return [rows[candidate.name] for candidate in made]

    grid = [(key, ratio) for ratio in ratios for key in lines]
    with run.stage("search"):
        evaluator.choose([lines[key].at(ratio) for key, ratio in grid])
    with run.stage("evaluate") as stage:
        rows = measured(grid, "evaluate dense model and curves", stage, DENSE)
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
            found = measured(list(asked.items()), f"bisect, round {rounds}", stage)
            return {key: row["ppl"][metric] <= limit for key, row in zip(asked, found, strict=True)}

        starts = {key: first_bracket(ratios, holds[key], line.top) for key, line in lines.items()}
        brackets = bisect(starts, judge, config.tolerance)
    run.save_arrays("keeps", keeps_file(evaluator))
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
        "variant": line.chain.name,
        "seed": line.seed,
        "ratio": found.low,
        "candidate": line.at(found.low).name if found.low > 0 else DENSE,
        "breaks_at": None if math.isinf(found.high) else found.high,
        "largest_possible": line.top,
        "rounds": found.rounds,
        "again": [ratio for ratio, held in zip(ratios, holds, strict=True) if held and ratio > start.high],
    }
