"""How far can a model be pruned? What `saap frontier` runs: curves of perplexity against ratio, and where they end.

Each method and seed has a *line*: its points on the grid of `ratios` first, all lines in batches of one compiled
program; then bisection of the largest ratio that holds the limit, all lines together, a batch a round.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from saap_jax.checks import read_percent
from saap_jax.config.jobs import FrontierConfig
from saap_jax.contrib.frontier.page import frontier_table, summary
from saap_jax.contrib.suggestions import suggestions_of
from saap_jax.evaluation.crossing import Bracket, bisect, first_bracket, found_variants
from saap_jax.evaluation.resample import LEVEL
from saap_jax.evaluation.scales import scale_of
from saap_jax.jobs.candidates import (
    Candidate,
    Candidates,
    Row,
    begin,
    candidate_of,
    choose,
    deciding,
    record,
    save_keeps,
    table_of,
)
from saap_jax.jobs.job import check, load, run_job
from saap_jax.jobs.losses import measure
from saap_jax.jobs.racing import Race, counted, evaluate_to, measured, run_fields, start_race
from saap_jax.report.pages.common import suggestion_blocks
from saap_jax.report.write import finding_files
from saap_jax.runs.directory import RunDirectory
from saap_jax.runs.stages import Stage
from saap_jax.runs.standing import DENSE
from saap_jax.runtime.progress import Track, quiet
from saap_jax.steps.chain import Chain, expand

Key = tuple[str, int]
"""Method and seed: a line."""


def frontier(config: FrontierConfig, *, overwrite: bool | None = False, track: Track = quiet) -> RunDirectory:
    """Measure the curve of each method and seed, and find the largest ratio that still holds the limit.

    Raises:
        ValueError: bad input, or a ratio that a method cannot meet.
    """
    chains = expand(config.methods)
    layout = check(config)

    def work(run: RunDirectory) -> None:
        seeds = config.seeds_drawn
        material = load(config, run, layout, track, seeds)
        table = table_of(config, run, material, chains, config.ratios, track)
        runner, *_ = table.runners.values()
        tops = {chain.name: runner.most_removable(chain) for chain in chains}
        race = None
        if config.race:
            race = start_race(table, config.race_margin)
        begin(table, "frontier", raced=config.race)
        table.at_once = min(table.at_once, len(chains) * len(seeds))
        run.update(frontier=_measure(config, {chain.name: chain for chain in chains}, tops, table, race))
        run.update(suggestions=suggestions_of(run.record, run.candidates()))

    return run_job(config, work, finding_files, overwrite=overwrite, track=track)


class _Points:
    """Points of curves, evaluated as they are asked for: on all windows, or in a race with the limit, which is the
    unpruned model with a handicap, until it is sure on which side of it they are.
    """

    def __init__(self, config: FrontierConfig, chains: Mapping[str, Chain], table: Candidates, race: Race | None):
        self.config = config
        self.chains = chains
        self.table = table
        self.race = race
        self.percent = read_percent("max_ppl_increase", config.max_ppl_increase)
        self.metric = deciding(table.rows)
        self.scale = scale_of(self.metric)
        self.about = {}
        self.level = LEVEL / (len(config.ratios) + math.ceil(1 - math.log2(config.tolerance)))  # for each of a line

    @property
    def limit(self) -> float:
        """The figure that may be reached."""
        dense = self.table.run.record[DENSE]["ppl"][self.metric]
        if not math.isfinite(dense):
            raise ValueError(
                f"max_ppl_increase: expected a finite {self.scale.noun} of the unpruned model on {self.metric}, got "
                f"{dense}; check the model, or choose other text"
            )
        return self.scale.limit(dense, self.percent)

    def at(self, key: Key, ratio: float) -> Candidate:
        return candidate_of(self.chains[key[0]], ratio, key[1], told=len(self.config.seeds_drawn) > 1)

    def hold(self, asked: Sequence[tuple[Key, float]], doing: str, stage: Stage, *first: str) -> list[bool]:
        """Evaluate points, and tell of each whether it holds the limit."""
        made = [self.at(key, ratio) for key, ratio in asked]
        table = self.table
        choose(table, [candidate for candidate in made if candidate.name not in table.choices])
        about = {candidate.name: candidate.about for candidate in made}
        self.about |= about
        if self.race is None:
            rows = measure(table, [*first, *about], about, doing=doing, stage=stage)
        else:
            if first:
                measure(table, first, {}, doing="evaluate dense model", stage=stage)
            handicap = self.scale.loss(self.limit) - self.scale.loss(table.run.record[DENSE]["ppl"][self.metric])
            fields = [{DENSE: [DENSE], name: [name]} for name in about]
            run_fields(self.race, fields, doing, stage, level=self.level, handicap=handicap)
            rows = {name: measured(self.race, name) for name in about}
        return [rows[candidate.name]["ppl"][self.metric] <= self.limit for candidate in made]

    def close(self, brackets: Mapping[Key, Bracket], stage: Stage) -> None:
        """Evaluate the ends of all brackets on all windows, and record what a race has found."""
        if self.race is None:
            return
        ends = [self.at(key, ratio).name for key, found in brackets.items() for ratio in (found.low, found.high)]
        stops = {name: self.race.rows for name in ends if name in self.about}
        evaluate_to(self.race, stops, "evaluate where curves end", stage)
        for name, about in self.about.items():
            record(self.table, name, about, measured(self.race, name))
        self.table.run.update(raced=counted(self.race, self.about))


def _measure(
    config: FrontierConfig, chains: Mapping[str, Chain], tops: Mapping[str, float], table: Candidates,
    race: Race | None,
) -> Row:  # fmt: skip
    """Measure the grid, bisect every line, keep all keep-sets; return what was found."""
    run = table.run
    ratios = sorted(config.ratios)
    points = _Points(config, chains, table, race)
    lines: list[Key] = [(name, seed) for name in chains for seed in config.seeds_drawn]
    grid = [(key, ratio) for ratio in ratios for key in lines]
    with run.stage("search"):
        choose(table, [points.at(key, ratio) for key, ratio in grid])
    with run.stage("evaluate") as stage:
        if race:
            doing = "race with the limit"
        else:
            doing = "evaluate dense model and curves"
        found = points.hold(grid, doing, stage, DENSE)
    holds = {key: [held for (k, _), held in zip(grid, found, strict=True) if k == key] for key in lines}
    with run.stage("bisect") as stage:
        rounds = 0

        def judge(asked: dict[Key, float]) -> dict[Key, bool]:
            nonlocal rounds
            rounds += 1
            return dict(zip(asked, points.hold([*asked.items()], f"bisect, round {rounds}", stage), strict=True))

        starts = {key: first_bracket(ratios, holds[key], tops[key[0]]) for key in lines}
        brackets = bisect(starts, judge, config.tolerance)
        points.close(brackets, stage)
    save_keeps(table)
    said = []
    for key, bracket in brackets.items():
        said.append({
            "variant": key[0], "seed": key[1], "ratio": bracket.low,
            "candidate": points.at(key, bracket.low).name if bracket.low > 0 else DENSE,
            "breaks_at": None if math.isinf(bracket.high) else bracket.high,
            "largest_possible": tops[key[0]], "rounds": bracket.rounds,
            "again": [r for r, held in zip(ratios, holds[key], strict=True) if held and r > starts[key].high],
        })  # fmt: skip
    return {
        "metric": points.metric, "percent": points.percent, "limit": points.limit, "tolerance": config.tolerance,
        "ratios": ratios, "resamples": config.resamples, "lines": said,
    }  # fmt: skip


def shown(config: FrontierConfig, run: RunDirectory) -> Iterator[Any]:
    """Show where curves end."""
    found = found_variants(run.record, run.candidates())
    yield frontier_table(run.record, found)
    yield summary(run.record, found)
    yield from suggestion_blocks(run.record)
    yield {"report": run.path / "report.html", "beside it": "frontier.svg, frontier.md, frontier.csv, curve.csv"}
