"""What to try next, from what a run has measured: a text, the effect to expect, and the command.

Every number is of the run's own records: a comparison is judged by what it compared, a frontier by how far it went, and
of what `saap sensitivity` tried (`trials`), that is offered which was surely better.
"""

import math
from collections.abc import Sequence

from saap_jax.estimation import make_estimators
from saap_jax.evaluation.crossing import found_variants
from saap_jax.evaluation.differences import decimals_of
from saap_jax.evaluation.resample import FEWEST
from saap_jax.evaluation.scales import format_figure, scale_of
from saap_jax.runs.commands import compare_command, prune_command
from saap_jax.runs.records import Row, RunRecord
from saap_jax.runs.standing import DENSE, ComparisonRow, comparison_rows, first_metric, labels, number
from saap_jax.runs.trials import Suggestion, sensitivity_suggestions
from saap_jax.runtime.words import signed, some
from saap_jax.steps.chain import parse
from saap_jax.steps.score.oracles import is_oracle

MORE_WINDOWS = 24
"""Windows that are suggested where a run has too few, the usual number."""

MOST_SEEDS = 10
"""Seeds that are suggested at most."""

_EFFORT = {
    "step": "Hessian-vector products",
    "squares": "gradients of weights, an example at a time",
    "weights": "gradients of weights",
    "gates": "gradients of gates",
    "activations": "activations only",
}
"""What scoring needs, the most expensive first, in words."""

Standing = tuple[ComparisonRow, Row]
"""A variant at one ratio, over its seeds, and one of its lines in `metrics.jsonl`."""


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
    if run.get("kind") != "compare":
        return []
    found = _standings(run, candidates)
    if 0 < min((row.windows for row, _ in found), default=0) < FEWEST:
        return _more_windows(run, found)
    return [*_cheaper(run, found), *_more_seeds(run, found)]


# --- from a comparison -----------------------------------------------------------------------------


def _standings(run: RunRecord, candidates: Sequence[Row]) -> list[Standing]:
    """Return the variants of a comparison at `best_ratio`, the best first; those without a perplexity are left out.

    Records of an older version, without a variant, give none.
    """
    asked = run.get("config", {}).get("best_ratio")
    lines = {
        label: line
        for label, line in zip(labels(candidates), candidates, strict=True)
        if "variant" in line and number(line.get("ratio_asked")) == asked
    }
    rows = [row for row in comparison_rows(run, candidates) if row.candidate != DENSE and row.asked == asked]
    return [(row, lines[row.label]) for row in rows if row.label in lines and math.isfinite(_figure(run, row))]


def _figure(run: RunRecord, row: ComparisonRow) -> float:
    return row.ppl_out if first_metric(run, "out") else row.ppl_in


def _more_windows(run: RunRecord, found: Sequence[Standing]) -> list[Suggestion]:
    """Evaluate on more text where there is too little to tell variants apart."""
    if len(found) < 2:
        return []
    windows = found[0][0].windows
    return [
        Suggestion(
            f"{windows} window{'s' if windows > 1 else ''} of evaluation text cannot tell variants apart, which takes "
            f"{FEWEST}: evaluate on more.",
            "intervals and tests, which this run has none of",
            compare_command(run, "windows", {"evaluation": {"windows": MORE_WINDOWS}}),
        )
    ]


def _cheaper(run: RunRecord, found: Sequence[Standing]) -> list[Suggestion]:
    """Use the variant that needs least among those that cannot be told apart from the best."""
    efforts = {row: effort(line["chain"]) for row, line in found if row.best or row.tied}
    best = next((row for row in efforts if row.best), None)
    chosen = max((row for row in efforts if row.tied), key=lambda row: efforts[row][0], default=best)
    if best is None or chosen is None or efforts[chosen][0] <= efforts[best][0]:
        return []
    figures, scale = [_figure(run, row) for row in (chosen, best)], scale_of(run["metrics"][0]["name"])
    change = 100 * (figures[0] - figures[1]) / abs(figures[1])
    after, before = map(scale.shown, figures)
    return [
        Suggestion(
            f"{chosen.label} cannot be told apart from the best, {best.label} (p = {chosen.p_value:.2g}), and scoring "
            f"needs less: {efforts[chosen][1]} instead of {efforts[best][1]}.",
            f"measured at {100 * best.asked:g} %: {scale.short} {after} instead of {before} "
            f"({signed(change, decimals_of(change))} %)",
            prune_command(run, dict(found)[chosen]),
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
    found = ((place, said) for place, (source, said) in enumerate(_EFFORT.items()) if source in sources)
    return next(found, (len(_EFFORT), "no pass over text"))


def _more_seeds(run: RunRecord, found: Sequence[Standing]) -> list[Suggestion]:
    """Ask for more seeds where they differ more than the two best variants do."""
    if len(found) < 2:
        return []
    (first, _), (second, _) = found[:2]
    ratio, gap = f"at {100 * first.asked:g} %", _figure(run, second) - _figure(run, first)
    seeds = [int(seed) for seed in run["seeds"]["calibration"]]
    if first.seeds == 1:
        return [
            Suggestion(
                f"One seed does not say how much the difference of {abs(gap):.2g} between {first.label} and "
                f"{second.label} {ratio} owes to the text that was drawn.",
                "the spread over seeds becomes known; one seed has measured none",
                compare_command(run, "seeds", {"seeds": _seeds(seeds, 3)}),
            )
        ]
    spreads = [row.spread_out if first_metric(run, "out") else row.spread_in for row in (first, second)]
    spread = max((each for each in spreads if not math.isnan(each)), default=math.nan)
    if not (math.isfinite(spread) and 0 <= gap < spread):
        return []
    needed = math.ceil(8 * (spread / gap) ** 2) if gap > 0 else math.inf
    count = int(min(max(needed, first.seeds + 1), max(MOST_SEEDS, first.seeds + 1)))
    before, after = (spread / math.sqrt(many) for many in (first.seeds, count))
    enough = f"about {needed:,} would settle it" if needed < 1000 else "no number of seeds will settle it"
    return [
        Suggestion(
            f"{first.label} and {second.label} differ {ratio} by {gap:.2g}, their seeds by {spread:.2g} (standard "
            "deviation): more seeds or calibration.examples.",
            f"standard error of a mean from {before:.2g} with {first.seeds} seeds to {after:.2g} with {count}; "
            f"{enough} (two standard errors of the difference)",
            compare_command(run, "seeds", {"seeds": _seeds(seeds, count)}),
        )
    ]


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
    metric, tied = frontier["metric"], [other.variant for other in others if other.tied]
    dense, value = run[DENSE]["ppl"][metric], row["ppl"][metric]
    change = 100 * (value - dense) / abs(dense) if dense else math.inf
    text = f"{best.variant} can be pruned to {100 * least['ratio']:.4g} % within +{frontier['percent']:g} %"
    text += ", whatever the seed" if best.seeds > 1 else ""
    text += f"; {some(tied)} cannot be told apart from it." if tied else "."
    effect = f"measured: {metric} {format_figure(value, scale_of(metric))}, {signed(change, 1)} %"
    return [Suggestion(text, effect, prune_command(run, row))]
