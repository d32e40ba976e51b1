"""How far can a model be pruned? What `saap frontier` runs: curves of perplexity against ratio, and where they end.

Each method and seed has a *line*: its points on the grid of `ratios` first, all lines in batches of one compiled
program; then bisection of the largest ratio that holds the limit, all lines together, a batch a round.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from saap_jax.config.checks import read_percent
from saap_jax.config.jobs import FrontierConfig
from saap_jax.evaluation.crossing import bisect, first_bracket, found_variants
from saap_jax.evaluation.scales import scale_of
from saap_jax.jobs.candidates import Candidate, Evaluator, Row, candidate_of
from saap_jax.jobs.job import check, load, run_job
from saap_jax.report.pages.common import suggestion_blocks
from saap_jax.report.pages.frontier import frontier_table, summary
from saap_jax.report.write import finding_files
from saap_jax.runs.directory import RunDirectory
from saap_jax.runs.stages import Stage
from saap_jax.runs.standing import DENSE
from saap_jax.runs.suggestions import suggestions_of
from saap_jax.runtime.progress import Track, quiet
from saap_jax.steps.chain import Chain, expand

Key = tuple[str, int]
"""Method and seed: a line."""


def frontier(config: FrontierConfig, *, overwrite: bool = False, track: Track = quiet) -> RunDirectory:
    """Measure the curve of each method and seed, and find the largest ratio that still holds the limit.

    Raises:
        ValueError: bad input, or a ratio that a method cannot meet.
    """
    chains, layout = expand(config.methods), check(config)

    def work(run: RunDirectory) -> None:
        seeds = config.seeds_drawn
        material = load(config, run, layout, track, seeds)
        evaluator = Evaluator(config, run, material, chains, track)
        tops = {}
        for chain in chains:
            for runner in evaluator.runners.values():
                runner.check(chain, [])
                tops[chain.name] = runner.most_removable(chain)
            if max(config.ratios) > tops[chain.name]:
                raise ValueError(
                    f"ratios: expected at most {tops[chain.name]:.4f}, the largest that {chain.name} can meet under "
                    f"min_keep, max_ratio, protect, multiple_of and attention, got {max(config.ratios)}; relax one or "
                    "ask for less"
                )
        evaluator.begin("frontier")
        evaluator.at_once = min(evaluator.at_once, len(chains) * len(seeds))
        run.update(frontier=_measure(config, {chain.name: chain for chain in chains}, tops, evaluator))
        run.update(suggestions=suggestions_of(run.record, run.candidates()))

    return run_job(config, work, finding_files, overwrite=overwrite)


def _measure(
    config: FrontierConfig, chains: Mapping[str, Chain], tops: Mapping[str, float], evaluator: Evaluator
) -> Row:
    """Measure the grid, bisect every line, keep all keep-sets; return what was found."""
    run, ratios, seeds = evaluator.run, sorted(config.ratios), config.seeds_drawn
    lines: list[Key] = [(name, seed) for name in chains for seed in seeds]

    def at(key: Key, ratio: float) -> Candidate:
        return candidate_of(chains[key[0]], ratio, key[1], told=len(seeds) > 1)

    def measured(asked: Sequence[tuple[Key, float]], doing: str, stage: Stage, *first: str) -> list[Row]:
        made = [at(key, ratio) for key, ratio in asked]
        evaluator.choose([candidate for candidate in made if candidate.name not in evaluator.keeps])
        about = {candidate.name: candidate.about for candidate in made}
        rows = evaluator.measure([*first, *about], about, doing=doing, stage=stage)
        return [rows[candidate.name] for candidate in made]

    grid = [(key, ratio) for ratio in ratios for key in lines]
    with run.stage("search"):
        evaluator.choose([at(key, ratio) for key, ratio in grid])
    with run.stage("evaluate") as stage:
        rows = measured(grid, "evaluate dense model and curves", stage, DENSE)
    metric = evaluator.judging
    percent = read_percent("max_ppl_increase", config.max_ppl_increase)
    scale, dense = scale_of(metric), run.record[DENSE]["ppl"][metric]
    if not math.isfinite(dense):
        raise ValueError(
            f"max_ppl_increase: expected a finite {scale.noun} of the unpruned model on {metric}, got {dense}; check "
            "the model, or choose other text"
        )
    limit = scale.limit(dense, percent)
    holds = {key: [row["ppl"][metric] <= limit for (k, _), row in zip(grid, rows, strict=True) if k == key]
             for key in lines}  # fmt: skip
    with run.stage("bisect") as stage:
        rounds = 0

        def judge(asked: dict[Key, float]) -> dict[Key, bool]:
            nonlocal rounds
            rounds += 1
            found = measured(list(asked.items()), f"bisect, round {rounds}", stage)
            return {key: row["ppl"][metric] <= limit for key, row in zip(asked, found, strict=True)}

        starts = {key: first_bracket(ratios, holds[key], tops[key[0]]) for key in lines}
        brackets = bisect(starts, judge, config.tolerance)
    evaluator.save_keeps()
    said = []
    for key, found in brackets.items():
        said.append({
            "variant": key[0], "seed": key[1], "ratio": found.low,
            "candidate": at(key, found.low).name if found.low > 0 else DENSE,
            "breaks_at": None if math.isinf(found.high) else found.high,
            "largest_possible": tops[key[0]], "rounds": found.rounds,
            "again": [r for r, held in zip(ratios, holds[key], strict=True) if held and r > starts[key].high],
        })  # fmt: skip
    return {
        "metric": metric, "percent": percent, "limit": limit, "tolerance": config.tolerance,
        "ratios": ratios, "resamples": config.resamples, "rounds": rounds, "lines": said,
    }  # fmt: skip


def shown(config: FrontierConfig, run: RunDirectory) -> Iterator[Any]:
    """Show where curves end."""
    found = found_variants(run.record, run.candidates())
    yield frontier_table(run.record, found)
    yield summary(run.record, found)
    yield from suggestion_blocks(run.record)
    yield {"report": run.path / "report.html", "beside it": "frontier.svg, frontier.md, frontier.csv, curve.csv"}
