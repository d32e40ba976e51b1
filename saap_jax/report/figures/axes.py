"""What figures share: logarithmic axes with few round numbers, places that do not touch, heat maps."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from saap_jax.evaluation.scales import format_ppl
from saap_jax.report.figures.palette import INK
from saap_jax.report.page.blocks import Number
from saap_jax.report.page.formats import short_name

BELOW = {"loc": "outside lower left", "alignment": "left"}
"""Place of a figure's legend: below at its left, which a phone shows too, whatever the figure's width."""

LEGEND_LINE = 0.19
"""Inches of a line of a legend."""

LEVELS = 64
"""Colours of a heat map: few enough for small files, too many to be told apart."""


def log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers within [low, high], the coarsest set that has at least four, thinned to nine at most.

    >>> log_ticks(9.0, 20_000.0)
    [10.0, 100.0, 1000.0, 10000.0]
    >>> log_ticks(11.0, 90.0)
    [15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 80.0]
    """
    ticks: list[float] = []
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for steps in ((10,), (10, 20, 50), (10, 15, 20, 30, 40, 50, 60, 80), tuple(range(10, 100, 2)), range(100, 1000, 5)):
        unit = 10 if steps[0] == 10 else 100
        ticks = [float(f"{step}e{decade}") / unit for decade in decades for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 4:
            break
    return ticks[:: math.ceil(len(ticks) / 9)] if ticks else [low]


def logarithmic(axis: Any) -> None:
    """Give the vertical axis a logarithmic scale with few round numbers, written out, and lines across."""
    from matplotlib.ticker import NullLocator

    axis.set_yscale("log")
    ticks = log_ticks(*axis.get_ylim())
    axis.set_yticks(ticks, [f"{tick:g}" if tick < 1e5 else format_ppl(tick) for tick in ticks])
    axis.yaxis.set_minor_locator(NullLocator())
    axis.tick_params(axis="y", length=0)
    in_one(axis, [((0, tick), (1, tick)) for tick in ticks], axis.get_yaxis_transform(), alpha=0.15, zorder=0.5)


def in_one(axis: Any, lines: Sequence[tuple[tuple[Number, Number], ...]], transform: Any, **style: Any) -> None:
    """Draw thin lines as one path, which keeps a page of many figures small."""
    points = [point for line in lines for point in (*line, (np.nan, np.nan))]
    if points:
        across, up = zip(*points, strict=True)
        style = {"color": INK, "linewidth": 0.6, "clip_on": False, "scalex": False, "scaley": False} | style
        axis.plot(across, up, transform=transform, **style)


def removed_across(axis: Any, most: Number) -> None:
    """Let the horizontal axis be the share of parameters that are removed, from 0 to the largest one."""
    right = max(most, 0.01) * 1.02
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if right / step <= 8)
    ticks = [step * place for place in range(int(right / step) + 1)]
    axis.set_xlim(0, right)
    axis.set_xticks(ticks, [f"{100 * tick:.0f} %" for tick in ticks])
    axis.tick_params(axis="x", length=0, pad=6)
    axis.set_xlabel("prunable parameters removed")
    in_one(axis, [((tick, 0), (tick, -0.014)) for tick in ticks], axis.get_xaxis_transform())


def spread(wanted: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Return the places nearest to the wanted ones (ascending) that are `gap` apart, within [low, high] if they fit.

    Nearest is least squares: less the gaps before them, the places are the isotonic regression of the wanted ones.

    >>> spread([10.0, 11.0, 50.0], gap=10.0, low=0.0, high=60.0)
    [5.5, 15.5, 50.0]
    """
    blocks: list[tuple[float, int]] = []  # mean and number of neighbours that touch
    for index, place in enumerate(wanted):
        mean, many = place - gap * index, 1
        while blocks and blocks[-1][0] > mean:
            before, number = blocks.pop()
            mean, many = (before * number + mean * many) / (number + many), number + many
        blocks.append((mean, many))
    last = high - gap * (len(wanted) - 1)
    means = [min(max(mean, low), max(last, low)) for mean, many in blocks for _ in range(many)]
    return [mean + gap * index for index, mean in enumerate(means)]


def heat(axis: Any, shares: np.ndarray) -> Any:
    """Draw shares as cells, a line a name and a column a layer; return the image."""
    image = axis.imshow(100 * shares, cmap="viridis", vmin=0, vmax=100, aspect="auto", interpolation="none")
    for height in range(1, len(shares)):
        axis.axhline(height - 0.5, color="white", linewidth=0.8)
    axis.set_xlabel("layer")
    axis.locator_params(axis="x", integer=True, min_n_ticks=1)
    axis.spines[:].set_visible(False)
    axis.tick_params(axis="y", length=0)
    return image


def heat_maps(
    axes: np.ndarray, panels: dict[str, np.ndarray], extent: tuple, scale: Any, most: float, label: str
) -> None:
    """Draw shares in [0, most] as heat maps, a panel an axis, row 0 on top, and one colour bar in percent below them.

    NaN is left blank; `extent` are the (rows, columns) that all panels stand for, however many cells they have.
    """
    rows, columns = extent
    images = []
    for axis, (name, values) in zip(axes, panels.items(), strict=True):
        axis.set_visible(True)
        axis.set_title(short_name(name))
        axis.spines[["top", "right"]].set_visible(True)
        images.append(
            axis.imshow(
                100 * values,
                cmap=scale.with_extremes(bad=(0, 0, 0, 0)),
                vmin=0,
                vmax=100 * most,
                extent=(-0.5, columns - 0.5, rows - 0.5, -0.5),
                aspect="auto",
                interpolation="none",  # the cells themselves; the browser scales them
            )
        )
        axis.locator_params(integer=True, min_n_ticks=1, nbins=4, axis="x")
        axis.locator_params(integer=True, min_n_ticks=1, axis="y")
        axis.tick_params(labelleft=axis.get_subplotspec().is_first_col())
    across = len({axis.get_subplotspec().colspan.start for axis in axes})
    bar = axes[0].figure.colorbar(images[0], ax=list(axes), location="bottom", aspect=20 * across, pad=0.02)
    bar.set_label(label)
    bar.outline.set_visible(False)
