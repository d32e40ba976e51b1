"""What to try next, from what a run has measured: a text, the effect to expect, and the command.

Every number is of the run's own records: a comparison is judged by what it compared, a frontier by how far it went.
What `saap sensitivity` tries at its ratio (`trials`), from what single places cost, is measured by masks and on the
same text; that is offered which was surely better, by the paired bootstrap interval over the windows.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from saap_jax.estimation import make_estimators
from saap_jax.evaluation.crossing import found_variants
from saap_jax.evaluation.differences import Difference, decimals_of, paired_difference
from saap_jax.evaluation.resample import FEWEST, few
from saap_jax.evaluation.scales import format_figure, scale_of
from saap_jax.evaluation.sensitivity import (
    Change,
    Plan,
    a_parameter,
    changes_of,
    costs_of,
    judged_metric,
    nearest_share,
    plan_of,
    structures_in,
)
from saap_jax.runs.commands import compare_command, prune_command
from saap_jax.runs.records import Row, RunRecord, Suggestion, Trial
from saap_jax.runs.standing import DENSE, ComparisonRow, comparison_rows, kept_by_layer, labels, number, primary_domain
from saap_jax.runtime.words import plural, signed, some
from saap_jax.steps.chain import parse
from saap_jax.steps.score.oracles import is_oracle
from saap_jax.types import STRUCTURES

MORE_WINDOWS = 24
"""Windows that are suggested where a run has too few, the usual number."""

SEVERAL, LITTLE = 3.0, 0.1
"""Times the average a place costs from where on it is costly, and up to where it costs almost nothing."""

SHARES = tuple(round(0.05 * step, 2) for step in range(11))
"""Attention shares that are tried."""

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
    """List what a run suggests, from its records alone; none of a kind of run that has none.

    Args:
        run: `run.json` of `saap compare`, `frontier` or `sensitivity`.
        candidates: its lines of `metrics.jsonl`.
    """
    if run.get("kind") == "sensitivity":
        return _from_trials(run, candidates)
    if run.get("kind") == "frontier" and run.get("frontier"):
        return _prune_there(run, candidates)
    found = _standings(run, candidates) if run.get("kind") == "compare" else []
    if len(found) < 2:
        return []
    if not 0 < (windows := min(row.windows for row, _ in found)) < FEWEST:
        return [*_cheaper(run, found), *_more_seeds(run, found)]
    said = f"{plural(windows, 'window')} of evaluation text cannot tell variants apart, which takes {FEWEST}"
    command = compare_command(run, "windows", {"evaluation": {"windows": MORE_WINDOWS}})
    return [_suggest(f"{said}: evaluate on more.", "intervals and tests, which this run has none of", command)]


def _suggest(text: str, effect: str, command: str) -> Suggestion:
    return {"text": text, "effect": effect, "command": command}


# --- from a comparison -----------------------------------------------------------------------------


def _standings(run: RunRecord, candidates: Sequence[Row]) -> list[Standing]:
    """List the variants of a comparison at `best_ratio`, the best first; those without a perplexity are left out."""
    asked = run.get("config", {}).get("best_ratio")
    lines = {
        label: line
        for label, line in zip(labels(candidates), candidates, strict=True)
        if "variant" in line and number(line.get("ratio_asked")) == asked
    }
    rows = [row for row in comparison_rows(run, candidates) if row.candidate != DENSE and row.asked == asked]
    return [(row, lines[row.label]) for row in rows if row.label in lines and math.isfinite(_figure(run, row))]


def _figure(run: RunRecord, row: ComparisonRow) -> float:
    return getattr(row, f"ppl_{primary_domain(run)}")


def _cheaper(run: RunRecord, found: Sequence[Standing]) -> list[Suggestion]:
    """Use the variant that needs least among those that cannot be told apart from the best."""
    efforts = [(*effort(line["chain"]), row, line) for row, line in found if row.best or row.tied]
    before = next((each for each in efforts if each[2].best), None)
    after = max((each for each in efforts if each[2].tied), key=lambda each: each[0], default=before)
    if before is None or after is None or after[0] <= before[0]:
        return []
    (_, more, best, _), (_, less, chosen, line), scale = before, after, scale_of(run["metrics"][0]["name"])
    figures = [_figure(run, row) for row in (chosen, best)]
    change = 100 * (figures[0] - figures[1]) / abs(figures[1])
    new, old = map(scale.shown, figures)
    return [
        _suggest(
            f"{chosen.label} cannot be told apart from the best, {best.label} (p = {chosen.p_value:.2g}), and scoring "
            f"needs less: {less} instead of {more}.",
            f"measured at {100 * best.asked:g} %: {scale.short} {new} instead of {old} "
            f"({signed(change, decimals_of(change))} %)",
            prune_command(run, line),
        )
    ]


def effort(chain: str) -> tuple[int, str]:
    """Rank the needs of a chain's scores, larger = less, and name them.

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
    """Ask for more seeds where there is one."""
    (first, _), (second, _) = found[:2]
    if first.seeds > 1:
        return []
    gap, known = abs(_figure(run, second) - _figure(run, first)), [int(seed) for seed in run["seeds"]["calibration"]]
    seeds = [*known, *(seed for seed in range(3) if seed not in known)][:3]
    return [
        _suggest(
            f"One seed does not say how much the difference of {gap:.2g} between {first.label} and {second.label} at "
            f"{100 * first.asked:g} % owes to the text that was drawn.",
            "the spread over seeds becomes known; one seed has measured none",
            compare_command(run, "seeds", {"seeds": seeds}),
        )
    ]


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
    return [_suggest(text, effect, prune_command(run, row))]


