"""What `saap frontier` shows and keeps: how far each variant can go, as a table, a figure and a sentence."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from saap_jax.evaluation.frontier import Estimate, Found, found_variants
from saap_jax.evaluation.paired import FEWEST, LEVEL
from saap_jax.report.figures.palette import COLOURS, DISTINCT, line_style
from saap_jax.report.figures.ratio import log_ticks
from saap_jax.report.kinds.scores import INK, inline_svg, short_name
from saap_jax.report.kinds.summary import some
from saap_jax.report.kinds.tables import BEST, TIED, csv_table, format_percent, format_ppl
from saap_jax.report.page.blocks import plural
from saap_jax.report.page.csv_text import csv_text
from saap_jax.report.rows import DENSE, Record

Band = list[tuple[float, float, float, float]]
"""Points of a curve over the seeds: ratio, and the lowest, mean and highest perplexity."""

_MARKERS = "osD^vP*X"


def frontier_files(run: Record, candidates: Sequence[Record]) -> dict[str, str]:
    """Return the files of a run: figure, table, results of each seed, and every candidate that was measured."""
    found = found_variants(run, candidates)
    figure = frontier_figure(run, candidates, found)
    return {
        "frontier.svg": figure,
        "frontier.md": markdown_frontier(run, found),
        "frontier.csv": csv_frontier(run, candidates),
        "curve.csv": csv_table(run, candidates),
    }


def summary(run: Record, found: Sequence[Found]) -> str:
    """Say who can be pruned furthest within the limit, and where the knee of its curve is; or why that is not known."""
    best, frontier = found[0], run["frontier"]
    limit = f"+{frontier['percent']:g} % of {frontier['metric']}"
    if not best.ratio.mean > 0:
        return f"No variant keeps within {limit} at a ratio of {100 * frontier['tolerance']:g} %."
    seeds = f"{best.seeds} seeds" if best.seeds > 1 else "1 seed"
    tied, tested = [each.variant for each in found if each.tied], best.windows >= FEWEST
    if len(found) == 1 or not tested:
        lead = f"{best.variant} reaches"
    elif tied:
        lead = f"No variant is known to go furthest within {limit}: {best.variant} reaches"
    else:
        lead = f"{best.variant} goes furthest within {limit}:"
    said = (
        f"{lead} {format_estimate(best.ratio)} % of the prunable parameters ({seeds})"
        f"{'' if limit in lead else f' within {limit}'}, at a perplexity of {format_ppl(best.ppl)} of at most "
        f"{format_ppl(frontier['limit'])}"
    )
    if tied:
        said += f", from which cannot be told apart {some(tied)}"
    if not tested:
        return f"{said}. Whether another goes as far is not known, nor where the knee is: {untested(found)}."
    if math.isnan(best.knee.mean):
        return f"{said}; its curve has no knee between {_range(frontier)}."
    return f"{said}; the knee of its curve is at {format_estimate(best.knee)} %."


def untested(found: Sequence[Found]) -> str:
    """Say why there are no intervals; empty where the windows suffice."""
    windows = found[0].windows
    return "" if windows >= FEWEST else f"{plural(windows, 'window')}, where an interval takes {FEWEST}"


def notes(run: Record, found: Sequence[Found]) -> list[str]:
    """Say what the numbers mean, and what is special about some of them."""
    frontier, ties = run["frontier"], any(each.tied for each in found)
    said = [
        f"limit: {frontier['metric']} at most {format_ppl(frontier['limit'])}, the unpruned model's "
        f"{format_ppl(run[DENSE]['ppl'][frontier['metric']])} +{frontier['percent']:g} %",
        f"ratio: the first crossing from below on the grid {', '.join(f'{100 * r:g}' for r in frontier['ratios'])} %, "
        f"bisected to {100 * frontier['tolerance']:g} % ({frontier['rounds']} rounds)",
        "knee: furthest below the chord of log perplexity against ratio, a point of the grid",
        f"± standard deviation over seeds; no intervals: {why}"
        if (why := untested(found))
        else "± standard deviation over seeds; [95 % interval, bootstrap over seeds and windows]",
        f"{BEST} largest ratio"
        + (f"   {TIED} cannot be told apart from it (paired bootstrap, Holm, {100 * LEVEL:g} %)" if ties else ""),
    ]
    for each in found:
        of = f" for {each.everywhere} of {each.seeds} seeds" if each.everywhere < each.seeds else ""
        if each.everywhere:
            said.append(f"{each.variant} holds the limit up to the largest ratio that its search can meet{of}")
        if each.again:
            again = ", ".join(f"{100 * ratio:g}" for ratio in each.again)
            said.append(f"{each.variant} is not monotone: it holds the limit again at {again} %, above the crossing")
    return said


def frontier_cells(found: Sequence[Found]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the formatted cells of the table, a line a variant, the largest ratio first."""
    header = ["variant", "largest ratio %", "interval", "actual %", "ppl there", "knee %", "interval"]
    cells = []
    for each in found:
        sides = [f(e) for e in (each.ratio, each.knee) for f in (format_estimate, format_interval)]
        mark = BEST if each is found[0] and each.ratio.mean > 0 else TIED if each.tied else ""
        cells.append(
            [
                f"{each.variant} {mark}".rstrip(),
                *sides[:2],
                format_percent(each.actual),
                format_ppl(each.ppl),
                *sides[2:],
            ]
        )
    return header, cells


