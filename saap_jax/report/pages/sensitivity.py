"""What `saap sensitivity` finds: a map of what each layer costs, the places that cost most and least, suggestions."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from saap_jax.evaluation.resample import FEWEST, LEVEL, format_interval
from saap_jax.evaluation.scales import format_figure, scale_of
from saap_jax.evaluation.sensitivity import (
    Change,
    a_parameter,
    as_costly,
    changes_of,
    judged_metric,
    nearest_share,
    structures_in,
)
from saap_jax.report.blocks import Block, Column, Figure, Section, Table, Words
from saap_jax.report.figures.maps import change_figure
from saap_jax.report.formats import BEST, TIED, format_change
from saap_jax.report.pages.common import closing_sections, files_of, suggestion_blocks, suggestions_section
from saap_jax.runs.reading import read_candidates
from saap_jax.runs.records import Row, RunRecord
from saap_jax.runs.standing import DENSE
from saap_jax.runs.trials import aligned_sentence
from saap_jax.runtime.words import MINUS, plural, signed

EXTREMES = 5
"""Places shown on either side."""


def sensitivity_sections(path: Path, run: RunRecord) -> list[Section]:
    """Return the sections of a run, finished or not."""
    candidates = read_candidates(path)[0]
    known = "losses" in run.get(DENSE, {}) and any("layer" in row for row in candidates)
    return [
        *([] if known else [Section("Summary", [Words("Nothing is measured yet.", soft=False)])]),
        *suggestions_section(run, always=True),
        *([Section("What each layer costs", sensitivity_blocks(run, candidates))] if known else []),
        *closing_sections(run),
    ]


def sensitivity_files(run: RunRecord, candidates: Sequence[Row]) -> dict[str, str]:
    """Return the files of a run: map, tables with suggestions, and all changes."""
    return files_of(
        "sensitivity", [Section("Suggestions", suggestion_blocks(run)), *sensitivity_blocks(run, candidates)]
    )


def sensitivity_blocks(run: RunRecord, candidates: Sequence[Row]) -> list[Block]:
    """Return the map, the extremes, and all changes behind a fold."""
    every = _table("All changes", run, _rows(run, candidates, changes_of(run, candidates), {}))._replace(
        file="sensitivity"
    )
    extreme = Section("What costs most and least", [extreme_table(run, candidates)])
    return [_map(run, candidates), extreme, Section(every.title, [every], folded=True)]


def extremes(changes: Sequence[Change], ratio: float) -> tuple[float, list[Change], list[Change]]:
    """Return the share nearest to a ratio, and the places that cost most and least a parameter when that share goes.

    Places are ordered by their cost beside the average, or by their cost itself where an average is
    not above 0; no place is on both sides.
    """
    shown = nearest_share(changes, ratio)
    asked = shown[0].asked
    several = not any(math.isnan(change.relative) for change in shown)
    shown.sort(key=lambda change: -(change.relative if several else change.nats))
    many = min(EXTREMES, (len(shown) + 1) // 2)
    return asked, shown[:many], shown[max(many, len(shown) - EXTREMES) :]


def marks_of(run: RunRecord, candidates: Sequence[Row]) -> dict[Change, str]:
    """Return the mark of what costs most and of what costs least, and of places on its side that may cost as much."""
    changes, marks = changes_of(run, candidates), {}
    _, most, least = extremes(changes, run["config"]["ratio"])
    shown = nearest_share(changes, run["config"]["ratio"])
    for side in (most, least[::-1]):
        if side:
            first, others = side[0], [change for change in shown if change != side[0]]
            p_values = dict(zip(others, as_costly(run, candidates, first, others), strict=True))
            marks |= {first: BEST} | {change: TIED for change in side[1:] if p_values[change] >= LEVEL}
    return marks


def extreme_table(run: RunRecord, candidates: Sequence[Row]) -> Table:
    """Return the places that cost most and least."""
    asked, most, least = extremes(changes_of(run, candidates), run["config"]["ratio"])
    rows = _rows(run, candidates, [*most, *least], marks_of(run, candidates))
    title = f"{100 * asked:g} % of the units of one place: what costs most, and what least"
    return _table(title, run, rows)._replace(notes=_notes(run, candidates))


def _table(title: str, run: RunRecord, rows: Sequence[dict]) -> Table:
    short, texts = scale_of(judged_metric(run)).short, [metric["name"] for metric in run["metrics"]]
    columns = [
        Column("layer", ("layer",), words=True),
        Column("structure", ("structure", "sign"), lambda name, sign: f"{name} {sign}".rstrip(), words=True),
        Column("removed %", ("actual", "asked"), lambda actual, _: f"{100 * actual:.1f}"),
        Column("parameters", ("removed",), "{:,}".format),
        Column("nats", ("nats",), lambda nats: signed(nats, 4)),
        Column(f"{short} %", ("percent",), format_change),
        Column("95 % interval", ("low", "high"), lambda low, high: format_interval(low, high, format_change) or "n/a"),
        Column("× average", ("relative", "average"), lambda times, _: format_times(times)),
        *(Column(name, (name,), lambda value, name=name: format_figure(float(value), scale_of(name)), wide=True)
          for name in texts),
    ]  # fmt: skip
    return Table(title, columns, rows)


def _rows(
    run: RunRecord, candidates: Sequence[Row], changes: Sequence[Change], marks: Mapping[Change, str]
) -> list[dict]:
    ppl = {(row["structure"], row["layer"], row["asked"]): row.get("ppl", {}) for row in candidates if "layer" in row}
    return [
        {**change._asdict(), "sign": marks.get(change, ""), **ppl[change.structure, change.layer, change.asked]}
        for change in changes
    ]


def format_times(times: float) -> str:
    """Return a cost as a multiple of the average one.

    >>> format_times(4.1), format_times(-2.1), format_times(math.nan)
    ('4.10', '−2.10', 'n/a')
    """
    return "n/a" if math.isnan(times) else f"{times:.2f}".replace("-", MINUS)


def _notes(run: RunRecord, candidates: Sequence[Row]) -> list[str]:
    """Say what the numbers mean, what a structure costs on the whole, and what aligned widths were measured to do."""
    changes, metric = changes_of(run, candidates), judged_metric(run)
    asked, _, _ = extremes(changes, run["config"]["ratio"])
    traced = any("among" in row for row in candidates)
    said = [
        f"{metric}, {format_figure(run[DENSE]['ppl'][metric], scale_of(metric))} unpruned; units of the lowest scores "
        f"by {run['config'].get('method') or run['config'].get('estimator')} go, of one layer alone",
        "× average: loss a removed parameter, beside that of "
        f"{'all structures' if traced else 'all layers of the structure'} together",
    ]
    windows = len(run[DENSE]["losses"][metric])
    if windows < FEWEST:
        said.append(
            f"{BEST} costs most or least; no intervals, and which others cost as much is not tested: "
            f"{plural(windows, 'window')}, where that takes {FEWEST}"
        )
    else:
        said.append(
            f"{BEST} costs most or least   {TIED} cannot be told apart from it (paired bootstrap over windows, Holm, "
            f"{100 * LEVEL:g} %)"
        )
    for structure in structures_in(candidates):
        each = a_parameter(nearest_share(changes, run["config"]["ratio"]), structure)
        if not math.isnan(each):
            said.append(
                f"{structure}: {signed(1e6 * each, 4)} nats a million parameters, over all layers at {100 * asked:g} %"
            )
    aligned = [trial for trial in run.get("trials", []) if trial["kind"] == "aligned"]
    return [*said, *(aligned_sentence(run, candidates, trial) for trial in aligned)]


def _map(run: RunRecord, candidates: Sequence[Row]) -> Figure:
    """Return the map, a panel a structure, shares of removed units by layers."""
    changes = changes_of(run, candidates)
    shares = sorted({change.asked for change in changes})
    panels = {name: np.full((len(shares), run["model"]["layers"]), np.nan) for name in structures_in(candidates)}
    for change in changes:
        panels[change.structure][shares.index(change.asked), change.layer] = change.nats
    panels = {name: cells for name, cells in panels.items() if np.isfinite(cells).any()}
    title = "What each layer costs when it alone is pruned"
    return change_figure("sensitivity", title, panels, [f"{100 * share:g} %" for share in shares], "nats a token")
