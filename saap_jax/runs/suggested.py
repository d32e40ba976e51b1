"""What a run suggests to try next, for whoever shows it: each a text, the effect to expect, and the command."""

import math
from collections.abc import Sequence

from saap_jax.evaluation.crossing import found_variants
from saap_jax.evaluation.resample import FEWEST
from saap_jax.evaluation.scales import format_figure, scale_of
from saap_jax.runs.commands import prune_command
from saap_jax.runs.records import Row, RunRecord
from saap_jax.runs.standing import DENSE, comparison_rows, labels, number
from saap_jax.runs.suggestions import Standing, Suggestion, comparison_suggestions, sensitivity_suggestions
from saap_jax.runtime.words import some


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
            f"measured: {metric} {format_figure(value, scale_of(metric))}, {change:+.1f} %",
            prune_command(run, row),
        )
    ]