def rich_frontier(run: Record, found: Sequence[Found]) -> Table:
    """Return the table for a terminal of 100 columns."""
    title = f"largest ratio within +{run['frontier']['percent']:g} % of {run['frontier']['metric']}"
    table = Table(
        title=Text(title, style="italic"),
        caption=Text("\n".join(notes(run, found))),
        caption_justify="left",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    header, cells = frontier_cells(found)
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left", no_wrap=index > 0, overflow="fold")
    for line in cells:
        table.add_row(*map(Text, line))
    return table


def markdown_frontier(run: Record, found: Sequence[Found]) -> str:
    """Return summary, table and notes as Markdown."""
    header, cells = frontier_cells(found)
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *cells]
    table = "\n".join(f"| {' | '.join(_escaped(cell) for cell in line)} |" for line in lines)
    return f"{summary(run, found)}\n\n{table}\n\n" + "".join(f"- {_escaped(note)}\n" for note in notes(run, found))


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


def csv_frontier(run: Record, candidates: Sequence[Record]) -> str:
    """Return what was found of each variant and seed as CSV, in full precision; an empty cell for what there is not."""
    rows = {candidate["candidate"]: candidate for candidate in candidates} | {DENSE: run[DENSE]}
    names = [metric["name"] for metric in run["metrics"]]
    keys = ["variant", "seed", "ratio", "breaks_at", "largest_possible", "rounds", "candidate"]
    lines = []
    for line in run["frontier"]["lines"]:
        row = rows[line["candidate"]]
        measured = [row.get("ratio_actual", 0.0), row["parameters"], *map(row["ppl"].get, names)]
        lines.append([*(line[key] for key in keys), " ".join(map(str, line["again"])), *measured])
    return csv_text([*keys, "again", "ratio_actual", "parameters", *names], lines)


def format_estimate(estimate: Estimate) -> str:
    """Return a ratio over seeds in percent, without the sign.

    >>> format_estimate(Estimate(0.2472, 0.0031, 0.21, 0.28)), format_estimate(Estimate(0.2, math.nan, 0.2, 0.2))
    ('24.7 ± 0.3', '20.0')
    """
    spread = f" ± {format_percent(estimate.spread)}" if math.isfinite(estimate.spread) else ""
    return format_percent(estimate.mean) + spread


def format_interval(estimate: Estimate) -> str:
    """Return the interval of a ratio in percent, without the sign."""
    if math.isnan(estimate.low):
        return "n/a"
    return f"[{format_percent(estimate.low)}, {format_percent(estimate.high)}]"


# --- the figure ------------------------------------------------------------------------------------


def frontier_figure(run: Record, candidates: Sequence[Record], found: Sequence[Found]) -> str:
    """Return the curves as SVG: perplexity (log axis) against ratio, the limit, seeds as bands, knees as rings.

    A curve is the mean over the seeds of log perplexity, on the grid and where bisection tried the same ratio for all
    of them; its band goes from the lowest seed to the highest. A line down to the axis is the largest ratio. The axis
    ends at four times the median of the curves' ends, so that one that explodes does not squeeze the rest.
    """
    frontier = run["frontier"]
    bands = {each.variant: _band(run, candidates, each.variant) for each in found}
    said = [
        f"Perplexity {frontier['metric']} on a logarithmic axis against the share of prunable parameters removed; "
        f"unpruned {format_ppl(bands[found[0].variant][0][2])}, limit {format_ppl(frontier['limit'])}."
    ]
    for each in found:
        curve = ", ".join(f"{format_percent(ratio)} % {format_ppl(ppl)}" for ratio, _, ppl, _ in bands[each.variant])
        ratio, knee = format_estimate(each.ratio), format_estimate(each.knee)
        said.append(f"{each.variant}: {curve}; largest ratio within the limit {ratio} %, knee {knee} %.")
    return inline_svg(
        lambda figure: _paint(figure, run, found, bands),
        height=4.6,
        title=f"How far each variant can be pruned: {frontier['metric']}",
        description=" ".join(said),
    )


