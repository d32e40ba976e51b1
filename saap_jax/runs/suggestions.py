"""What to try next, from what a run has measured: a text, the effect to expect, and the command.

Every number is of the run's own records: a comparison is judged by what it compared, a frontier by how far it went, and
of what `saap sensitivity` tried (`trials`), that is offered which was surely better.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from saap_jax.estimation import make_estimators
from saap_jax.evaluation.crossing import found_variants
from saap_jax.evaluation.differences import decimals_of
from saap_jax.evaluation.resample import FEWEST
from saap_jax.evaluation.scales import format_figure, scale_of
from saap_jax.runs.commands import compare_command, prune_command
from saap_jax.runs.records import Row, RunRecord
from saap_jax.runs.standing import DENSE, comparison_rows, labels, number
from saap_jax.runs.trials import Suggestion, sensitivity_suggestions
from saap_jax.runtime.words import signed, some
from saap_jax.steps.chain import parse
from saap_jax.steps.score.oracles import is_oracle

NEGLIGIBLE = 0.05
"""Share of a mean fused score below which a member is not worth its statistics."""

MORE_WINDOWS = 24
"""Windows that are suggested where a run has too few, the usual number."""

MOST_SEEDS = 10
"""Seeds that are suggested at most."""

_EFFORT = (
    ("step", "Hessian-vector products"),
    ("squares", "gradients of weights, an example at a time"),
    ("weights", "gradients of weights"),
    ("gates", "gradients of gates"),
    ("activations", "activations only"),
    ("", "no pass over text"),
)
"""What scoring needs, the most expensive first, in words."""


class Standing(NamedTuple):
    """A variant at one ratio of a comparison, over its seeds."""

    row: Row
    """One of its lines in `metrics.jsonl`."""
    ppl: float
    spread: float
    """Standard deviation of the perplexity over the seeds; NaN where there is one."""
    seeds: int
    p_value: float
    """Of "as good as the best", adjusted; NaN of the best."""
    tied: bool
    windows: int
    """By which it is compared; 0 where their losses are not on record."""


def suggestions_of(run: RunRecord, candidates: Sequence[Row]) -> list[Suggestion]:
    """Return what a run suggests, from its records alone; none of a kind of run that has none.

    Args:
        run: `run.json` of `saap compare`, `frontier` or `sensitivity`.
        candidates: its lines of `metrics.jsonl`.
    """
    if run.get("kind") == "sensitivity":
        return sensitivity_suggestions(run, candidates)
    if run.get("kind") == "frontier" and run.get("frontier"):
        return _prune_there(run, candidates)
    if run.get("kind") == "compare":
        return comparison_suggestions(run, _standings(run, candidates))
    return []


# --- from a comparison -----------------------------------------------------------------------------


def comparison_suggestions(run: RunRecord, standings: Sequence[Standing]) -> list[Suggestion]:
    """Return what a comparison suggests: a cheaper variant, more seeds.

    Args:
        standings: the variants at the ratio that matters most, the best first.
    """
    if 0 < min((each.windows for each in standings), default=0) < FEWEST:
        return _more_windows(run, standings)
    return [*_cheaper(run, standings), *_more_seeds(run, standings)]


def _more_windows(run: RunRecord, standings: Sequence[Standing]) -> list[Suggestion]:
    """Evaluate on more text where there is too little to tell variants apart."""
    windows = standings[0].windows
    if len(standings) < 2:
        return []
    return [
        Suggestion(
            f"{windows} window{'s' if windows > 1 else ''} of evaluation text cannot tell variants apart, which takes "
            f"{FEWEST}: evaluate on more.",
            "intervals and tests, which this run has none of",
            compare_command(run, "windows", {"evaluation": {"windows": MORE_WINDOWS}}),
        )
    ]


def _cheaper(run: RunRecord, standings: Sequence[Standing]) -> list[Suggestion]:
    """Use the variant that needs least among those that cannot be told apart from the best."""
    if not standings:
        return []
    best = standings[0]
    tied = [each for each in standings[1:] if each.tied]
    chosen = max(tied, key=lambda each: effort(each.row["chain"])[0], default=best)
    (least, needs), (most, needed) = (effort(each.row["chain"]) for each in (chosen, best))
    if least <= most:
        return []
    change = 100 * (chosen.ppl - best.ppl) / abs(best.ppl)
    scale = scale_of(next((metric["name"] for metric in run.get("metrics", [])), ""))
    return [
        Suggestion(
            f"{chosen.row['variant']} cannot be told apart from the best, {best.row['variant']} (p = "
            f"{chosen.p_value:.2g}), and scoring needs less: {needs} instead of {needed}.",
            f"measured at {100 * best.row['ratio_asked']:g} %: {scale.short} {scale.shown(chosen.ppl)} instead of "
            f"{scale.shown(best.ppl)} "
            f"({signed(change, decimals_of(change))} %)",
            prune_command(run, chosen.row),
        )
    ]


def effort(chain: str) -> tuple[int, str]:
    """Return how little the scores of a chain need, larger = less, and what that is.

    >>> effort("wanda > uniform"), effort("gate_fisher/wanda"), effort("block_ablation(granularity=layer)")
    ((4, 'activations only'), (3, 'gradients of gates'), (-1, 'a pass a unit'))
    """
    members = [member for score in parse(chain).scores for member in score.wanted.members()]
    if any(map(is_oracle, members)):
        return -1, "a pass a unit"
    sources = {need.source for made in make_estimators(dict.fromkeys(members)).values() for need in made.needs}
    return next((place, said) for place, (source, said) in enumerate(_EFFORT) if source in sources or not source)


def _more_seeds(run: RunRecord, standings: Sequence[Standing]) -> list[Suggestion]:
    """Ask for more seeds where they differ more than the two best variants do."""
    if len(standings) < 2:
        return []
    first, second = standings[:2]
    ratio = f"at {100 * first.row['ratio_asked']:g} %"
    seeds = [int(seed) for seed in run["seeds"]["calibration"]]
    if first.seeds == 1:
        return [
            Suggestion(
                f"One seed does not say how much the difference of {abs(second.ppl - first.ppl):.2g} between "
                f"{first.row['variant']} and {second.row['variant']} {ratio} owes to the text that was drawn.",
                "the spread over seeds becomes known; one seed has measured none",
                compare_command(run, "seeds", {"seeds": _seeds(seeds, 3)}),
            )
        ]
    spread, gap = float(np.nanmax([first.spread, second.spread])), second.ppl - first.ppl
    if not (math.isfinite(spread) and 0 <= gap < spread):
        return []
    needed = math.ceil(8 * (spread / gap) ** 2) if gap > 0 else math.inf
    count = int(min(max(needed, first.seeds + 1), max(MOST_SEEDS, first.seeds + 1)))
    errors = [spread / math.sqrt(number) for number in (first.seeds, count)]
    enough = f"about {needed:,} would settle it" if needed < 1000 else "no number of seeds will settle it"
    return [
        Suggestion(
            f"{first.row['variant']} and {second.row['variant']} differ {ratio} by {gap:.2g}, their seeds by "
            f"{spread:.2g} (standard deviation): more seeds or calibration.examples.",
            f"standard error of a mean from {errors[0]:.2g} with {first.seeds} seeds to {errors[1]:.2g} with {count}; "
            f"{enough} (two standard errors of the difference)",
            compare_command(run, "seeds", {"seeds": _seeds(seeds, count)}),
        )
    ]


def _standings(run: RunRecord, candidates: Sequence[Row]) -> list[Standing]:
    """Return the variants of a comparison at `best_ratio`, the best first; those without a perplexity are left out.

    Records of an older version, without a variant, give none.
    """
    asked = run.get("config", {}).get("best_ratio")
    by_label = {
        label: row
        for label, row in zip(labels(candidates), candidates, strict=True)
        if "variant" in row and number(row.get("ratio_asked")) == asked
    }
    found = []
    for row in comparison_rows(run, candidates):
        ppl, spread = (row.ppl_in, row.spread_in) if math.isnan(row.ppl_out) else (row.ppl_out, row.spread_out)
        if row.candidate != DENSE and row.asked == asked and row.label in by_label and math.isfinite(ppl):
            found.append(Standing(by_label[row.label], ppl, spread, row.seeds, row.p_value, row.tied, row.windows))
    return found


def _seeds(known: Sequence[int], count: int) -> list[int]:
    """Return so many seeds, those that are known first."""
    more = (seed for seed in range(count + len(known)) if seed not in known)
    return [*known, *more][: max(count, len(known))]


# --- from a frontier -------------------------------------------------------------------------------


def _prune_there(run: RunRecord, candidates: Sequence[Row]) -> list[Suggestion]:
    """Prune with the variant of the largest ratio, as far as it holds for all its seeds."""
    (best, *others), frontier = found_variants(run, candidates), run["frontier"]
    lines = [line for line in frontier["lines"] if line["variant"] == best.variant and line["ratio"] > 0]
    if len(lines) < best.seeds or best.windows < FEWEST:
        return []
    least = min(lines, key=lambda line: line["ratio"])
    row = next(row for row in candidates if row["candidate"] == least["candidate"])
    metric = frontier["metric"]
    dense, value = run[DENSE]["ppl"][metric], row["ppl"][metric]
    change = 100 * (value - dense) / abs(dense) if dense else math.inf
    return [
        Suggestion(
            f"{best.variant} can be pruned to {100 * least['ratio']:.4g} % within +{frontier['percent']:g} %"
            + (", whatever the seed" if best.seeds > 1 else "")
            + (
                f"; {some(tied)} cannot be told apart from it."
                if (tied := [o.variant for o in others if o.tied])
                else "."
            ),
            f"measured: {metric} {format_figure(value, scale_of(metric))}, {signed(change, 1)} %",
            prune_command(run, row),
        )
    ]
