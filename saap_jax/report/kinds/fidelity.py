"""What `saap fidelity` finds: how well each estimator ranks units by the exact effect of removing them."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from saap_jax.evaluation.rank_correlation import MEASURES, Fidelity
from saap_jax.evaluation.resample import FEWEST, LEVEL
from saap_jax.report.figures.fidelity import fidelity_plot
from saap_jax.report.kinds.common import cost_section, files_of, reproduce_section
from saap_jax.report.page.blocks import (
    Axis,
    Block,
    Bullets,
    Chart,
    Column,
    Data,
    Detail,
    Folded,
    Interval,
    Note,
    Part,
    Picture,
    Plot,
    Section,
    Strip,
    Table,
    Words,
    text_table,
)
from saap_jax.report.page.csv_text import without_nan
from saap_jax.report.page.formats import BEST, TIED, format_correlation
from saap_jax.runs.changes import read_changes
from saap_jax.runs.reading import read_correlations
from saap_jax.runs.records import RunRecord
from saap_jax.runtime.words import MINUS, plural, some
from saap_jax.types import Scores

_AXIS = Axis(-1.05, 1.05, [(-1.0, f"{MINUS}1"), (-0.5, ""), (0.0, "0"), (0.5, ""), (1.0, "1")])

BRIEF = ("spearman", "kendall", "spearman_in_layers")
"""Measures that a terminal of 100 columns has room for."""

Ranked = tuple[str, dict[str, Fidelity]]
"""An estimator and its correlations by measure."""


# --- what a run keeps ------------------------------------------------------------------------------


def read_fidelity(path: Path) -> list[Fidelity]:
    """Return the correlations that a run keeps, none where it has not come that far."""
    known = [{name: row[name] for name in Fidelity._fields if name in row} for row in read_correlations(path)]
    return [Fidelity(**row) for row in known]


# --- sections and files ----------------------------------------------------------------------------


def fidelity_sections(path: Path, run: RunRecord, detail: Detail) -> list[Section]:
    """Return the sections of a fidelity run, finished or not."""
    rows = read_fidelity(path)
    sections = [Section("summary", "Summary", [Bullets(fidelity_summary(rows))])]
    if rows:
        said = Words(
            "Rank correlation between scores and the exact change of the loss when a unit goes, with 95 % intervals of "
            "a bootstrap over units. A hollow point: the interval holds 0."
        )
        blocks = fidelity_blocks(rows, *(read_changes(path) if detail.drawn else ({}, {})), detail)
        sections.append(Section("fidelity", "Do scores predict the effect?", [said, *blocks]))
    return [*sections, *cost_section(run), reproduce_section(run)]


def fidelity_files(rows: Sequence[Fidelity], scores: Mapping[str, Scores], exact: Scores) -> dict[str, str]:
    """Return the files of a run: scores against exact changes as a figure, and the correlations as tables."""
    return files_of("fidelity", fidelity_blocks(rows, scores, exact, Detail()))


def fidelity_blocks(
    rows: Sequence[Fidelity], scores: Mapping[str, Scores], exact: Scores, detail: Detail
) -> list[Block]:
    """Return the charts, all tables behind one fold, the figure of the scores, and the CSV of all correlations."""
    scopes = [scope for scope in dict.fromkeys(row.scope for row in rows) if ranking(rows, scope)]
    tables = [fidelity_table(rows, scope) for scope in scopes]
    blocks: list[Block] = [Part(scope, [correlation_chart(rows, scope, detail.limit)]) for scope in scopes]
    blocks += [Folded("All correlations", [Part(table.title, [table]) for table in tables])] if tables else []
    if plot := scatter(rows, scores, exact):
        blocks.append(Part(plot.title, [Picture(plot.title, plot)]))
    if detail.downloads:
        lines = [without_nan(row) for row in rows]
        blocks.append(Data("CSV of all correlations, full precision", "fidelity.csv", Fidelity._fields, lines))
    return blocks


def scatter(rows: Sequence[Fidelity], scores: Mapping[str, Scores], exact: Scores) -> Plot | None:
    """Return the plot of the scores against the exact changes, None where nothing was measured."""
    panels = {
        name: [(estimator, format_interval(found["spearman"])) for estimator, found in ranking(rows, name)]
        for name in exact
    }
    return fidelity_plot(scores, exact, panels) if scores else None


def fidelity_summary(rows: Sequence[Fidelity]) -> list[str]:
    """Say which estimator ranks the units of each structure best, or which cannot be told apart."""
    sentences = []
    for scope in dict.fromkeys(row.scope for row in rows):
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


def ranking(rows: Sequence[Fidelity], scope: str) -> list[Ranked]:
    """Return the estimators of a scope by Spearman's correlation, best first, those without one last."""
    found: dict[str, dict[str, Fidelity]] = {}
    for row in rows:
        if row.scope == scope:
            found.setdefault(row.estimator, {})[row.measure] = row

    def quality(item: Ranked) -> float:
        value = item[1]["spearman"].value
        return -value if math.isfinite(value) else math.inf

    return sorted(found.items(), key=quality)


