"""A fidelity run as sections: how well each estimator ranks units by the exact effect of removing them."""

import math
from pathlib import Path

from saap_jax.evaluation.fidelity import MEASURES, SCOPES, Fidelity
from saap_jax.evaluation.paired import LEVEL
from saap_jax.report.kinds.attached import drawing
from saap_jax.report.kinds.common import cost_section, reproduce_section
from saap_jax.report.kinds.fidelity import csv_fidelity, format_interval, heading, legend, marked, ranking, untested
from saap_jax.report.kinds.summary import some
from saap_jax.report.page.blocks import (
    Block,
    Bullets,
    Detail,
    Download,
    Part,
    Picture,
    Section,
    Words,
    plain_table,
    plural,
)
from saap_jax.report.page.strips import Axis, Column, Strip, chart, interval
from saap_jax.report.records import read_json
from saap_jax.report.rows import Record

_TICKS = Axis(-1.05, 1.05, [(-1.0, "\N{MINUS SIGN}1"), (-0.5, ""), (0.0, "0"), (0.5, ""), (1.0, "1")])


def read_fidelity(path: Path) -> list[Fidelity]:
    """Return the correlations that a run keeps, none where it has not come that far.

    Raises:
        ValueError: `fidelity.json` has other fields.
    """
    file = path / "fidelity.json"
    if not file.exists():
        return []
    try:
        return [Fidelity(**row) for row in read_json(file)]
    except TypeError as error:
        raise ValueError(
            f"expected rows of {', '.join(Fidelity._fields)} in {file}, got {error}; run it again"
        ) from None


def fidelity_sections(path: Path, run: Record, detail: Detail) -> list[Section]:
    """Return the sections of a fidelity run, finished or not."""
    rows = read_fidelity(path)
    return [
        Section("summary", "Summary", [Bullets(fidelity_summary(rows))]),
        *_correlations(path, rows, detail),
        *cost_section(run),
        reproduce_section(run),
    ]


def fidelity_summary(rows: list[Fidelity]) -> list[str]:
    """Say which estimator ranks the units of each structure best, or which cannot be told apart."""
    sentences = []
    for scope in SCOPES:
        found = [(name, by["spearman"]) for name, by in ranking(rows, scope) if math.isfinite(by["spearman"].value)]
        if found:
            (name, best), *others = found
            where = "all units together" if scope == "pooled" else f"{scope} units"
            said, value = f"On {where} ({best.units:,} measured), {name}", f"Spearman {format_interval(best)}"
            tied = [other for other, row in others if row.tied]
            if others and all(row.p_value < LEVEL for _, row in others):
                said += f" agrees best with the exact change of the loss: {value}"
            else:
                said += f" has the highest correlation with the exact change of the loss, {value}"
                said += f"; {plural(len(tied), 'other')} cannot be told apart from it: {some(tied)}" if tied else ""
            why = untested([row for _, row in found])
            sentences.append(f"{said}.{f' Nothing is tested: {why}.' if why else ''}")
    return sentences or ["Nothing is measured yet."]


def correlation_chart(rows: list[Fidelity], scope: str, limit: int) -> str:
    """Return Spearman's correlation of each estimator with its interval as a chart, best first."""
    strips = []
    ranked = ranking(rows, scope)
    for name, found in ranked[:limit]:
        row = found["spearman"]
        said = f"{name}, {scope}: Spearman {format_interval(row)}"
        drawn = interval(_TICKS, row.value, row.low, row.high, said, sure=row.low > 0 or row.high < 0)
        strips.append(Strip(marked(name, found, ranked), [drawn, format_interval(row)]))
    return chart("estimator", [Column("Spearman's correlation", _TICKS), Column("")], strips)


def _correlations(path: Path, rows: list[Fidelity], detail: Detail) -> list[Section]:
    parts: list[Block] = []
    for scope in SCOPES:
        ranked = ranking(rows, scope)
        if not ranked:
            continue
        measures = [measure for measure in MEASURES if scope != "pooled" or "layers" not in measure]
        lines = [
            [marked(name, found, ranked), *(format_interval(found[measure]) for measure in measures)]
            for name, found in ranked
        ]
        table = plain_table(f"Correlations, {scope}", ["estimator", *map(heading, measures)], lines)
        picture = Picture(f"Correlations with the exact change, {scope}", correlation_chart(rows, scope, detail.limit))
        words = Words(f"{legend(ranked)}.")
        parts.append(Part("all units together" if scope == "pooled" else scope, [words, picture, table]))
    if not parts:
        return []
    blocks: list[Block] = [
        Words(
            "Rank correlation between scores and the exact change of the loss when a unit goes, with 95 % intervals of "
            "a bootstrap over units. A hollow point: the interval holds 0."
        ),
        *parts,
    ]
    if detail.drawn and (drawn := drawing(path / "fidelity.svg")):
        blocks.append(Part("Scores against exact changes", [Picture("Scores against exact changes", drawn, wide=True)]))
    if detail.downloads:
        blocks.append(Download("CSV of all correlations, full precision", "fidelity.csv", csv_fidelity(rows)))
    return [Section("fidelity", "Do scores predict the effect?", blocks)]
