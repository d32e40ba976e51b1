"""Maps: what each layer costs or keeps, a cell a layer, a panel a structure."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from saap_jax.report.blocks import Figure
from saap_jax.report.figures.draw import INK
from saap_jax.report.formats import short_name
from saap_jax.runtime.words import MINUS

_ROW, _FRAME, _BAR = 0.2, 0.75, 0.6
"""Inches of a row of cells, of a panel without its rows, and of the scale of colours."""

_LETTERS = 30


def share_figure(
    name: str, title: str, panels: Mapping[str, np.ndarray], rows: Sequence[str], of: str, across: str = "layer"
) -> Figure:
    """Return shares in [0, 1] as a map, `[rows, layers]` a panel: dark is 0, bright is 1, NaN is blank."""
    return _figure(name, title, panels, rows, across, f"{of}, %", lambda: ("viridis", None, 100.0))


def change_figure(name: str, title: str, panels: Mapping[str, np.ndarray], rows: Sequence[str], of: str) -> Figure:
    """Return changes as a map, `[rows, layers]` a panel, NaN where a layer has no such unit.

    Colours diverge from 0, linear near it and logarithmic beyond, since a few places cost far more than the rest; all
    panels have one scale.
    """
    every = np.concatenate([cells[np.isfinite(cells)] for cells in panels.values()] or [np.empty(0)])
    sizes = np.abs(every[every != 0])
    unit = float(np.median(sizes)) if len(sizes) else 1.0

    def scale() -> tuple[Any, Any, float]:
        from matplotlib.colors import AsinhNorm

        most = float(max(sizes, default=unit))
        return "RdBu_r", AsinhNorm(unit, vmin=-most, vmax=most), 1.0

    return _figure(name, title, panels, rows, "layer", of, scale)


def _figure(
    name: str, title: str, panels: Mapping[str, np.ndarray], rows: Sequence[str], across: str, of: str, scale: Any
) -> Figure:
    each = _FRAME + _ROW * len(rows)
    height = len(panels) * each + _BAR

    def paint(figure: Any) -> None:
        colours, norm, factor = scale()
        options = {"cmap": colours, "norm": norm} if norm else {"cmap": colours, "vmin": 0, "vmax": factor}
        image: Any = None
        for place, (panel, cells) in enumerate(panels.items()):
            bottom = height - (place + 1) * each + 0.42
            axis = figure.add_axes((0.06, bottom / height, 0.92, _ROW * len(rows) / height))
            image = axis.pcolormesh(np.ma.masked_invalid(factor * cells), edgecolors="face", linewidth=0.2, **options)
            axis.set_title(panel)
            axis.set_yticks(np.arange(len(rows)) + 0.5, [short_name(row, _LETTERS) for row in rows])
            axis.tick_params(axis="y", length=0)
            axis.invert_yaxis()
            step = next(step for step in (1, 2, 5, 10, 20, 50, 1000) if cells.shape[1] <= 16 * step or step == 1000)
            numbers = np.arange(0, cells.shape[1], step)
            axis.set_xticks(numbers + 0.5, [str(number) for number in numbers])
            axis.set_xlabel(across, labelpad=1)
        bar = figure.colorbar(
            image, cax=figure.add_axes((0.06, 0.3 / height, 0.5, 0.1 / height)), orientation="horizontal"
        )
        if norm:
            ticks = _ticks(norm, norm.linear_width)
            bar.set_ticks(ticks, labels=[f"{tick:.2g}".replace("-", MINUS) for tick in ticks])
            bar.minorticks_off()
        bar.outline.set_visible(False)
        bar.ax.annotate(of, (1.03, 0.5), xycoords="axes fraction", va="center", color=INK)

    return Figure(name, title, paint, height)


def _ticks(norm: Any, unit: float) -> list[float]:
    """Return 0 and powers of ten from the unit on, on both sides, as far as they do not crowd."""
    powers = [10.0**power for power in range(math.floor(math.log10(unit)), math.ceil(math.log10(unit)) + 8)]
    ticks = [0.0]
    for tick in sorted((sign * power for power in powers for sign in (-1.0, 1.0)), key=lambda tick: (-abs(tick), tick)):
        inside = norm.vmin <= tick <= norm.vmax
        if inside and all(abs(norm(tick) - norm(other)) > 0.12 for other in ticks):
            ticks.append(tick)
    return sorted(ticks)
