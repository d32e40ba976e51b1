"""How far each variant can be pruned: its curve, the limit, seeds as bands, knees as rings."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from saap_jax.evaluation.scales import format_figure, scale_of
from saap_jax.report.figures.axes import BELOW, LEGEND_LINE, logarithmic, removed_across
from saap_jax.report.figures.palette import COLOURS, DISTINCT, INK, line_style
from saap_jax.report.page.blocks import Plot
from saap_jax.report.page.formats import TIED, format_percent, short_name
from saap_jax.runs.records import Row, RunRecord
from saap_jax.runs.standing import DENSE, mean_figure
from saap_jax.runtime.words import plural

Band = list[tuple[float, float, float, float]]
"""Points of a curve over the seeds: ratio, and the lowest, mean and highest perplexity."""


def format_estimate(estimate: Any) -> str:
    """Return a ratio over seeds, an `evaluation.crossing.Estimate`, in percent, without the sign."""
    spread = f" ± {format_percent(estimate.spread)}" if math.isfinite(estimate.spread) else ""
    return format_percent(estimate.mean) + spread


def frontier_plot(run: RunRecord, candidates: Sequence[Row], found: Sequence[Any]) -> Plot:
    """Return perplexity (log axis; losses of 0 and below: linear) against ratio of variants, see `crossing.Found`.

    A curve is the mean over the seeds of log perplexity, on the grid and where bisection tried the same ratio for all
    of them; its band goes from the lowest seed to the highest. A line down to the axis is the largest ratio. The axis
    ends at four times the median of the curves' ends, so that one that explodes does not squeeze the rest.
    """
    frontier, scale = run["frontier"], scale_of(run["frontier"]["metric"])
    bands = {each.variant: band_of(run, candidates, each.variant) for each in found}
    said = [
        f"{scale.noun.capitalize()} {frontier['metric']} on a "
        f"{'logarithmic' if _lowest(bands) > 0 else 'linear'} axis against the "
        "share of prunable parameters removed; "
        f"unpruned {format_figure(bands[found[0].variant][0][2], scale)}, limit "
        f"{format_figure(frontier['limit'], scale)}."
    ]
    for each in found:
        curve = ", ".join(
            f"{format_percent(ratio)} % {format_figure(ppl, scale)}" for ratio, _, ppl, _ in bands[each.variant]
        )
        ratio, knee = format_estimate(each.ratio), format_estimate(each.knee)
        said.append(f"{each.variant}: {curve}; largest ratio within the limit {ratio} %, knee {knee} %.")
    height = 4.4 + LEGEND_LINE * (3 + min(len(found), DISTINCT))
    title = f"How far each variant can be pruned: {frontier['metric']}"
    return Plot("frontier", title, " ".join(said), lambda figure: _paint(figure, run, found, bands), height)


def band_of(run: RunRecord, candidates: Sequence[Row], variant: str) -> Band:
    """Return the curve of a variant by asked ratio, where all its seeds were measured and are finite."""
    metric = run["frontier"]["metric"]
    points = {0.0: [float(run[DENSE]["ppl"][metric])]}
    for candidate in candidates:
        if candidate["variant"] == variant:
            points.setdefault(candidate["ratio_asked"], []).append(float(candidate["ppl"][metric]))
    seeds = len(run["seeds"]["calibration"])
    return [
        (ratio, min(ppl), mean_figure(metric, ppl), max(ppl))
        for ratio, ppl in sorted(points.items())
        if (len(ppl) == seeds or ratio == 0) and all(map(math.isfinite, ppl))
    ]


def _lowest(bands: Mapping[str, Band]) -> float:
    return min(low for band in bands.values() for _, low, _, _ in band)


def _paint(figure: Any, run: RunRecord, found: Sequence[Any], bands: dict[str, Band]) -> None:
    axis, frontier, scale = figure.subplots(), run["frontier"], scale_of(run["frontier"]["metric"])
    limit, dense = frontier["limit"], bands[found[0].variant][0][2]
    ends = sorted(band[-1][2] for band in bands.values())
    lowest, highest = _lowest(bands), max(limit, *(high for band in bands.values() for *_, high in band))
    if log := lowest > 0:
        highest = max(limit, min(highest, 4 * ends[(len(ends) - 1) // 2]))
        axis.set_ylim(lowest / 1.08, highest * 1.08)
    else:
        axis.set_ylim(lowest - 0.05 * (highest - lowest), highest + 0.05 * (highest - lowest))
    axis.axhline(limit, color=INK, linewidth=1.2, linestyle=(0, (6, 3)))
    axis.axhline(dense, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
    if log:
        logarithmic(axis)
    for index, each in enumerate(found[:DISTINCT]):
        _paint_line(axis, each, bands[each.variant], index, limit)
    removed_across(axis, max(ratio for band in bands.values() for ratio, *_ in band))
    axis.set_ylabel(short_name(frontier["metric"], 44) + " (log)" * log)
    for height, text, up in ((limit, f"limit +{frontier['percent']:g} %", 1), (dense, "unpruned", -1)):
        axis.annotate(
            f"{text} {format_figure(height, scale)}", (1.0, height), xycoords=axis.get_yaxis_transform(),
            xytext=(0, 2 * up), textcoords="offset points", ha="right", va="bottom" if up > 0 else "top",
        )  # fmt: skip
    more = f"\n{plural(len(found) - DISTINCT, 'more variant')} in the table" if len(found) > DISTINCT else ""
    title = "line down: largest ratio; ring: knee\nband: lowest to highest seed" + more
    figure.legend(**BELOW, handlelength=3.6, title=title)


def _paint_line(axis: Any, found: Any, band: Band, index: int, limit: float) -> None:
    """Draw a curve with its band, the largest ratio on the limit, and the knee on the curve."""
    style = line_style(index)
    colour = COLOURS[style.colour]
    ratios, low, mean, high = (list(values) for values in zip(*band, strict=True))
    tied = f" {TIED}" if found.tied else ""
    label = f"{short_name(found.variant, 34)}: {format_estimate(found.ratio)} %{tied}"
    axis.plot(ratios, mean, label=label, **style.options(1.6))
    if low != high:
        axis.fill_between(ratios, low, high, color=colour, alpha=0.2, linewidth=0)
    if found.ratio.mean > 0 and found.everywhere < found.seeds:
        axis.plot([found.ratio.mean] * 2, [axis.get_ylim()[0], limit], color=colour, linewidth=1.2)
    if not math.isnan(found.knee.mean):
        log = axis.get_yscale() == "log"
        at = float(np.interp(found.knee.mean, ratios, np.log(mean) if log else mean))
        at = math.exp(at) if log else at
        ring = {"markersize": 12, "markerfacecolor": "none", "markeredgewidth": 1.6}
        axis.plot([found.knee.mean], [at], "o", color=colour, **ring)