def correlation_chart(rows: Sequence[Fidelity], scope: str, limit: int) -> Chart:
    """Return Spearman's correlation of each estimator with its interval, best first."""
    strips = []
    ranked = ranking(rows, scope)
    for name, found in ranked[:limit]:
        row = found["spearman"]
        said = f"{name}, {scope}: Spearman {format_interval(row)}"
        drawn = Interval(row.value, row.low, row.high, said, sure=row.low > 0 or row.high < 0)
        strips.append(Strip(marked(name, found, ranked), [drawn, Note(format_interval(row))]))
    columns = [Column("Spearman's correlation", _AXIS), Column("")]
    return Chart(f"fidelity-{scope}", f"Correlations with the exact change, {scope}", "estimator", columns, strips)


def fidelity_table(rows: Sequence[Fidelity], scope: str, measures: Sequence[str] = MEASURES) -> Table:
    """Return the ranking of one scope (`attention`, `mlp`, `pooled`); units of all layers are no layers' ranks."""
    ranked = ranking(rows, scope)
    measures = [measure for measure in measures if scope != "pooled" or "layers" not in measure]
    lines = [
        [marked(name, found, ranked), *(format_interval(found[measure]) for measure in measures)]
        for name, found in ranked
    ]
    units = ranked[0][1]["spearman"].units if ranked else 0
    title = f"{scope}, {plural(units, 'unit')}: rank correlation with the exact change of the loss"
    return text_table(title, ["estimator", *map(heading, measures)], lines, notes=legend(ranked) if ranked else ())


def marked(estimator: str, found: dict[str, Fidelity], ranked: Sequence[Ranked]) -> str:
    """Return the name of an estimator with the mark of the highest correlation, or of what cannot be told from it."""
    row = found["spearman"]
    if row is ranked[0][1]["spearman"] and math.isfinite(row.value):
        return f"{estimator} {BEST}"
    return f"{estimator} {TIED}" if row.tied else estimator


def legend(ranked: Sequence[Ranked]) -> list[str]:
    """Say what the marks mean, or why nothing is tested."""
    rows = [found["spearman"] for _, found in ranked]
    said = f"{BEST} highest Spearman"
    if any(row.tied for row in rows):
        return [f"{said}   {TIED} cannot be told apart from it (paired bootstrap, Holm, {100 * LEVEL:g} %)"]
    why = untested(rows)
    return [f"{said}; without intervals and tests: {why}" if why else said]


def untested(rows: Sequence[Fidelity]) -> str:
    """Say why correlations of a scope have no intervals: few units or windows; empty where they suffice."""
    units, windows = (max((getattr(row, name) for row in rows), default=0) for name in ("units", "windows"))
    few = [(units, "unit")] + ([(windows, "window")] if windows else [])
    return next((f"{plural(many, of)}, where it takes {FEWEST}" for many, of in few if many < FEWEST), "")


def format_interval(row: Fidelity) -> str:
    """Return a correlation with its interval.

    >>> format_interval(Fidelity("wanda", "mlp", "kendall", 90, -0.181, -0.25, 0.004))
    '−0.18 [−0.25, 0.00]'
    """
    if math.isnan(row.value):
        return "n/a"
    value, low, high = map(format_correlation, (row.value, row.low, row.high))
    return value if math.isnan(row.low) else f"{value} [{low}, {high}]"


def heading(measure: str) -> str:
    """Return the heading of a measure's column."""
    return measure.replace("_in_layers", " in layers").capitalize()
