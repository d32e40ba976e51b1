"""A compare run as sections: who is best, by how much and how surely, what is kept where, what the cut saves."""

import math
import re
from pathlib import Path
from typing import NamedTuple

from saap_jax.report.figures.ratio import curves, frontier, legend
from saap_jax.report.kinds import tables
from saap_jax.report.kinds.against import Against, against_best, forest, format_difference, format_interval, format_p
from saap_jax.report.kinds.common import cost_section, reproduce_section, suggestions_section
from saap_jax.report.kinds.distributions import score_chart
from saap_jax.report.kinds.fusion import csv_fusions, fusion_cells, fusion_figure
from saap_jax.report.kinds.kept_map import kept_map
from saap_jax.report.kinds.summary import DOMAINS, cut_notes, summary
from saap_jax.report.page.blocks import (
    Block,
    Bullets,
    Cell,
    Detail,
    Download,
    Line,
    Part,
    Picture,
    Pictures,
    Section,
    Table,
    Words,
    plain_table,
    plural,
)
from saap_jax.report.records import read_candidates
from saap_jax.report.rows import DENSE, Record, Row, comparison_rows, leading, merged, metrics, untested
from saap_jax.report.score_arrays import read_scores
from saap_jax.types import STRUCTURES, Scores


class Compared(NamedTuple):
    """A compare run, read and worked out once."""

    path: Path
    run: Record
    candidates: list[Record]
    corrupt: int
    """Lines of `metrics.jsonl` that could not be read."""
    variants: list[Record]
    rows: list[Row]
    against: list[Against]


def read_compared(path: Path, run: Record) -> Compared:
    """Read the candidates of a compare run, and work out what they say."""
    candidates, corrupt = read_candidates(path)
    variants, rows = merged(candidates), comparison_rows(run, candidates)
    return Compared(path, run, candidates, corrupt, variants, rows, against_best(run, variants, rows))


def compare_sections(found: Compared, detail: Detail) -> list[Section]:
    """Return the sections of a compare run, finished or not."""
    run = found.run
    sections = [
        Section("summary", "Summary", [Bullets(summary(run, found.rows, found.against))]),
        *suggestions_section(run),
        *comparison_section(found, detail),
        *frontier_section(found, detail),
        *interval_section(found, detail),
        *kept_section(found, detail),
        *score_section(found, detail),
        *fusion_section(run, detail),
        *cut_section(run),
        *cost_section(run),
        reproduce_section(run),
    ]
    return sections


def comparison_section(found: Compared, detail: Detail) -> list[Section]:
    """Return the table of all variants."""
    if not found.rows:
        return []
    parts = [tables.headline(found.run), *re.split(r" {3,}|\n", tables.legend(found.run, found.rows))]
    blocks: list[Block] = [Words(f"{'; '.join(part.strip() for part in parts if part)}.")]
    if found.against:
        blocks.append(
            Words(
                "Δ: how far the perplexity is above that of the best of its ratio (×: how many times as high)"
                f"{', without an interval' if untested(found.rows) else ', and its 95 % interval'}. "
                f"{DOMAINS[found.against[-1].domain].capitalize()}, wins: share of the windows on which it has the "
                "lower loss; p: of no difference, adjusted for the number of variants (paired bootstrap, Holm)."
            )
        )
    blocks.append(comparison_table(found))
    if detail.downloads:
        text = tables.csv_table(found.run, found.candidates)
        blocks.append(Download("CSV of all candidates, full precision", "comparison.csv", text))
    return [Section("comparison", "Comparison", blocks)]


