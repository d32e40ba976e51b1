"""What `saap sensitivity` finds: a map of what each layer costs, the places that cost most and least, suggestions."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from saap_jax.contrib.sensitivity.profiles import (
    Change,
    a_parameter,
    as_costly,
    changes_of,
    judged_metric,
    nearest_share,
    structures_in,
)
from saap_jax.evaluation.resample import format_interval, too_few
from saap_jax.evaluation.scales import format_figure, scale_of
from saap_jax.records import Row, RunRecord
from saap_jax.report.blocks import Column, Figure, Findings, Section, Table, folded
from saap_jax.report.figures import change_figure
from saap_jax.report.formats import BEST, TIED, VERDICT, format_change, format_hundredths
from saap_jax.report.pages.common import metric_columns, share_evaluated
from saap_jax.runs.directory import RunDirectory
from saap_jax.runs.standing import DENSE
from saap_jax.runtime.words import signed

EXTREMES = 5
"""Places shown on either side."""


def sensitivity_findings(directory: RunDirectory) -> Findings:
    """Show the map, the extremes, and all changes behind a fold."""
    run = directory.record
    candidates = directory.candidates()
    title = "What each layer costs"
    if "losses" not in run.get(DENSE, {}) or not any("layer" in row for row in candidates):
        return Findings(["Nothing is measured yet."], title, [])
    changes = changes_of(run, candidates)
    every = _table("All changes", run, candidates, changes, {})._replace(file="sensitivity")
    extreme = Section("What costs most and least", [extreme_table(run, candidates)])
    return Findings([], title, [_map(run, changes, structures_in(candidates)), extreme, folded(every)])


def extremes(changes: Sequence[Change], ratio: float) -> tuple[list[Change], list[Change]]:
    """Choose the places that cost most and least a parameter when the share nearest to a ratio goes.

    Places are ordered by their cost beside the average, or by their cost itself where an average is
    not above 0; no place is on both sides. A loss that is not a number costs most.
    """
    shown = nearest_share(changes, ratio)
    several = not any(math.isnan(change.relative) for change in shown)
    shown.sort(key=lambda change: -np.nan_to_num(change.relative if several else change.nats, nan=np.inf))
    many = min(EXTREMES, (len(shown) + 1) // 2)
    return shown[:many], shown[max(many, len(shown) - EXTREMES) :]


def marks_of(run: RunRecord, candidates: Sequence[Row], changes: Sequence[Change]) -> dict[Change, str]:
    """Mark what costs most and what costs least of these changes, and places on its side that may cost as much."""
    marks = {}
    shown = nearest_share(changes, run["config"]["ratio"])
    most, least = extremes(changes, run["config"]["ratio"])
    for side in (most, least[::-1]):
        if side:
            first = side[0]
            others = [change for change in shown if change != side[0]]
            found = dict(zip(others, as_costly(run, candidates, first, others), strict=True))
            marks |= {first: BEST} | {change: TIED for change in side[1:] if found[change].tied}
    return marks


def extreme_table(run: RunRecord, candidates: Sequence[Row]) -> Table:
    """List the places that cost most and least."""
    changes = changes_of(run, candidates)
    most, least = extremes(changes, run["config"]["ratio"])
    title = f"{100 * most[0].asked:g} % of the units of one place: what costs most, and what least"
    table = _table(title, run, candidates, [*most, *least], marks_of(run, candidates, changes))
    return table._replace(notes=_notes(run, candidates, changes))


def _table(
    title: str, run: RunRecord, candidates: Sequence[Row], changes: Sequence[Change], marks: Mapping[Change, str]
) -> Table:
    scale = scale_of(judged_metric(run))
    columns = [
        Column("layer", ("layer",), words=True),
        Column("structure", ("structure", "sign"), lambda name, sign: f"{name} {sign}".rstrip(), words=True),
        Column("removed %", ("actual", "asked"), lambda actual, _: f"{100 * actual:.1f}"),
        Column("parameters", ("removed",), "{:,}".format),
        Column("nats" if scale.logarithmic else "loss", ("nats",), lambda nats: format_change(nats, 4)),
        Column(f"{scale.short} %", ("percent",), format_change),
        Column("95 % interval", ("low", "high"), lambda low, high: format_interval(low, high, format_change) or "n/a"),
        Column("× average", ("relative", "average"), lambda times, _: format_hundredths(times)),
        *metric_columns(run, wide=True),
    ]
    ppl = {(row["structure"], row["layer"], row["asked"]): row.get("ppl", {}) for row in candidates if "layer" in row}
    rows: list[dict[str, Any]] = [
        {**change._asdict(), "sign": marks.get(change, ""), **ppl[change.structure, change.layer, change.asked]}
        for change in changes
    ]
    return Table(title, columns, rows)


def _notes(run: RunRecord, candidates: Sequence[Row], changes: Sequence[Change]) -> list[str]:
    """Say what the numbers mean, and what a structure costs on the whole."""
    metric = judged_metric(run)
    shown = nearest_share(changes, run["config"]["ratio"])
    if any("among" in row for row in candidates):
        together = "all structures"
    else:
        together = "all layers of the structure"
    why = too_few(len(run[DENSE]["losses"][metric]))
    how = f"; no intervals, and which others cost as much is not tested: {why}"
    lines = [
        f"{VERDICT} with what costs most or least; that of a place is of it alone",
        f"{metric}, {format_figure(run[DENSE]['ppl'][metric], scale_of(metric))} unpruned; units of the lowest scores "
        f"by {run['config'].get('method') or run['config'].get('estimator')} go, of one layer alone",
        f"× average: loss a removed parameter, beside that of {together} together",
        f"{BEST} costs most or least" + (how if why else f"   {TIED} cannot be told apart from it"),
    ]
    for structure in structures_in(candidates):
        each = a_parameter(shown, structure)
        if not math.isnan(each):
            cost = f"{signed(1e6 * each, 4)} {scale_of(metric).unit}"
            at = f"{100 * shown[0].asked:g}"
            lines.append(f"{structure}: {cost} for a million parameters, over all layers at {at} %")
    if "raced" in run:
        lines.append(
            f"{share_evaluated(run['raced'])}a place is evaluated until it is surely worse or better than the unpruned "
            f"model, or within {run['config']['race_margin']:g} of it; its figures are of the windows that it took"
        )
    return lines


def _map(run: RunRecord, changes: Sequence[Change], structures: Sequence[str]) -> Figure:
    """Draw the map, a panel a structure, shares of removed units by layers."""
    shares = sorted({change.asked for change in changes})
    panels = {name: np.full((len(shares), run["model"]["layers"]), np.nan) for name in structures}
    for change in changes:
        panels[change.structure][shares.index(change.asked), change.layer] = change.nats
    panels = {name: cells for name, cells in panels.items() if np.isfinite(cells).any()}
    title = "What each layer costs when it alone is pruned"
    rows = [f"{100 * share:g} %" for share in shares]
    of = scale_of(judged_metric(run)).unit
    return change_figure("sensitivity", title, panels, rows, of)
