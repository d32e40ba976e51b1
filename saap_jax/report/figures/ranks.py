"""The rank of each unit's score against its exact change: a panel an estimator, best first, colour is depth."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata

from saap_jax.report.blocks import Figure
from saap_jax.report.figures.draw import INK
from saap_jax.report.formats import short_name
from saap_jax.runtime.words import MINUS
from saap_jax.types import Scores

_COLUMNS, _HIGH, _HEAD = 4, 2.0, 0.5
"""Panels side by side; inches of a row and of a heading."""


def rank_figure(
    scores: Mapping[str, Scores], exact: Scores, panels: Mapping[str, Sequence[tuple[str, str]]]
) -> Figure | None:
    """Return the figure; each structure has rows of its own, with one axis of changes, None without a measured unit.

    Args:
        panels: structure -> its estimators, best first, each with its correlation in words.
    """
    changes = {name: np.asarray(exact[name], np.float64) for name in panels if panels[name] and name in exact}
    changes = {name: each for name, each in changes.items() if np.isfinite(each).any()}
    if not changes:
        return None
    rows = {name: -(-len(panels[name]) // _COLUMNS) for name in changes}
    heights = [_HEAD + _HIGH * rows[name] for name in changes]

    def paint(figure: Any) -> None:
        parts = figure.subfigures(len(changes), 1, height_ratios=heights, squeeze=False)[:, 0]
        for part, (name, each) in zip(parts, changes.items(), strict=True):
            _paint(
                part, name, panels[name], rows[name], {e: np.asarray(scores[e][name]) for e, _ in panels[name]}, each
            )
        said = "across: rank of the score, lowest to highest; up: change of the loss without the unit, nats a token;\n"
        parts[-1].text(0.06, 0.0, f"{said}ρ: Spearman's correlation; colour: layer, dark first", va="top")

    return Figure("fidelity", "Scores against exact changes", paint, sum(heights), 9.0)


def _paint(
    part: Any, name: str, panels: Sequence[tuple[str, str]], rows: int, scores: Mapping[str, np.ndarray],
    exact: np.ndarray,
) -> None:  # fmt: skip
    from matplotlib.ticker import NullLocator

    where = np.isfinite(exact)
    changes, layers = exact[where], np.nonzero(where)[0]
    sizes = np.abs(changes[changes != 0])
    unit = 10.0 ** math.floor(math.log10(np.median(sizes))) if len(sizes) else 1.0
    powers = [unit * 10.0**power for power in range(8) if unit * 10.0**power <= np.abs(changes).max(initial=0)]
    ticks = [tick for tick in (*[-each for each in powers[::-1]], 0, *powers) if changes.min() <= tick <= changes.max()]
    part.suptitle(f"{name}, {len(changes)} units", x=0.06, ha="left", weight="bold", y=0.995)
    grid = part.subplots(rows, _COLUMNS, sharex=True, sharey=True, squeeze=False).ravel()
    part.subplots_adjust(left=0.09, right=0.99, bottom=0.06, top=1 - 0.6 / (_HEAD + _HIGH * rows), hspace=0.35)
    for axis, (estimator, value) in zip(grid, panels, strict=False):
        ranks = rankdata(scores[estimator][where]) / (len(changes) + 1)
        axis.scatter(ranks, changes, s=6, c=layers, cmap="viridis", vmin=0, vmax=1.25 * max(len(exact) - 1, 1))
        axis.set_yscale("asinh", linear_width=unit)
        axis.axhline(0.0, alpha=0.6, linewidth=0.6, color=INK)
        axis.set_title(f"{short_name(estimator, 28)}\nρ {value}")
        axis.set_yticks(ticks, [f"{tick:g}".replace("-", MINUS) for tick in ticks], minor=False)
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set_xlim(0, 1)
        axis.set_xticks([])
    for axis in grid[len(panels) :]:
        axis.set_visible(False)