# --- from what single places cost ------------------------------------------------------------------


def trial_options(now: Mapping[str, Any], changes: Sequence[Change], plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """Suggest alternatives, from the prices of single places: options of `within`, or an allocation, by kind.

    `protect`: leave the layers alone from which something goes at several times the average cost, the dearest
    first, one more an option. `attention`: other shares of the budget for attention. `allocation`: one ranking,
    which can take more from places that cost almost nothing, instead of the same share of each layer.

    Args:
        now: the limits of the method, and the name of its allocation.
        changes: what places cost at one share.
        plan: what the method removes.
    """
    layers = list(dict.fromkeys(change.layer for change in _costly(changes, plan)))
    skip = [list(now["protect"]) + sorted(layers[: count + 1]) for count in range(len(layers))]
    shares = [share for share in SHARES if share != now["attention"]]
    ranks = now["allocation"] != "uniform" or not any(change.relative <= LITTLE for change in changes)
    return {
        "protect": [{"protect": each} for each in skip],
        "attention": [{"attention": share} for share in shares],
        "allocation": [] if ranks else [{"allocation": "global"}],
    }


def _costly(changes: Sequence[Change], plan: Plan) -> list[Change]:
    """List the places that cost several times the average and lose units in a plan, dearest first."""
    costly = [change for change in changes if change.relative >= SEVERAL and plan[change.structure, change.layer] > 0]
    return sorted(costly, key=lambda change: -change.relative)


def _from_trials(run: RunRecord, candidates: Sequence[Row]) -> list[Suggestion]:
    """List what `saap sensitivity` tried at its ratio and found to be surely better."""
    rows = {row["candidate"]: row for row in candidates}
    found, metric, where = [], judged_metric(run), f"measured at {100 * run['config']['ratio']:g} %:"
    for trial in run.get("trials", []):
        row, base = rows[trial["candidate"]], rows[trial["instead_of"]]
        command = compare_command(run, trial["kind"], {"methods": [trial["chain"]]})
        if trial["kind"] == "aligned":
            if _saved(trial)[1] > 0 and len(trial["seconds"][0]) >= FEWEST:
                text = f"MLP widths to multiples of {run['config']['align']} are faster."
                found.append(_suggest(text, f"{where} {aligned_sentence(run, candidates, trial)}", command))
            continue
        change = _difference(run, row, base)
        if change.sure and change.value < 0:
            digits, scale = decimals_of(change.percent[0]), scale_of(metric)
            before, after = (scale.shown(each["ppl"][metric]) for each in (base, row))
            value, low, high = (f"{signed(end, digits)} %" for end in change.percent)
            effect = f"{where} {scale.short} {after} instead of {before} ({value}, {low.removesuffix(' %')} to {high})"
            text = _reason(run, candidates, trial, base, row)
            found.append(_suggest(text[:1].upper() + text[1:], effect, command))
    return found


def _reason(run: RunRecord, candidates: Sequence[Row], trial: Trial, base: Row, row: Row) -> str:
    """Say what speaks for a trial."""
    changes = nearest_share(changes_of(run, candidates), run["config"]["ratio"])
    if trial["kind"] == "protect":
        layers = {layer for layer in trial["changes"]["protect"] if float(layer).is_integer() and layer >= 0}
        plan = plan_of(costs_of(run, candidates), kept_by_layer(base))
        costly = [change for change in _costly(changes, plan) if change.layer in layers]
        verbs = [" costs", *[""] * len(costly)]
        said = [f"layer {each.layer}'s {_name(each.structure)}{verb} {each.relative:.1f} x"
                for each, verb in zip(costly, verbs, strict=False)]  # fmt: skip
        return f"{', '.join(said)} the average of its structure: leave {_layers(layers)} alone."
    if trial["kind"] == "attention":
        now, then = (_attention_share(candidates, kept_by_layer(each)) for each in (base, row))
        attention, mlp = (a_parameter(changes, structure) for structure in STRUCTURES)
        said = "attention and MLP cost differently"
        if attention > 0 and mlp > 0:
            said = f"a parameter of attention costs {attention / mlp:.2g} x one of the MLP"
        return f"{said}: take {100 * then:.0f} % of what is removed from attention, not {100 * now:.0f} %."
    cheap = [change for change in changes if change.relative <= LITTLE]
    said = ", ".join(
        f"{_name(structure)} of {_layers({change.layer for change in cheap if change.structure == structure})}"
        if structure in STRUCTURES
        else structure
        for structure in structures_in(candidates)
        if any(change.structure == structure for change in cheap)
    )
    return f"{said} cost{'s' if len(cheap) == 1 else ''} at most {LITTLE:g} x the average: rank all layers together."


def _attention_share(candidates: Sequence[Row], kept: Mapping[str, Sequence[int | float]]) -> float:
    """Compute attention's share of the removed parameters."""
    removed = dict.fromkeys(STRUCTURES, 0.0)
    for row in {(row["structure"], row["layer"]): row for row in candidates if "layer" in row}.values():
        gone = row["units"] - kept[row["structure"]][row["layer"]]
        removed[row["structure"]] += gone * row["removed"] / (row["actual"] * row["units"])
    total = sum(removed.values())
    return removed["attention"] / total if total else 0.0


def aligned_sentence(run: RunRecord, candidates: Sequence[Row], trial: Trial) -> str:
    """Say what aligned widths change, as measured: perplexity with its interval, time with its range over rounds."""
    rows = {row["candidate"]: row for row in candidates}
    change = _difference(run, rows[trial["candidate"]], rows[trial["instead_of"]])
    (value, low, high), (saved, least, most) = change.percent, _saved(trial)
    digits = decimals_of(value)
    ppl = f"change the ppl by {signed(value, digits)} % ({signed(low, digits)} to {signed(high, digits)} %)"
    if change.same:
        ppl = "leave the ppl as it is"
    elif math.isnan(low):
        ppl = f"change the ppl by {signed(value, digits)} %, {few(change.windows)},"
    rounds = len(trial["seconds"][0])
    if rounds < FEWEST:
        time = f"change the time by {signed(-saved, 1)} % ({signed(-most, 1)} to {signed(-least, 1)} %"
    elif least > 0:
        time = f"save {saved:.1f} % time ({least:.1f} to {most:.1f} %"
    elif most < 0:
        time = f"cost {-saved:.1f} % time ({-most:.1f} to {-least:.1f} %"
    else:
        time = f"do not measurably change the time ({signed(-most, 1)} to {signed(-least, 1)} %"
    before, after = trial["segments"]
    instead = f" instead of {before}" if after != before else ""
    over = f"{rounds} rounds" + ("" if rounds >= FEWEST else f", where a verdict takes {FEWEST}")
    segments = f"{after} segments of equal layers{instead}"
    return f"widths to multiples of {run['config']['align']} {ppl} and {time} over {over}); {segments}"


def _difference(run: RunRecord, row: Row, base: Row) -> Difference:
    """Subtract another candidate's loss on the judged text."""
    metric = judged_metric(run)
    losses, other = (np.asarray(each["losses"][metric], np.float64)[None] for each in (row, base))
    return paired_difference(losses, other, resamples=run["config"]["resamples"], scale=scale_of(metric))


def _saved(trial: Trial) -> tuple[float, float, float]:
    """Compute the percent of time saved in a trial: median, least and most of the rounds."""
    before, after = (np.asarray(seconds, np.float64) for seconds in trial["seconds"])
    saved = 100 * (1 - after / before)
    return float(np.median(saved)), float(saved.min()), float(saved.max())


# --- words -----------------------------------------------------------------------------------------


def _name(structure: str) -> str:
    return {"mlp": "MLP"}.get(structure, structure)


def _layers(layers: Collection[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, sorted(layers)))}"
