"""What `saap sensitivity` shows and keeps: the places that cost most and least, heat maps, and what it suggests."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from saap_jax.evaluation.paired import FEWEST, LEVEL
from saap_jax.evaluation.sensitivity import Change, a_parameter, as_costly, changes_of, judged_metric, nearest_share
from saap_jax.evaluation.suggestions import aligned_sentence
from saap_jax.report.kinds.scores import inline_svg
from saap_jax.report.kinds.tables import BEST, TIED, format_ppl
from saap_jax.report.page.blocks import plural
from saap_jax.report.page.csv_text import csv_text
from saap_jax.report.rows import DENSE, Record
from saap_jax.report.suggestions import markdown_suggestions
from saap_jax.types import STRUCTURES

EXTREMES = 5
"""Places shown on either side."""

_COLOURS = 64
"""Few enough for small files, too many to be told apart."""

_FRAME, _ROW = 1.15, 0.3
"""Inches of a panel without its rows, and of a row."""


def sensitivity_files(run: Record, candidates: Sequence[Record]) -> dict[str, str]:
    """Return the files of a run: heat maps, tables with suggestions, and all changes."""
    return {
        "sensitivity.svg": sensitivity_figure(run, candidates),
        "sensitivity.md": markdown_sensitivity(run, candidates),
        "sensitivity.csv": csv_sensitivity(run, candidates),
    }


def extremes(changes: Sequence[Change], ratio: float) -> tuple[float, list[Change], list[Change]]:
    """Return the share nearest to a ratio, and the places that cost most and least a parameter when that share goes.

    Places are ordered by their cost beside the average of their structure, or by their cost itself where an average is
    not above 0; no place is on both sides.
    """
    shown = nearest_share(changes, ratio)
    asked = shown[0].asked
    several = not any(math.isnan(change.relative) for change in shown)
    shown.sort(key=lambda change: -(change.relative if several else change.nats))
    many = min(EXTREMES, (len(shown) + 1) // 2)
    return asked, shown[:many], shown[max(many, len(shown) - EXTREMES) :]


def marks_of(run: Record, candidates: Sequence[Record]) -> dict[Change, str]:
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
            f"{change.nats:+.4f}",
            format_change(change.percent),
            format_ends(change),
            "n/a" if math.isnan(change.relative) else f"{change.relative:.2f}",
        ]
        for change in changes
    ]


HEADER = ("layer", "structure", "removed %", "parameters", "nats", "ppl %", "95 % interval", "x average")


def format_change(percent: float) -> str:
    """Return a change of perplexity in percent, with its sign.

    >>> [format_change(value) for value in (0.123, -3.21, 12345.6)]
    ['+0.12', '-3.21', '+1.2e+04']
    """
    return f"{percent:+.2f}" if abs(percent) < 1000 else f"{percent:+.1e}"


def format_ends(change: Change) -> str:
    """Return the interval of a change of perplexity."""
    if math.isnan(change.low) or math.isnan(change.high):
        return "n/a"
    return f"{format_change(change.low)} to {format_change(change.high)}"


def notes(run: Record, candidates: Sequence[Record]) -> list[str]:
    """Say what the numbers mean, what a structure costs on the whole, and what aligned widths were measured to do."""
    changes, metric = changes_of(run, candidates), judged_metric(run)
    asked, _, _ = extremes(changes, run["config"]["ratio"])
    said = [
        f"{metric}, {format_ppl(run[DENSE]['ppl'][metric])} unpruned; units of the lowest scores by "
        f"{run['config']['estimator']} go, of one layer alone",
        "x average: loss a removed parameter, beside that of all layers of the structure together",
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
    for structure in STRUCTURES:
        each = a_parameter(nearest_share(changes, run["config"]["ratio"]), structure)
        if not math.isnan(each):
            said.append(
                f"{structure}: {1e6 * each:+.4f} nats a million parameters, over all layers at {100 * asked:g} %"
            )
    aligned = [trial for trial in run.get("trials") or [] if trial["kind"] == "aligned"]
    return [*said, *(aligned_sentence(run, candidates, trial) for trial in aligned)]


def rich_sensitivity(run: Record, candidates: Sequence[Record]) -> Table:
    """Return the places that cost most and least for a terminal of 100 columns."""
    asked, most, least = extremes(changes_of(run, candidates), run["config"]["ratio"])
    table = Table(
        title=Text(f"{100 * asked:g} % of the units of one place: what costs most, and what least", style="italic"),
        caption=Text("\n".join(notes(run, candidates))),
        caption_justify="left",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for name in HEADER:
        table.add_column(name, justify="left" if name == "structure" else "right", no_wrap=True)
    marks = marks_of(run, candidates)
    for place, line in enumerate(sensitivity_cells(most, marks), start=1):
        table.add_row(*map(Text, line), end_section=place == len(most))
    for line in sensitivity_cells(least, marks):
        table.add_row(*map(Text, line))
    return table


def markdown_sensitivity(run: Record, candidates: Sequence[Record]) -> str:
    """Return suggestions, extremes and the whole table of each structure as Markdown."""
    changes = changes_of(run, candidates)
    asked, most, least = extremes(changes, run["config"]["ratio"])
    parts = [
        "## Suggestions\n",
        markdown_suggestions(run),
        f"## What costs most and least, {100 * asked:g} % removed\n",
    ]
    parts += [
        _markdown(HEADER, sensitivity_cells([*most, *least], marks_of(run, candidates))),
        "".join(f"- {n}\n" for n in notes(run, candidates)).replace("*", "\\*"),
    ]
    for structure in STRUCTURES:
        own = {(change.layer, change.asked): change for change in changes if change.structure == structure}
        if not own:
            continue
        layers, shares = sorted({layer for layer, _ in own}), sorted({share for _, share in own})
        header = ["layer", *(f"{100 * share:g} %" for share in shares)]
        lines = [[str(layer), *(format_change(own[layer, share].percent) for share in shares)] for layer in layers]
        parts += [f"## {structure}: change of perplexity, %\n", _markdown(header, lines)]
    return "\n".join(parts)


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["--:"] * len(header)
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, rule, *lines)).replace("*", "\\*")


def csv_sensitivity(run: Record, candidates: Sequence[Record]) -> str:
    """Return all changes as CSV, in full precision, with the perplexity on every text; NaN is an empty cell."""
    names = [metric["name"] for metric in run["metrics"]]
    rows = {(row["structure"], row["layer"], row["asked"]): row for row in candidates if "layer" in row}
    lines = []
    for change in changes_of(run, candidates):
        ppl = rows[change.structure, change.layer, change.asked]["ppl"]
        lines.append(["" if value != value else value for value in (*change, *map(ppl.get, names))])
    return csv_text([*Change._fields, *names], lines)


# --- heat maps -------------------------------------------------------------------------------------


def sensitivity_figure(run: Record, candidates: Sequence[Record]) -> str:
    """Return heat maps as SVG, a panel a structure: layers across, shares of units removed up, colour the change.

    Colours are linear near 0 and logarithmic beyond, since a few places cost far more than the rest; each panel has a
    scale of its own.
    """
    changes = changes_of(run, candidates)
    shares = sorted({change.asked for change in changes})
    panels = {name: _cells(changes, name, shares, run["model"]["layers"]) for name in STRUCTURES}
    panels = {name: cells for name, cells in panels.items() if np.isfinite(cells).any()}
    asked, most, least = extremes(changes, run["config"]["ratio"])
    said = [f"Change of the loss on {judged_metric(run)} when some units of one layer go, a panel a structure."]
    for word, places in (("most", most), ("least", least)):
        each = ", ".join(f"layer {c.layer} {c.structure} {c.nats:+.4f} ({c.relative:.2f} x average)" for c in places)
        said.append(f"What costs {word} at {100 * asked:g} %, nats a token: {each}.")
    return inline_svg(
        lambda figure: _paint(figure, panels, shares),
        height=len(panels) * (_FRAME + _ROW * len(shares)),
        title="What each layer costs when it alone is pruned",
        description=" ".join(said),
    )


def _cells(changes: Sequence[Change], structure: str, shares: Sequence[float], layers: int) -> np.ndarray:
    """Return the changes of a structure, `[shares, layers]`; NaN where a layer has no such unit."""
    cells = np.full((len(shares), layers), np.nan)
    for change in changes:
        if change.structure == structure:
            cells[shares.index(change.asked), change.layer] = change.nats
    return cells


def _paint(figure: Any, panels: dict[str, np.ndarray], shares: Sequence[float]) -> None:
    from matplotlib import colormaps  # here, because plotting takes long to import
    from matplotlib.colors import AsinhNorm

    scale = colormaps["viridis"].resampled(_COLOURS)

    for axis, (name, cells) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items(), strict=True):
        sizes = np.abs(cells[np.isfinite(cells) & (cells != 0)])
        unit = float(np.median(sizes)) if len(sizes) else 1.0
        low, high = float(np.nanmin(cells)), float(np.nanmax(cells))
        norm = AsinhNorm(unit, vmin=min(low, 0.0), vmax=max(high, 0.0, min(low, 0.0) + unit))
        image = axis.pcolormesh(np.ma.masked_invalid(cells), cmap=scale, norm=norm, edgecolors="face", linewidth=0.2)
        axis.set_title(f"{name}: change of the loss, nats a token", loc="left")
        axis.set_yticks(np.arange(len(shares)) + 0.5, [f"{100 * share:g} %" for share in shares])
        axis.set_ylabel("removed")
        axis.set_xlabel("layer")
        step = next(step for step in (1, 2, 5, 10, 20, 50) if cells.shape[1] <= 40 * step or step == 50)
        numbers = np.arange(0, cells.shape[1], step)
        axis.set_xticks(numbers + 0.5, [str(number) for number in numbers])
        bar = figure.colorbar(image, ax=axis, pad=0.01, aspect=8)
        ticks = _ticks(norm, unit)
        bar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks])
        bar.minorticks_off()
        bar.outline.set_visible(False)


def _ticks(norm: Any, unit: float) -> list[float]:
    """Return 0 and powers of ten from the unit on, on both sides, as far as they do not crowd."""
    powers = [10.0**power for power in range(math.floor(math.log10(unit)), math.ceil(math.log10(unit)) + 8)]
    ticks = [0.0]
    for tick in sorted((sign * power for power in powers for sign in (-1.0, 1.0)), key=lambda tick: (-abs(tick), tick)):
        inside = norm.vmin <= tick <= norm.vmax
        if inside and all(abs(norm(tick) - norm(other)) > 0.09 for other in ticks):
            ticks.append(tick)
    return sorted(ticks)
