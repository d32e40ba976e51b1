"""What `saap sensitivity` tries at its ratio, from what single places cost, and what it suggests of that.

What is tried is measured by masks and on the same text; one that is not surely better, by the paired bootstrap interval
over the windows, is not offered.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from saap_jax.evaluation.differences import Difference, decimals_of, paired_difference
from saap_jax.evaluation.resample import FEWEST, few
from saap_jax.evaluation.scales import scale_of
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
from saap_jax.runs.commands import compare_command
from saap_jax.runs.records import Row, RunRecord, Trial
from saap_jax.runs.standing import kept_by_layer
from saap_jax.runtime.words import signed
from saap_jax.types import STRUCTURES

SEVERAL, LITTLE = 3.0, 0.1
"""Times the average a place costs from where on it is costly, and up to where it costs almost nothing."""

SHARES = tuple(round(0.05 * step, 2) for step in range(11))
"""Attention shares that are tried."""


class Suggestion(NamedTuple):
    """Something to try."""

    text: str
    """What was found, and what to do about it."""
    effect: str
    """What to expect of it, from measured numbers."""
    command: str
    """The words to type."""


def trial_options(now: Mapping[str, Any], changes: Sequence[Change], plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """Return what could be tried instead, from what single places cost: options of `within`, or an allocation, by kind.

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
    """Return the places that cost several times the average and from which a plan takes something, dearest first."""
    costly = [change for change in changes if change.relative >= SEVERAL and plan[change.structure, change.layer] > 0]
    return sorted(costly, key=lambda change: -change.relative)


def sensitivity_suggestions(run: RunRecord, candidates: Sequence[Row]) -> list[Suggestion]:
    """Return what a run of `saap sensitivity` suggests: what it tried at its ratio and found to be surely better."""
    rows = {row["candidate"]: row for row in candidates}
    found = []
    for trial in run.get("trials", []):
        row, base = rows[trial["candidate"]], rows[trial["instead_of"]]
        change = _difference(run, row, base)
        metric = judged_metric(run)
        if trial["kind"] == "aligned":
            if _saved(trial)[1] > 0 and len(trial["seconds"][0]) >= FEWEST:
                text = f"MLP widths to multiples of {run['config']['align']} are faster."
                effect = f"measured at {100 * run['config']['ratio']:g} %: {aligned_sentence(run, candidates, trial)}"
                found.append(Suggestion(text, effect, compare_command(run, "aligned", {"methods": [trial["chain"]]})))
            continue
        if not (change.sure and change.value < 0):
            continue
        value, low, high = change.percent
        digits = decimals_of(value)
        scale = scale_of(metric)
        before, after = (scale.shown(each["ppl"][metric]) for each in (base, row))
        effect = (
            f"measured at {100 * run['config']['ratio']:g} %: {scale.short} {after} instead of "
            f"{before} ({signed(value, digits)} %, {signed(low, digits)} to {signed(high, digits)} %)"
        )
        text = _found(run, candidates, trial, base, row)
        found.append(
            Suggestion(_capital(text), effect, compare_command(run, trial["kind"], {"methods": [trial["chain"]]}))
        )
    return found


def _found(run: RunRecord, candidates: Sequence[Row], trial: Trial, base: Row, row: Row) -> str:
    """Say what speaks for a trial."""
    changes = nearest_share(changes_of(run, candidates), run["config"]["ratio"])
    if trial["kind"] == "protect":
        layers = {layer for layer in trial["changes"]["protect"] if float(layer).is_integer() and layer >= 0}
        plan = plan_of(costs_of(run, candidates), kept_by_layer(base))
        costly = [change for change in _costly(changes, plan) if change.layer in layers]
        costly.sort(key=lambda change: -change.relative)
        said = [
            f"{_place(change)}{' costs' if change is costly[0] else ''} {change.relative:.1f} x" for change in costly
        ]
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
    """Return the share of the removed parameters that comes from attention."""
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
    """Return the loss of a candidate less that of another on the judged text."""
    metric = judged_metric(run)
    losses, other = (np.asarray(each["losses"][metric], np.float64)[None] for each in (row, base))
    return paired_difference(losses, other, resamples=run["config"]["resamples"], scale=scale_of(metric))


def _saved(trial: Trial) -> tuple[float, float, float]:
    """Return the percent of time that a trial saves: median, least and most of the rounds."""
    before, after = (np.asarray(seconds, np.float64) for seconds in trial["seconds"])
    saved = 100 * (1 - after / before)
    return float(np.median(saved)), float(saved.min()), float(saved.max())


# --- words -----------------------------------------------------------------------------------------


def _name(structure: str) -> str:
    return {"mlp": "MLP"}.get(structure, structure)


def _place(change: Change) -> str:
    return f"layer {change.layer}'s {_name(change.structure)}"


def _layers(layers: Collection[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, sorted(layers)))}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
