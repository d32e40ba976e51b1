"""How fusions came about: σ of every estimator, its way there, and the weights that follow."""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

from saap_jax.report.figures.fusion import fusion_plot
from saap_jax.report.page.blocks import Block, Data, Detail, Picture, Section, Table, Words, text_table
from saap_jax.runs.records import Fused, RunRecord
from saap_jax.steps.score.fusion import scope_parts

Fusions = dict[str, dict[str, Fused]]
"""`{scenario: {fused estimator: record}}`."""


class FusionRow(NamedTuple):
    """σ and weight of one estimator in one scope of a fusion."""

    scenario: str
    fused: str
    member: str
    scope: str
    sigma: float
    weight: float


def fusion_section(run: RunRecord, detail: Detail) -> list[Section]:
    """Return how a run's fused scores came about: formula, figure, table and CSV; nothing where none was fused."""
    fusions = run.get("fusions", {})
    table = fusion_table(fusions)
    if not table.lines:
        return []
    constant = run.get("config", {}).get("fusion", {}).get("scope_constant")
    blocks: list[Block] = [
        Words(
            f"A unit's fused score is {'Σ I / (2 σ²)' + (' + Σ log σ' if constant else '')} over the estimators that "
            "are its members, with the σ of the unit's scope. The scores of a member have a unit of their own, and so "
            "have its σ and weight: compare them between scopes and scenarios, not between members."
        )
    ]
    if detail.drawn:
        said = ["{}, {}: {} {} σ {}, weight {}.".format(*(cell.text for cell in line.cells)) for line in table.lines]
        blocks.append(Picture("Figure of σ and weights", fusion_plot(fusions, " ".join(said))))
    blocks.append(table)
    if detail.downloads:
        blocks.append(fusion_data(fusions))
    return [Section("fusion", "How fused scores came about", blocks)]


def fusion_rows(fusions: Fusions) -> list[FusionRow]:
    """Return σ and weight, 1 / (2 σ²), of every member and scope, in the order of the records."""
    return [
        FusionRow(scenario, name, member, scope, float(sigma), float(fused["weights"][member][scope]))
        for scenario, by_name in fusions.items()
        for name, fused in by_name.items()
        for member, sigmas in fused["sigmas"].items()
        for scope, sigma in sigmas.items()
    ]


def fusion_table(fusions: Fusions) -> Table:
    """Return the table of fusions; all layers of a structure are one line, as a range."""

    def group(row: FusionRow) -> tuple[str, ...]:
        return (*row[:3], scope_parts(row.scope)[0])

    lines = []
    for key, found in itertools.groupby(fusion_rows(fusions), group):
        rows = list(found)
        structure, layer = scope_parts(rows[0].scope)
        scope = f"{structure}, {len(rows)} layer{'s' if len(rows) != 1 else ''}" if layer is not None else structure
        lines.append([*key[:3], scope, _range(row.sigma for row in rows), _range(row.weight for row in rows)])
    header = ["scenario", "fused", "member", "scope", "σ", "weight"]
    return text_table("σ and weights of fused scores", header, lines, words=4)


def fusion_data(fusions: Fusions) -> Data:
    """Return σ and weights, one member and scope a line, in full precision."""
    return Data("CSV of σ and weights, full precision", "fusions.csv", FusionRow._fields, fusion_rows(fusions))


def _range(values: Iterable[float]) -> str:
    found = list(values)
    low, high = min(found), max(found)
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
