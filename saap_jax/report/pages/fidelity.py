"""What `saap fidelity` finds: how well each estimator ranks units by the exact effect of removing them."""

import functools
import math
from collections.abc import Mapping, Sequence

from saap_jax.evaluation.rank_correlation import MEASURES, Fidelity
from saap_jax.evaluation.resample import LEVEL, too_few
from saap_jax.report.blocks import Block, Column, Findings, Table, folded
from saap_jax.report.figures import rank_figure
from saap_jax.report.formats import BEST, TIED_LEGEND, format_hundredths, marked, with_interval
from saap_jax.runs.directory import RunDirectory
from saap_jax.runs.scores import read_changes
from saap_jax.runtime.files import read_json
from saap_jax.runtime.words import plural, some
from saap_jax.types import Scores

ABOUT = (
    "Rank correlation between scores and the exact change of the loss when a unit goes, with 95 % intervals of a "
    "bootstrap over units."
)


def fidelity_findings(directory: RunDirectory) -> Findings:
    """Show who ranks units best, of a run finished or not."""
    rows = correlations(directory)
    blocks = []
    if rows:
        blocks = fidelity_blocks(rows, *read_changes(directory))
    return Findings(fidelity_summary(rows), "Do scores predict the effect?", blocks, ABOUT)


def correlations(directory: RunDirectory) -> list[Fidelity]:
    """Read the rank correlations of a run; none where it has not come that far."""
    file = directory.path / "fidelity.json"
    if file.exists():
        return [Fidelity(**row) for row in read_json(file)]
    return []


def fidelity_blocks(rows: Sequence[Fidelity], scores: Mapping[str, Scores], exact: Scores) -> list[Block | None]:
    """Show a table a scope, the figure of the scores, and all correlations as rows behind a fold."""

    def shown(value: str | int | float) -> str:
        if isinstance(value, float):
            return format_hundredths(value)
        return str(value)

    panels = {
        name: [(each, with_interval(*by["spearman"][4:7], format_hundredths)) for each, by in ranking(rows, name)]
        for name in exact
    }
    figure = None
    if scores:
        figure = rank_figure(scores, exact, panels)
    columns = [Column(field.replace("_", " "), (field,), shown, field in Fidelity._fields[:3])
               for field in Fidelity._fields]  # fmt: skip
    every = Table("All correlations", columns, [row._asdict() for row in rows], file="fidelity")
    return [
        *(fidelity_table(rows, scope) for scope in dict.fromkeys(row.scope for row in rows)),
        figure,
        folded(every),
    ]


def fidelity_summary(rows: Sequence[Fidelity]) -> list[str]:
    """Say which estimator ranks the units of each structure best, or which cannot be told apart."""
    sentences = []
    for scope in dict.fromkeys(row.scope for row in rows):
        found = [(name, by["spearman"]) for name, by in ranking(rows, scope) if math.isfinite(by["spearman"].value)]
        if not found:
            continue
        (name, best), *others = found
        if scope == "pooled":
            where = "all units together"
        else:
            where = f"{scope} units"
        value = f"Spearman {with_interval(best.value, best.low, best.high, format_hundredths)}"
        lead = f"On {where} ({best.units:,} measured), {name}"
        if others and all(row.p_value < LEVEL for _, row in others):
            lead += f" agrees best with the exact change of the loss: {value}"
        else:
            tied = [other for other, row in others if row.tied]
            lead += f" has the highest correlation with the exact change of the loss, {value}"
            if tied:
                lead += f"; {plural(len(tied), 'other')} cannot be told apart from it: {some(tied)}"
        why = _untested([row for _, row in found])
        sentences.append(f"{lead}.{f' Nothing is tested: {why}.' if why else ''}")
    return sentences or ["Nothing is measured yet."]


def ranking(rows: Sequence[Fidelity], scope: str) -> list[tuple[str, dict[str, Fidelity]]]:
    """Order the estimators of a scope by Spearman's correlation, best first, without one last; with all measures."""
    found: dict[str, dict[str, Fidelity]] = {}
    for row in rows:
        if row.scope == scope:
            found.setdefault(row.estimator, {})[row.measure] = row
    quality = {name: by["spearman"].value for name, by in found.items()}
    return sorted(found.items(), key=lambda each: -quality[each[0]] if math.isfinite(quality[each[0]]) else math.inf)


def fidelity_table(rows: Sequence[Fidelity], scope: str) -> Table:
    """Rank the estimators of one scope (`attention`, `mlp`, `pooled`); units of all layers are no layers' ranks."""
    ranked = ranking(rows, scope)
    measures = [measure for measure in MEASURES if scope != "pooled" or "layers" not in measure]
    correlation = functools.partial(with_interval, form=format_hundredths)
    columns = [Column("estimator", ("estimator", "best", "tied"), marked, words=True)]
    for each in measures:
        head = each.replace("_in_layers", " in layers").capitalize()
        fields = (each, f"{each}_low", f"{each}_high")
        columns.append(Column(head, fields, correlation))
    lines = []
    for place, (name, found) in enumerate(ranked):
        first = found["spearman"]
        best = place == 0 and math.isfinite(found["spearman"].value)
        line = {"estimator": name, "best": best, "tied": first.tied and not best, "mark": "best" * best}
        for each in measures:
            line |= {each: found[each].value, f"{each}_low": found[each].low, f"{each}_high": found[each].high}
        lines.append(line)
    firsts = [found["spearman"] for _, found in ranked]
    units = firsts[0].units if firsts else 0
    note = f"{BEST} highest Spearman"
    if any(row.tied for row in firsts):
        note += f"   {TIED_LEGEND}"
    elif why := _untested(firsts):
        note += f"; without intervals and tests: {why}"
    title = f"{scope}, {plural(units, 'unit')}: rank correlation with the exact change of the loss"
    apart = "of scores on one scale, as changes of the loss are; others, as wanda's, are not comparable over structures"
    return Table(title, columns, lines, [note, *([apart] if scope == "pooled" else [])])


def _untested(rows: Sequence[Fidelity]) -> str:
    """Say why correlations of a scope have no intervals: few units or windows; empty where they suffice."""
    units, windows = (max((getattr(row, name) for row in rows), default=0) for name in ("units", "windows"))
    return too_few(units, "unit") or (too_few(windows) if windows else "")
