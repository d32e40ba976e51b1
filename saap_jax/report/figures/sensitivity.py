"""What each layer costs when it alone is pruned: heat maps, layers across, shares of units removed up."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from saap_jax.report.figures.axes import LEVELS
from saap_jax.report.page.blocks import Plot
from saap_jax.runtime.words import MINUS

_FRAME, _ROW, _SCALE = 1.15, 0.3, 0.5
"""Inches of a panel without its rows, of a row, and of the scale of colours."""


def sensitivity_plot(panels: dict[str, np.ndarray], shares: Sequence[float], said: str) -> Plot:
    """Return a panel a structure, of changes of the loss `[shares, layers]`, NaN where a layer has no such unit.

    Colours diverge from 0, linear near it and logarithmic beyond, since a few places cost far more than the rest; all
    panels have one scale. `said` is the figure in words.
    """
    height = len(panels) * (_FRAME + _ROW * len(shares)) + _SCALE
    title = "What each layer costs when it alone is pruned"
    return Plot("sensitivity", title, said, lambda figure: _paint(figure, panels, shares), height)


def _paint(figure: Any, panels: dict[str, np.ndarray], shares: Sequence[float]) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import AsinhNorm

    scale = colormaps["RdBu_r"].resampled(LEVELS + 1)  # one of them is 0
    every = np.concatenate([cells[np.isfinite(cells)] for cells in panels.values()])
    sizes = np.abs(every[every != 0])
    unit = float(np.median(sizes)) if len(sizes) else 1.0
    most = float(max(sizes, default=unit))
    norm = AsinhNorm(unit, vmin=-most, vmax=most)
    images = []
    for axis, (name, cells) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items(), strict=True):
        cover = {"cmap": scale, "norm": norm, "edgecolors": "face", "linewidth": 0.2}
        images.append(axis.pcolormesh(np.ma.masked_invalid(cells), **cover))
        axis.set_title(f"{name}: change of the loss, nats a token")
        axis.set_yticks(np.arange(len(shares)) + 0.5, [f"{100 * share:g} %" for share in shares])
        axis.set_ylabel("removed")
        axis.set_xlabel("layer")
        step = next(step for step in (1, 2, 5, 10, 20, 50) if cells.shape[1] <= 40 * step or step == 50)
        numbers = np.arange(0, cells.shape[1], step)
        axis.set_xticks(numbers + 0.5, [str(number) for number in numbers])
        axis.spines[["top", "right"]].set_visible(True)
    below = {"location": "bottom", "anchor": (0.0, 1.0), "shrink": 0.32}  # at the left, which a phone shows too
    bar = figure.colorbar(images[0], ax=figure.axes, pad=0.02, aspect=24, **below)
    ticks = _ticks(norm, unit)
    bar.set_ticks(ticks, labels=[f"{tick:.2g}".replace("-", MINUS) for tick in ticks])
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
