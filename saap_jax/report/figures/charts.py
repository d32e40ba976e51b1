"""A chart for papers: a line a name, a panel a column. On a page it is a table of small drawings, see `page.strips`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from saap_jax.report.figures.axes import heat
from saap_jax.report.figures.palette import COLOURS, INK, PAPER
from saap_jax.report.page.blocks import Axis, Band, Chart, Heat, Interval, Plot, Strip
from saap_jax.report.page.formats import short_name

_LETTERS = 38


def chart_plot(chart: Chart) -> Plot:
    """Return a chart as a plot; columns of words are left out, and so are lines of no drawing."""
    columns = [(place, column) for place, column in enumerate(chart.columns) if column.axis is not None]
    strips = list(chart.strips)

    def paint(figure: Any) -> None:
        panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
        images: dict[int, Any] = {}
        for panel, (place, column) in zip(panels, columns, strict=True):
            cells = [strip.cells[place] for strip in strips]
            if any(isinstance(cell, Heat) for cell in cells):
                images[place] = heat(panel, _shares(cells))
            elif column.axis:
                _on_axis(panel, column.axis, strips, place)
            panel.set_title(short_name(column.title, 40))
        panels[0].set_yticks(range(len(strips)), [short_name(strip.name, _LETTERS) for strip in strips])
        panels[0].set_ylim(len(strips) - 0.5, -0.5)
        if images:
            drawn = [panel for panel, (place, _) in zip(panels, columns, strict=True) if place in images]
            figure.colorbar(next(iter(images.values())), ax=drawn, label=chart.scale, shrink=0.9)
        if chart.below:
            figure.supxlabel(chart.below, fontsize=8)

    return Plot(chart.name, chart.title, "", paint, 1.0 + 0.2 * len(strips), 6.75)


def _shares(cells: Sequence[Any]) -> np.ndarray:
    """Return the shares of all lines, NaN where a line has fewer layers."""
    rows = [list(cell.shares) if isinstance(cell, Heat) else [] for cell in cells]
    longest = max(map(len, rows))
    return np.array([row + [np.nan] * (longest - len(row)) for row in rows])


def _on_axis(panel: Any, axis: Axis, strips: Sequence[Strip], place: int) -> None:
    panel.set_xlim(axis.low, axis.high)
    panel.set_xticks([at for at, _ in axis.ticks], [text for _, text in axis.ticks])
    panel.spines["left"].set_visible(False)
    panel.tick_params(axis="y", length=0)
    if axis.low < 0 < axis.high:
        panel.axvline(0.0, color=INK, linewidth=0.6)
    for height, strip in enumerate(strips):
        cell = strip.cells[place]
        if isinstance(cell, Interval):
            _interval(panel, axis, height, cell)
        elif isinstance(cell, Band):
            _band(panel, axis, height, cell.quantiles)


def _interval(panel: Any, axis: Axis, height: int, cell: Interval) -> None:
    low, high = max(cell.low, axis.low), min(cell.high, axis.high)  # NaN stays
    panel.plot([low, high], [height] * 2, color=COLOURS[0])
    if cell.value > axis.high or cell.value < axis.low:
        above = cell.value > axis.high
        panel.plot([axis.high if above else axis.low], [height], ">" if above else "<", color=COLOURS[0], clip_on=False)
    else:
        panel.plot([cell.value], [height], "o", color=COLOURS[0], markerfacecolor=COLOURS[0] if cell.sure else PAPER)


def _band(panel: Any, axis: Axis, height: int, quantiles: Sequence[float]) -> None:
    low, lower, middle, upper, high = np.clip(quantiles, axis.low, axis.high)
    panel.plot([low, high], [height] * 2, color=COLOURS[0])
    panel.plot([lower, upper], [height] * 2, color=COLOURS[0], linewidth=5, alpha=0.5)
    panel.plot([middle], [height], "|", color=INK, markersize=7)