def comparison_table(found: Compared) -> Table:
    """Return every variant beside the dense model and beside the best of its ratio."""
    header, cells = tables.comparison_cells(found.run, found.rows)
    domains = [domain for domain in ("in", "out") if any(one.domain == domain for one in found.against)]
    primary = domains[-1] if domains else None
    by_row = {(one.candidate, one.domain): one for one in reversed(found.against)}  # the first text of a domain counts
    for domain in domains:
        header = [*header, f"Δ {domain} %"]
    header += ["wins %", "p"] if primary else []
    lines = []
    for row, texts in zip(found.rows, cells, strict=True):
        ppl = [row.ppl_in if name == "ppl in" else row.ppl_out for name in header if name.startswith("ppl ")]
        values = [None, 100 * row.asked, row.actual, None, *ppl]  # None: the text says it
        line = [Cell(text, value) for text, value in zip(texts, values, strict=True)]
        mine = {domain: by_row.get((row.candidate, domain)) for domain in domains}
        for one in mine.values():
            line.append(_difference_cell(one))
        if primary:
            line += _win_cells(mine[primary])
        mark = "best" if row.best else "dense" if row.candidate == DENSE else ""
        lines.append(Line(line, mark))
    return Table("Comparison", header, lines, sortable=True)


def _difference_cell(one: Against | None) -> Cell:
    if one is None:
        return Cell("-", math.nan)
    interval = format_interval(one.difference)
    return Cell(format_difference(one.difference) + (f" {interval}" if interval else ""), one.difference.value)


def _win_cells(one: Against | None) -> list[Cell]:
    if one is None:
        return [Cell("-", math.nan)] * 2
    return [Cell(f"{100 * one.difference.win_rate:.0f}"), Cell(format_p(one.p_value), one.p_value)]


def frontier_section(found: Compared, detail: Detail) -> list[Section]:
    """Return perplexity against ratio, a drawing a text, numbered alike."""
    order = leading(found.rows, detail.limit)
    pictures = []
    for metric in metrics(found.run):
        lines, missing = curves(found.run, found.variants, metric["name"])
        title = f"{metric['name']} ({DOMAINS[metric['domain']]})"
        if drawn := frontier(lines, order, f"Perplexity against ratio: {metric['name']}", missing):
            pictures.append(Picture(title, drawn))
    if not pictures:
        return []
    said = "Logarithmic axis; lower is better. A number with an arrow lies beyond the scale, on its upper edge."
    labels = {row.label for row in found.rows if row.candidate != DENSE}
    blocks = [Words(said + _left_out(len(labels) - len(order))), Pictures(pictures, legend(order))]
    return [Section("frontier", "Perplexity against ratio", blocks)]


def interval_section(found: Compared, detail: Detail) -> list[Section]:
    """Return how sure the differences from the best are, a chart a ratio."""
    if not found.against:
        if found.candidates and not any("losses" in candidate for candidate in found.candidates):
            said = "No intervals: this run did not record the losses of its windows; a run of this version does."
            return [Section("intervals", "How sure is that", [Words(said)])]
        return []
    if why := untested(found.rows):
        how = f"without intervals: {why}. Points are hollow, since nothing is tested"
    else:
        over = "windows and seeds" if max(row.seeds for row in found.rows) > 1 else "windows"
        how = (
            f"with 95 % intervals of a paired bootstrap over {over}. A hollow point cannot be told apart from the best"
        )
    blocks: list[Block] = [
        Words(f"Perplexity relative to the best of the ratio (*), in percent, {how}; an arrow lies beyond the scale.")
    ]
    for asked in dict.fromkeys(one.asked for one in found.against):
        group = [one for one in found.against if one.asked == asked]
        drawn = forest(group, group[0].best, detail.limit)
        title = f"{100 * asked:g} % asked"
        more = _left_out(len({one.label for one in group}) - detail.limit)
        blocks.append(Part(title, [Picture(f"Differences from the best, {title}", drawn), *_words(more)]))
    return [Section("intervals", "How sure is that", blocks)]


def kept_section(found: Compared, detail: Detail) -> list[Section]:
    """Return what the variants of each ratio keep, layer by layer."""
    named = {variant["candidate"]: variant for variant in found.variants}
    blocks: list[Block] = []
    for asked in dict.fromkeys(row.asked for row in found.rows if row.candidate in named):
        chosen = [named[row.candidate] for row in found.rows if row.candidate in named and row.asked == asked]
        title = f"{100 * asked:g} % asked"
        if drawn := kept_map(found.run, chosen[: detail.limit]):
            more = _left_out(len(chosen) - detail.limit)
            blocks.append(Part(title, [Picture(f"Kept by layer, {title}", drawn), *_words(more)]))
    if not blocks:
        return []
    said = "Share of the units of each layer that stays, best variant first: dark is 0, bright is all of them."
    return [Section("kept", "What is kept where", [Words(said), Picture("Scale", SCALE), *blocks])]


