"""A compare run as sections: who is best, by how much and how surely, what is kept where, what the cut saves."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from saap_jax.report.figures.palette import is_baseline
from saap_jax.report.figures.ratio import beyond, curves, ratio_panels, ratio_plot
from saap_jax.report.kinds.against import Against, against_best, forest
from saap_jax.report.kinds.common import cost_section, coupling_section, reproduce_section, suggestions_section
from saap_jax.report.kinds.distributions import score_parts
from saap_jax.report.kinds.divergence import divergence_section
from saap_jax.report.kinds.fusion import fusion_section
from saap_jax.report.kinds.variants import (
    DOMAINS,
    candidate_data,
    cut_rows,
    cut_table,
    figure_of,
    headline,
    structure_sentences,
    summary,
    variant_table,
)
from saap_jax.report.kinds.winner import compared_facts, interval_ends, winner_table
from saap_jax.report.kinds.written import written_section
from saap_jax.report.page.blocks import (
    Block,
    Bullets,
    Chart,
    Column,
    Detail,
    Facts,
    Folded,
    Heat,
    Number,
    Part,
    Picture,
    Pictures,
    Scale,
    Section,
    Strip,
    Words,
)
from saap_jax.report.page.strips import layer_axis
from saap_jax.runs.directory import read_candidates
from saap_jax.runs.records import Row, RunRecord
from saap_jax.runs.score_arrays import read_scores, structures_of
from saap_jax.runs.standing import (
    DENSE,
    ComparisonRow,
    Variant,
    comparison_rows,
    cut_of,
    kept_by_layer,
    labels,
    leading,
    merged,
    metrics,
    untested,
)
from saap_jax.runtime.words import plural

KEPT = "Share of the units of each layer that stays: dark is 0, bright is all of them."


class Compared(NamedTuple):
    """A compare run, read and worked out once."""

    path: Path
    run: RunRecord
    candidates: list[Row]
    corrupt: int
    """Lines of `metrics.jsonl` that could not be read."""
    variants: list[Variant]
    rows: list[ComparisonRow]
    against: list[Against]


def read_compared(path: Path, run: RunRecord) -> Compared:
    """Read the candidates of a compare run, and work out what they say."""
    candidates, corrupt = read_candidates(path)
    variants, rows = merged(candidates), comparison_rows(run, candidates)
    return Compared(path, run, candidates, corrupt, variants, rows, against_best(run, variants, rows))


def compare_sections(found: Compared, detail: Detail) -> list[Section]:
    """Return the sections of a compare run, finished or not."""
    run = found.run
    sections = [
        summary_section(found, detail),
        *frontier_section(found, detail),
        *suggestions_section(run),
        *comparison_section(found, detail),
        *interval_section(found, detail),
        *kept_section(found, detail),
        *score_section(found, detail),
        *fusion_section(run, detail),
        *divergence_section(run, detail),
        *cut_section(run),
        *written_section(run),
        *cost_section(run),
        reproduce_section(run),
        *coupling_section(run, detail),
    ]
    return sections


def summary_section(found: Compared, detail: Detail) -> Section:
    """Return what was compared, the best of each ratio, and the same in words, which are all where pages are small."""
    said = summary(found.run, found.rows, found.against)
    table = winner_table(found.run, found.variants, found.rows, found.against)
    if not table.lines or not detail.drawn:
        return Section("summary", "Summary", [Bullets(said)])
    structures = structure_sentences(found.run)
    facts = Facts(compared_facts(found.run, found.rows))
    blocks = [facts, *([Bullets(structures)] if structures else []), table]
    return Section("summary", "Summary", [*blocks, Folded("In words", [Bullets(said[len(structures) :])])])


def comparison_section(found: Compared, detail: Detail) -> list[Section]:
    """Return the table of all variants."""
    if not found.rows:
        return []
    blocks: list[Block] = [Words(f"{headline(found.run)}.")]
    noun = figure_of(found.run).noun
    if found.against:
        how = (
            "of as good as the best, by a race: valid at any time, for all variants; intervals are not corrected for it"
            if found.run.get("race")
            else "of no difference, adjusted for the number of variants (paired bootstrap, Holm)"
        )
        blocks.append(
            Words(
                f"Δ: how far the {noun} is above that of the best of its ratio (×: how many times as high)"
                f"{', without an interval' if untested(found.rows) else ', and its 95 % interval'}. "
                f"{DOMAINS[found.against[-1].domain].capitalize()}, wins: share of the windows on which it has the "
                f"lower loss; p: {how}."
            )
        )
    blocks.append(variant_table(found.run, found.rows, found.against))
    if detail.downloads:
        blocks.append(candidate_data(found.run, found.candidates))
    return [Section("comparison", "Comparison", blocks)]


def frontier_section(found: Compared, detail: Detail) -> list[Section]:
    """Return perplexity against ratio, a figure a text, numbered alike."""
    order = leading(found.rows, detail.limit)
    pictures, panels, far, scale = [], [], [], figure_of(found.run)
    for metric in metrics(found.run):
        lines, missing = curves(found.run, found.variants, metric["name"])
        if detail.drawn:
            ends = interval_ends(found.run, found.variants, metric["name"], order)
            lines = [line._replace(ends=ends.get(line.name, ())) for line in lines]
        name, domain = metric["name"], DOMAINS[metric["domain"]]
        if plot := ratio_plot(f"{scale.noun.capitalize()} against ratio: {name}", lines, order, missing, scale):
            pictures.append(Picture(f"{name} ({domain})", plot))
            panels.append((f"{domain}\n{name}", lines))
            far += [f"{domain}, {line}" for line in beyond(lines, order, scale)]
    if not pictures:
        return []
    said = "Logarithmic axis; lower is better."
    if any(line.ends for _, lines in panels for line in lines):
        said += " Upright lines: 95 % intervals of the paired difference from the dense model."
    if any(is_baseline(name) for name in order):
        said += " Baselines are grey."
    names = {row.label for row in found.rows if row.candidate != DENSE}
    together = Pictures(pictures, order, ratio_panels("frontier", panels, order, scale))
    blocks: list[Block] = [Words(said + _left_out(len(names) - len(order))), together]
    blocks += [Words(f"With an arrow, beyond the scale: {'; '.join(far)}.")] if far else []
    return [Section("frontier", f"{scale.noun.capitalize()} against ratio", blocks)]


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
        Words(
            f"{figure_of(found.run).noun.capitalize()} relative to the best of the ratio (*), in percent, {how}; an "
            "arrow lies beyond the scale."
        )
    ]
    for asked in dict.fromkeys(one.asked for one in found.against):
        group = [one for one in found.against if one.asked == asked]
        more = _left_out(len({one.label for one in group}) - detail.limit)
        blocks.append(Part(f"{100 * asked:g} % asked", [forest(group, detail.limit), *_words(more)]))
    return [Section("intervals", "How sure is that", blocks)]


def kept_section(found: Compared, detail: Detail) -> list[Section]:
    """Return what the variants of each ratio keep, layer by layer."""
    named = {variant["candidate"]: variant for variant in found.variants}
    blocks: list[Block] = []
    for asked in dict.fromkeys(row.asked for row in found.rows if row.candidate in named):
        chosen = [named[row.candidate] for row in found.rows if row.candidate in named and row.asked == asked]
        if chart := kept_map(found.run, chosen[: detail.limit]):
            more = _left_out(len(chosen) - detail.limit)
            blocks.append(Part(f"{100 * asked:g} % asked", [chart, *_words(more)]))
    if not blocks:
        return []
    return [Section("kept", "What is kept where", [Words(f"{KEPT} Best variant first."), Scale(), *blocks])]


def kept_shares(run: RunRecord, kept: Mapping[str, Sequence[Number]]) -> dict[str, list[float]]:
    """Return the share of units that each layer keeps, by structure; NaN where the layer has none."""
    units = run.get("model", {}).get("units", {})
    return {
        name: [count / total if total else math.nan for count in kept.get(name, ())] for name, total in units.items()
    }


def kept_map(run: RunRecord, candidates: Sequence[Row]) -> Chart | None:
    """Return the share of units that each candidate of a ratio keeps in each layer; None where none recorded it.

    Candidates that keep equally many everywhere are one line, with all their names.
    """
    alike: dict[str, tuple[list[str], Row]] = {}
    for name, candidate in zip(labels(candidates), candidates, strict=True):
        if kept := kept_by_layer(candidate):
            alike.setdefault(json.dumps(kept, sort_keys=True), ([], candidate))[0].append(name)
    rows = [(", ".join(names), candidate) for names, candidate in alike.values()]
    shares = [(name, kept_by_layer(c), kept_shares(run, kept_by_layer(c))) for name, c in rows]
    structures = run.get("model", {}).get("units", {})
    layers = {s: max((len(each[s]) for *_, each in shares), default=0) for s in structures}
    structures = {name: units for name, units in structures.items() if layers[name]}
    if not structures:
        return None
    if "structures" in run:
        return _kept_of_structures(run, rows)
    columns = [Column(f"{name} kept, by layer", layer_axis(layers[name]), lines=False) for name in structures]
    strips = [
        Strip(name, [Heat(each[s], _said(name, s, kept.get(s, ()), units)) for s, units in structures.items()])
        for name, kept, each in shares
    ]
    asked = f"{100 * rows[0][1]['ratio_asked']:g}"
    title = f"Kept by layer, {asked} % asked"
    return Chart(f"kept-{asked}", title, "variant", columns, strips, scale="units kept, %")


def _kept_of_structures(run: RunRecord, rows: Sequence[tuple[str, Row]]) -> Chart:
    """Return the share of units that each candidate keeps of each structure of a traced model, all copies alike."""
    units = run["model"]["units"]
    strips = []
    for name, candidate in rows:
        kept = kept_by_layer(candidate)
        counts = {structure: kept[structure][0] for structure in units if kept.get(structure)}
        said = ", ".join(f"{structure} {count:.6g} of {units[structure]}" for structure, count in counts.items())
        shares = [count / units[structure] for structure, count in counts.items()]
        strips.append(Strip(name, [Heat(shares, f"{name} keeps {said}")]))
    asked = f"{100 * rows[0][1]['ratio_asked']:g}"
    columns = [Column(f"units kept, by structure ({', '.join(units)})", layer_axis(len(units)), lines=False)]
    title = f"Kept by structure, {asked} % asked"
    return Chart(f"kept-{asked}", title, "variant", columns, strips, scale="units kept, %")


def _said(name: str, structure: str, counts: Sequence[Number], units: int) -> str:
    return f"{name}, {structure}: of {units} each layer keeps {' '.join(f'{count:.6g}' for count in counts)}"


def score_section(found: Compared, detail: Detail) -> list[Section]:
    """Return the distributions of the scores that the run keeps, of the first scenario."""
    scores = read_scores(found.path, structures_of(found.run))
    (scenario, by_estimator), *others = scores.items() or [("", {})]
    said, parts = score_parts(by_estimator, detail)
    if not parts:
        return []
    said += f" Scenario {scenario}; {plural(len(others), 'other')} in scores.npz." if others else ""
    return [Section("scores", "How scores are distributed", [Words(said), *parts])]


def cut_section(run: RunRecord) -> list[Section]:
    """Return the cut model beside the dense one; nothing where none was cut."""
    if not cut_rows(run):
        return []
    name = cut_of(run).get("candidate", "")
    return [Section("cut", "The cut model", [*_words(name), cut_table(run)])]


def _left_out(number: int) -> str:
    """Say how many variants a figure leaves out; nothing where it shows all."""
    return f" {plural(number, 'more variant')} in the table of all." if number > 0 else ""


def _words(said: str) -> list[Block]:
    return [Words(said.strip())] if said else []
