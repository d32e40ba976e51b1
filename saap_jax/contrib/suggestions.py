"""What to try next, from what a run has measured: a text, the effect to expect, and the command.

Every number is of the run's own records: a comparison is judged by what it compared, a frontier by how far it went.
What `saap sensitivity` tries at its ratio (`trials`), from what single places cost, is measured as `saap compare` does,
on the same text; that is offered which was surely better, corrected for how many were tried.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from saap_jax.contrib.sensitivity.profiles import Change, Shares, a_parameter, changes_of, judged_metric, nearest_share
from saap_jax.evaluation.crossing import found_variants
from saap_jax.evaluation.differences import Difference, decimals_of, paired_difference
from saap_jax.evaluation.resample import FEWEST
from saap_jax.evaluation.scales import format_figure, scale_of
from saap_jax.records import Row, RunRecord, Suggestion, Trial
from saap_jax.runs.commands import compare_command, prune_command
from saap_jax.runs.standing import DENSE, comparison_rows, primary_domain
from saap_jax.runtime.words import plural, signed, some
from saap_jax.types import STRUCTURES

MORE_WINDOWS = 24
"""Windows that are suggested where a run has too few, the usual number."""

SEVERAL = 3.0
LITTLE = 0.1
"""Times the average a place costs from where on it is costly, and up to where it costs almost nothing."""

SHARES = tuple(round(0.05 * step, 2) for step in range(11))
"""Attention shares that are tried."""


def suggestions_of(run: RunRecord, candidates: Sequence[Row]) -> list[Suggestion]:
    """List what a run suggests, from its records alone; none of a kind of run that has none.

    Args:
        run: `run.json` of `saap compare`, `frontier` or `sensitivity`.
        candidates: its lines of `metrics.jsonl`.
    """
    match run.get("kind"):
        case "sensitivity":
            return _from_trials(run, candidates)
        case "frontier" if run.get("frontier"):
            return _prune_there(run, candidates)
        case "compare":
            return _more_of_it(run, candidates)
    return []


def _more_of_it(run: RunRecord, candidates: Sequence[Row]) -> list[Suggestion]:
    """Ask for more windows where a comparison has too few for a test, and for more seeds where there is one."""
    asked = run.get("config", {}).get("best_ratio")
    domain = f"ppl_{primary_domain(run)}"
    found = [row for row in comparison_rows(run, candidates) if row.candidate != DENSE and row.asked == asked]
    figures = [figure for row in found if math.isfinite(figure := getattr(row, domain))]
    if len(figures) < 2:
        return []
    if 0 < (windows := min(row.windows for row in found)) < FEWEST:
        if windows < (run["config"]["evaluation"]["windows"] or math.inf):
            return []  # the text has no more
        said = f"{plural(windows, 'window')} of evaluation text cannot tell variants apart, which takes {FEWEST}"
        command = compare_command(run, "windows", {"evaluation": {"windows": MORE_WINDOWS}})
        effect = "intervals and tests, which this run has none of"
        return [Suggestion(text=f"{said}: evaluate on more.", effect=effect, command=command)]
    if found[0].seeds > 1:
        return []
    known = [int(seed) for seed in run["seeds"]["calibration"]]
    seeds = [*known, *(seed for seed in range(3) if seed not in known)][:3]
    apart = f"{abs(figures[1] - figures[0]):.2g} in {scale_of(run['metrics'][0]['name']).noun}"
    return [
        Suggestion(
            text=f"One seed does not say how much the difference of {apart} between "
            f"{found[0].label} and {found[1].label} at {100 * found[0].asked:g} % owes to the text that was drawn.",
            effect="the spread over seeds becomes known; one seed has measured none",
            command=compare_command(run, "seeds", {"seeds": seeds}),
        )
    ]


def _prune_there(run: RunRecord, candidates: Sequence[Row]) -> list[Suggestion]:
    """Prune with the variant of the largest ratio, as far as it holds for all its seeds."""
    (best, *others) = found_variants(run, candidates)
    frontier = run["frontier"]
    lines = [line for line in frontier["lines"] if line["variant"] == best.variant and line["ratio"] > 0]
    if len(lines) < best.seeds or best.windows < FEWEST:
        return []
    least = min(lines, key=lambda line: line["ratio"])
    row = next(row for row in candidates if row["candidate"] == least["candidate"])
    metric = frontier["metric"]
    tied = [other.variant for other in others if other.tied]
    dense = run[DENSE]["ppl"][metric]
    value = row["ppl"][metric]
    if dense:
        change = 100 * (value - dense) / abs(dense)
    else:
        change = math.inf
    text = f"{best.variant} can be pruned to {100 * least['ratio']:.4g} % within +{frontier['percent']:g} %"
    text += ", whatever the seed" if best.seeds > 1 else ""
    if tied:
        text += f"; {some(tied)} cannot be told apart from it."
    else:
        text += "."
    effect = f"measured: {metric} {format_figure(value, scale_of(metric))}, {signed(change, 1)} %"
    return [Suggestion(text=text, effect=effect, command=prune_command(run, row))]


# --- what single places cost, and what was tried for it --------------------------------------------


def trial_options(now: Mapping[str, Any], changes: Sequence[Change], plan: Shares) -> dict[str, list[dict[str, Any]]]:
    """Suggest alternatives, from the prices of single places: options of `within`, or an allocation, by kind.

    `protect`: leave the layers alone from which something goes at several times the average cost, the dearest
    first, one more an option. `attention`: other shares of the budget for attention. `allocation`: one ranking,
    which can take more from places that cost almost nothing, instead of the same share of each layer.

    Args:
        now: the limits of the method, and the name of its allocation.
        changes: what places cost at one share.
        plan: what the method removes.
    """
    costly = [change for change in changes if plan[change.structure, change.layer] > 0 and change.relative >= SEVERAL]
    layers = list(dict.fromkeys(change.layer for change in sorted(costly, key=lambda change: -change.relative)))
    skip = [list(now["protect"]) + sorted(layers[: count + 1]) for count in range(len(layers))]
    shares = [share for share in SHARES if share != now["attention"]]
    ranks = now["allocation"] != "uniform" or not any(change.relative <= LITTLE for change in changes)
    return {
        "protect": [{"protect": each} for each in skip],
        "attention": [{"attention": share} for share in shares],
        "allocation": [] if ranks else [{"allocation": "global"}],
    }


def _from_trials(run: RunRecord, candidates: Sequence[Row]) -> list[Suggestion]:
    """List what `saap sensitivity` tried at its ratio and found to be surely better."""
    rows = {row["candidate"]: row for row in candidates}
    found = []
    metric = judged_metric(run)
    where = f"measured at {100 * run['config']['ratio']:g} %:"
    for trial in run.get("trials", []):
        row = rows[trial["candidate"]]
        base = rows[trial["instead_of"]]
        command = compare_command(run, trial["kind"], {"methods": [trial["chain"]]})
        change = _difference(run, row, base)
        if change.sure and change.value < 0:
            digits = decimals_of(change.percent[0])
            scale = scale_of(metric)
            before, after = (format_figure(each["ppl"][metric], scale) for each in (base, row))
            value, low, high = (f"{signed(end, digits)} %" for end in change.percent)
            effect = f"{where} {scale.short} {after} instead of {before} ({value}, {low.removesuffix(' %')} to {high})"
            found.append(Suggestion(text=_reason(run, candidates, trial), effect=effect, command=command))
    return found


def _reason(run: RunRecord, candidates: Sequence[Row], trial: Trial) -> str:
    """Say what speaks for a trial."""
    changes = nearest_share(changes_of(run, candidates), run["config"]["ratio"])
    match trial["kind"]:
        case "protect":
            layers = sorted(layer for layer in trial["changes"]["protect"] if float(layer).is_integer() and layer >= 0)
            most = max((change for change in changes if change.layer in layers), key=lambda change: change.relative)
            name = {"mlp": "MLP"}.get(most.structure, most.structure)
            said = f"Layer {most.layer}'s {name} costs {most.relative:.1f} x the average of its structure"
            return f"{said}: leave layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))} alone."
        case "attention":
            attention, mlp = (a_parameter(changes, structure) for structure in STRUCTURES)
            said = f"A parameter of attention costs {attention / mlp:.2g} x one of the MLP"
            share = f"{100 * trial['changes']['attention']:.0f} % of what is removed from attention"
            return f"{said if attention > 0 and mlp > 0 else 'Attention and MLP cost differently'}: take {share}."
        case _:
            return f"Some places cost at most {LITTLE:g} x the average: rank all layers together."


def _difference(run: RunRecord, row: Row, base: Row) -> Difference:
    """Subtract another candidate's loss on the judged text."""
    metric = judged_metric(run)
    losses, other = (np.asarray(each["losses"][metric], np.float64)[None] for each in (row, base))
    articles = run.get("articles", {}).get(metric, ())
    return paired_difference(losses, other, others=len(run["trials"]), scale=scale_of(metric), articles=articles)