SCALE = (
    '<div class="scale" role="img" aria-label="Scale: dark 0 %, bright 100 %"><span>0 %</span>'
    '<svg viewBox="0 -.5 21 1" preserveAspectRatio="none" class="heat" aria-hidden="true">'
    + "".join(f'<path class="h{level}" d="M{level} 0h1"/>' for level in range(21))
    + "</svg><span>100 %</span></div>"
)
"""The scale of all cells of heat."""


def score_section(found: Compared, detail: Detail) -> list[Section]:
    """Return the distributions of the scores that the run keeps, of the first scenario."""
    scores = read_scores(found.path)
    (scenario, by_estimator), *others = scores.items() or [("", {})]
    said, parts = score_parts(by_estimator, detail)
    if not parts:
        return []
    said += f" Scenario {scenario}; {plural(len(others), 'other')} in scores.npz." if others else ""
    return [Section("scores", "How scores are distributed", [Words(said), *parts])]


def score_parts(by_estimator: dict[str, Scores], detail: Detail, scenario: str = "") -> tuple[str, list[Block]]:
    """Return how charts of scores are read, and a chart a structure."""
    parts: list[Block] = []
    for structure in STRUCTURES:
        if drawn := score_chart(by_estimator, structure, detail.limit):
            title = f"{scenario}: {structure}" if scenario else structure
            parts.append(Part(title, [Picture(f"Scores of {structure} units", drawn)]))
    said = (
        "Left: how widely an estimator's scores are spread, as multiples of its middle score (logarithmic; thick: the "
        "middle half of the units, thin: 90 % of them). Right: mean percentile rank of each layer's units, bright is "
        "important."
    )
    more = len(by_estimator) - detail.limit
    return said + (f" {plural(more, 'more estimator')} in scores.npz." if more > 0 else ""), parts


def fusion_section(run: Record, detail: Detail) -> list[Section]:
    """Return how a run's fused scores came about: formula, figure, table and CSV; nothing where none was fused."""
    fusions = run.get("fusions") or {}
    header, lines = fusion_cells(fusions)
    if not lines:
        return []
    constant = ((run.get("config") or {}).get("fusion") or {}).get("scope_constant")
    blocks: list[Block] = [
        Words(
            f"A unit's fused score is {'Σ I / (2 σ²)' + (' + Σ log σ' if constant else '')} over the estimators that "
            "are its members, with the σ of the unit's scope. The scores of a member have a unit of their own, and so "
            "have its σ and weight: compare them between scopes and scenarios, not between members."
        )
    ]
    if detail.drawn:
        blocks.append(Picture("Figure of σ and weights", fusion_figure(fusions), wide=True))
    blocks.append(plain_table("σ and weights", header, lines, words=4))
    if detail.downloads:
        blocks.append(Download("CSV of σ and weights, full precision", "fusions.csv", csv_fusions(fusions)))
    return [Section("fusion", "How fused scores came about", blocks)]


def cut_section(run: Record) -> list[Section]:
    """Return the cut model beside the dense one; nothing where none was cut."""
    rows = tables.cut_rows(run)
    if not rows:
        return []
    name = str((run.get("best") or {}).get("candidate", ""))
    blocks: list[Block] = [Words(name)] if name else []
    blocks.append(plain_table("The cut model", ["", "dense", "cut", "change"], rows))
    return [Section("cut", "The cut model", [*blocks, *map(Words, cut_notes(run))])]


def _left_out(number: int) -> str:
    """Say how many variants a figure leaves out; nothing where it shows all."""
    return f" {plural(number, 'more variant')} in the table above." if number > 0 else ""


def _words(said: str) -> list[Block]:
    return [Words(said.strip())] if said else []
