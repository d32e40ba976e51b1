"""What `saap sensitivity` finds: the places that cost most and least, heat maps, and what it suggests."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from saap_jax.evaluation.resample import FEWEST, LEVEL
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
from saap_jax.report.figures.sensitivity import sensitivity_plot
from saap_jax.report.kinds.common import cost_section, files_of, reproduce_section, suggestion_blocks
from saap_jax.report.page.blocks import (
    Block,
    Bullets,
    Cell,
    Data,
    Detail,
    Folded,
    Line,
    Part,
    Picture,
    Plot,
    Section,
    Table,
    text_table,
)
from saap_jax.report.page.csv_text import without_nan
from saap_jax.report.page.formats import BEST, TIED
from saap_jax.runs.reading import read_rows
from saap_jax.runs.records import Row, RunRecord
from saap_jax.runs.standing import DENSE
from saap_jax.runs.trials import aligned_sentence
from saap_jax.runtime.words import MINUS, plural, signed

EXTREMES = 5
"""Places shown on either side."""


def sensitivity_sections(path: Path, run: RunRecord, detail: Detail) -> list[Section]:
    """Return the sections of a run, finished or not."""
    candidates = read_rows(path, run, "sensitivity")
    known = "losses" in run.get(DENSE, {}) and any("layer" in row for row in candidates)
    blocks = sensitivity_blocks(run, candidates, detail) if known else []
    nothing = [] if blocks else [Section("summary", "Summary", [Bullets(["Nothing is measured yet."])])]
    return [
        *nothing,
        *([Section("suggestions", "What to try next", suggestion_blocks(run))] if "suggestions" in run else []),
        *([Section("sensitivity", "What each layer costs", blocks)] if blocks else []),
        *cost_section(run),
        reproduce_section(run),
    ]


def sensitivity_files(run: RunRecord, candidates: Sequence[Row]) -> dict[str, str]:
    """Return the files of a run: heat maps, tables with suggestions, and all changes."""
    suggestions = Part("Suggestions", suggestion_blocks(run))
    return files_of("sensitivity", [suggestions, *sensitivity_blocks(run, candidates, Detail())])


def sensitivity_blocks(run: RunRecord, candidates: Sequence[Row], detail: Detail) -> list[Block]:
    """Return the heat maps, the extremes, the whole tables behind one fold and the CSV of all changes."""
    changes = changes_of(run, candidates)
    blocks: list[Block] = []
    if detail.drawn:
        plot = heat_maps(run, candidates)
        blocks.append(Picture(plot.title, plot))
    table = extreme_table(run, candidates)
    blocks.append(Part("What costs most and least", [table]))
    noun, tables = scale_of(judged_metric(run)).noun, []
    for structure in structures_in(candidates):
        own = {(change.layer, change.asked): change for change in changes if change.structure == structure}
        if own:
            tables.append(Part(f"{structure}: change of {noun}, %", [_whole_table(structure, own, noun)]))
    blocks += [Folded("All changes", tables)] if tables else []
    if detail.downloads:
        blocks.append(sensitivity_data(run, candidates))
    return blocks


def _whole_table(structure: str, own: Mapping[tuple[int, float], Change], noun: str) -> Table:
    """Return all changes of a structure, a line a layer and a column a share."""
    layers, shares = sorted({layer for layer, _ in own}), sorted({share for _, share in own})
    lines = [
        [str(layer), *(format_change(own[layer, share].percent) if (layer, share) in own else "-" for share in shares)]
        for layer in layers
    ]
    header = ["layer", *(f"{100 * share:g} %" for share in shares)]
    return text_table(f"{structure}: change of {noun}, %", header, lines, words=0)


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


def sensitivity_cells(changes: Sequence[Change], marks: Mapping[Change, str]) -> list[list[str]]:
    """Return the formatted cells of some places, in the order of `HEADER`."""
    return [
        [
            str(change.layer),
            f"{change.structure} {marks.get(change, '')}".rstrip(),
            f"{100 * change.actual:.1f}",
            f"{change.removed:,}",
            signed(change.nats, 4),
            format_change(change.percent),
            format_ends(change),
            format_relative(change.relative),
        ]
        for change in changes
    ]


HEADER = ("layer", "structure", "removed %", "parameters", "nats", "ppl %", "95 % interval", "× average")


def format_change(percent: float) -> str:
    """Return a change of perplexity in percent, with its sign.

    >>> [format_change(value) for value in (0.123, -3.21, 12345.6)]
    ['+0.12', '−3.21', '+1.2e+04']
    """
    return (f"{percent:+.2f}" if abs(percent) < 1000 else f"{percent:+.1e}").replace("-", MINUS)


def format_relative(times: float) -> str:
    """Return a cost as a multiple of the average one.

    >>> format_relative(4.1), format_relative(-2.1), format_relative(math.nan)
    ('4.10', '−2.10', 'n/a')
    """
    return "n/a" if math.isnan(times) else f"{times:.2f}".replace("-", MINUS)


def format_ends(change: Change) -> str:
    """Return the interval of a change of perplexity."""
    if math.isnan(change.low) or math.isnan(change.high):
        return "n/a"
    return f"{format_change(change.low)} to {format_change(change.high)}"


def notes(run: RunRecord, candidates: Sequence[Row]) -> list[str]:
    """Say what the numbers mean, what a structure costs on the whole, and what aligned widths were measured to do."""
    changes, metric = changes_of(run, candidates), judged_metric(run)
    asked, _, _ = extremes(changes, run["config"]["ratio"])
    said = [
        f"{metric}, {format_figure(run[DENSE]['ppl'][metric], scale_of(metric))} unpruned; units of the lowest scores "
        f"by {run['config']['estimator']} go, of one layer alone",
        f"× average: loss a removed parameter, beside that of {_compared_with(candidates)} together",
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


def _compared_with(candidates: Sequence[Row]) -> str:
    return "all structures" if any("among" in row for row in candidates) else "all layers of the structure"


def extreme_table(run: RunRecord, candidates: Sequence[Row]) -> Table:
    """Return the places that cost most and least."""
    asked, most, least = extremes(changes_of(run, candidates), run["config"]["ratio"])
    marks = marks_of(run, candidates)
    cells = sensitivity_cells([*most, *least], marks)
    lines = [Line([Cell(text) for text in line], last=place == len(most)) for place, line in enumerate(cells, start=1)]
    title = f"{100 * asked:g} % of the units of one place: what costs most, and what least"
    header = [name.replace("ppl", scale_of(judged_metric(run)).short) for name in HEADER]
    return Table(title, header, lines, words=2, notes=notes(run, candidates))


def sensitivity_data(run: RunRecord, candidates: Sequence[Row]) -> Data:
    """Return all changes in full precision, with the perplexity on every text; NaN is an empty cell."""
    names = [metric["name"] for metric in run["metrics"]]
    rows = {(row["structure"], row["layer"], row["asked"]): row for row in candidates if "layer" in row}
    lines = []
    for change in changes_of(run, candidates):
        ppl = rows[change.structure, change.layer, change.asked]["ppl"]
        lines.append(without_nan((*change, *map(ppl.get, names))))
    return Data("CSV of all changes, full precision", "sensitivity.csv", [*Change._fields, *names], lines)


def heat_maps(run: RunRecord, candidates: Sequence[Row]) -> Plot:
    """Return the heat maps, a panel a structure."""
    changes = changes_of(run, candidates)
    shares = sorted({change.asked for change in changes})
    panels = {name: cells_of(changes, name, shares, run["model"]["layers"]) for name in structures_in(candidates)}
    asked, most, least = extremes(changes, run["config"]["ratio"])
    said = [f"Change of the loss on {judged_metric(run)} when some units of one layer go, a panel a structure."]
    for word, places in (("most", most), ("least", least)):
        each = ", ".join(
            f"layer {c.layer} {c.structure} {signed(c.nats, 4)} ({format_relative(c.relative)} × average)"
            for c in places
        )
        said.append(f"What costs {word} at {100 * asked:g} %, nats a token: {each}.")
    panels = {name: cells for name, cells in panels.items() if np.isfinite(cells).any()}
    return sensitivity_plot(panels, shares, " ".join(said))


def cells_of(changes: Sequence[Change], structure: str, shares: Sequence[float], layers: int) -> np.ndarray:
    """Return the changes of a structure, `[shares, layers]`; NaN where a layer has no such unit."""
    cells = np.full((len(shares), layers), np.nan)
    for change in changes:
        if change.structure == structure:
            cells[shares.index(change.asked), change.layer] = change.nats
    return cells
