"""Patterns over scenarios as heat maps: importance and usage, a panel a scenario, and what all agree on."""

from typing import Any

import numpy as np

from saap_jax.report.figures.axes import LEVELS, heat_maps
from saap_jax.report.page.blocks import Plot
from saap_jax.report.page.formats import short_name

_CELLS = 200
"""Cells of a heat map side by side; more units than that are averaged, about as a screen would."""

_PANELS = 4
"""Scenarios side by side."""

_TALL = {"least": 1.7, "layer": 0.1, "most": 5.0, "frame": 1.3}
"""Inches: of a panel at least, of each layer, of a panel at most, and of titles, ticks and colour bar of a row."""


def pattern_plot(found: Any, structure: str, said: str) -> Plot:
    """Return a structure's heat maps; `found` is a `kinds.patterns.Patterns` and `said` what it says in words.

    A row of a panel is a layer. Attention units stand in order; MLP channels are sorted within their layer by their
    mean rank over scenarios, the same order in all panels. Where there are more units than cells, a cell is a mean.
    """
    panel = min(max(_TALL["least"], _TALL["layer"] * len(found.structures[structure].consistent)), _TALL["most"])
    lead = f"Percentile rank of importance by {found.importance}"
    lead += f" and frequency by {found.usage}" if found.usage else ""
    lead += f" of each unit by layer, a panel a scenario: {', '.join(found.scenarios)}."
    return Plot(
        f"patterns-{structure}",
        f"Patterns by scenario: {structure}",
        f"{lead} {said}",
        lambda figure: _paint(figure, found, structure),
        height=_shape(found)[0] * (panel + _TALL["frame"]),
    )


def _shape(found: Any) -> tuple[int, int]:
    """Return rows and columns of panels: usage below importance (of one scenario: beside it), agreement at the end."""
    many, kinds = len(found.scenarios), 2 if found.usage else 1
    rows = -(-many // _PANELS)
    return (1, kinds + 1) if many == 1 else (kinds * rows, -(-many // rows) + 1)


def _paint(figure: Any, found: Any, structure: str) -> None:
    """Draw all panels: importance, usage, and in the last column what scenarios agree on."""
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap

    part, many = found.structures[structure], len(found.scenarios)
    order = _by_mean_rank(part) if structure == "mlp" else None
    figure.get_layout_engine().set(hspace=0.06)
    axes = figure.subplots(*_shape(found), squeeze=False)
    for axis in axes.ravel():
        axis.set_visible(False)  # until something is drawn there
    kinds = [("importance", part.ranks, "viridis", f"percentile rank, %\nby {short_name(found.importance, 40)}")]
    if found.usage:
        label = f"share of tokens that use the unit, %\nby {short_name(found.usage, 40)}"
        kinds.append(("usage", part.frequencies, "cividis", label))
    places = np.split(axes[:, :-1], len(kinds), axis=1 if many == 1 else 0)
    for grid, (kind, values, scale, label) in zip(places, kinds, strict=True):
        cells = {scenario: _cells(each, order) for scenario, each in values.items()}
        most = 1.0 if kind == "importance" else max(0.01, *(float(np.nanmax(each)) for each in cells.values()))
        heat_maps(grid.ravel()[:many], cells, part.consistent.shape, colormaps[scale].resampled(LEVELS), most, label)
        for axis in grid[:, 0]:
            axis.set_ylabel(f"{kind} by layer")
    exists = ~np.isnan(next(iter(part.ranks.values())))
    agreed = _cells(np.where(exists, part.consistent, np.nan), order)
    scale = LinearSegmentedColormap.from_list("share", [(0.5, 0.5, 0.5, 0.15), "#e69f00", "#c44a00"], N=LEVELS)
    title = "unimportant in all" if many > 1 else f"the lowest {100 * found.share:g} %"
    heat_maps(axes[0, -1:], {title: agreed}, part.consistent.shape, scale, 1.0, "share of the units, %\n")
    for axis in axes.ravel():
        axis.set_xlabel("unit" if order is None else f"channels by {'mean ' if many > 1 else ''}rank")


def _by_mean_rank(part: Any) -> np.ndarray:
    """Return the order of each layer's units by their mean rank over scenarios, absent units last."""
    return np.argsort(np.mean(list(part.ranks.values()), axis=0), axis=1, kind="stable")


def _cells(values: np.ndarray, order: np.ndarray | None = None) -> np.ndarray:
    """Return the cells of a heat map: units in the given order, and neighbours averaged where there are too many."""
    if order is not None:
        values = np.take_along_axis(values, order, axis=1)
    units = values.shape[1]
    if units <= _CELLS:
        return values
    starts = np.arange(_CELLS) * units // _CELLS
    exists = ~np.isnan(values)
    counts = np.add.reduceat(exists, starts, axis=1, dtype=np.int64)
    totals = np.add.reduceat(np.where(exists, values, 0), starts, axis=1)
    return np.where(counts > 0, totals / np.maximum(counts, 1), np.nan)