def _band(run: Record, candidates: Sequence[Record], variant: str) -> Band:
    """Return the curve of a variant by asked ratio, where all its seeds were measured and are finite."""
    metric, points = run["frontier"]["metric"], {0.0: [float(run[DENSE]["ppl"][run["frontier"]["metric"]])]}
    for candidate in candidates:
        if candidate["variant"] == variant:
            points.setdefault(candidate["ratio_asked"], []).append(float(candidate["ppl"][metric]))
    seeds = len(run["seeds"]["calibration"])
    return [
        (ratio, min(ppl), math.exp(sum(map(math.log, ppl)) / len(ppl)), max(ppl))
        for ratio, ppl in sorted(points.items())
        if (len(ppl) == seeds or ratio == 0) and all(map(math.isfinite, ppl))
    ]


def _paint(figure: Any, run: Record, found: Sequence[Found], bands: dict[str, Band]) -> None:
    from matplotlib.ticker import NullLocator, PercentFormatter  # here, because plotting takes long to import

    axis, frontier = figure.subplots(), run["frontier"]
    limit, dense = frontier["limit"], bands[found[0].variant][0][2]
    axis.set_yscale("log")
    ends = sorted(band[-1][2] for band in bands.values())
    highest = min(max(high for band in bands.values() for *_, high in band), 4 * ends[(len(ends) - 1) // 2])
    lowest = min(low for band in bands.values() for _, low, _, _ in band)
    axis.set_ylim(lowest / 1.08, max(highest, limit) * 1.08)
    axis.axhline(limit, color=INK, linewidth=1.2, linestyle=(0, (6, 3)))
    axis.axhline(dense, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
    for index, each in enumerate(found[:DISTINCT]):
        _paint_line(axis, each, bands[each.variant], index, limit)
    ticks = log_ticks(*axis.get_ylim())
    axis.set_yticks(ticks, [f"{tick:g}" if tick < 1e5 else format_ppl(tick) for tick in ticks])
    axis.yaxis.set_minor_locator(NullLocator())
    axis.grid(axis="y", color=INK, alpha=0.15, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlim(left=0)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %", decimals=0))
    axis.set_xlabel("prunable parameters removed")
    axis.set_ylabel(f"{frontier['metric']} (log)")
    right = axis.get_yaxis_transform()
    for height, text, side in ((limit, f"limit +{frontier['percent']:g} %", "bottom"), (dense, "unpruned", "top")):
        axis.text(1.0, height, f"{text} {format_ppl(height)}", transform=right, ha="right", va=side, fontsize=8.5)
    more = f"\n{plural(len(found) - DISTINCT, 'more variant')} in the table" if len(found) > DISTINCT else ""
    axis.legend(
        loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=3.6,
        title="line down: largest ratio\nring: knee\nband: lowest to highest seed" + more, alignment="left",
    )  # fmt: skip


def _paint_line(axis: Any, found: Found, band: Band, index: int, limit: float) -> None:
    """Draw a curve with its band, the largest ratio on the limit, and the knee on the curve."""
    drawn = line_style(index)
    colour = drawn.paint if drawn.paint != COLOURS[-1] else INK
    ratios, low, mean, high = (list(values) for values in zip(*band, strict=True))
    tied = f" {TIED}" if found.tied else ""
    label = f"{short_name(found.variant, 34)}: {format_estimate(found.ratio)} %{tied}"
    style = {"color": colour, "marker": _MARKERS[drawn.marker], "markersize": 4.5, "linewidth": 1.6}
    axis.plot(ratios, mean, label=label, linestyle=drawn.lengths(1.6), **style)
    if low != high:
        axis.fill_between(ratios, low, high, color=colour, alpha=0.2, linewidth=0)
    if found.ratio.mean > 0 and found.everywhere < found.seeds:
        axis.plot([found.ratio.mean] * 2, [axis.get_ylim()[0], limit], color=colour, linewidth=1.2)
    if not math.isnan(found.knee.mean):
        at = math.exp(float(np.interp(found.knee.mean, ratios, np.log(mean))))
        axis.plot(
            [found.knee.mean], [at], "o", markersize=12, markerfacecolor="none", color=colour, markeredgewidth=1.6
        )


def _range(frontier: Record) -> str:
    return f"0 and {100 * max(frontier['ratios']):g} %"
