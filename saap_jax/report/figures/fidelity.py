"""The rank of each unit's score against its exact change: a panel an estimator, best first, colour is depth."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import rankdata

from saap_jax.report.page.blocks import Plot
from saap_jax.report.page.formats import short_name
from saap_jax.runtime.words import MINUS
from saap_jax.types import Scores

_COLUMNS, _HIGH, _HEAD, _LEGEND, _LETTERS = 5, 1.85, 0.45, 0.85, 26
"""Panels side by side; inches of a row, of a heading and of the legend; letters of a name that fit."""

_BUCKETS = 10
"""Colours that tell layers apart."""

Panels = Mapping[str, Sequence[tuple[str, str]]]
"""Structure -> its estimators, best first, each with its correlation in words."""


class _Axis(NamedTuple):
    """Maps a change to [0, 1]: linear near 0, logarithmic beyond `unit` on both sides."""

    unit: float
    low: float
    high: float

    def share(self, change: float) -> float:
        low, high, at = (math.asinh(value / self.unit) for value in (self.low, self.high, change))
        return (at - low) / (high - low)


def fidelity_plot(scores: Mapping[str, Scores], exact: Scores, panels: Panels) -> Plot | None:
    """Return the figure; each structure has rows of its own, with one axis of changes.

    Structures without a measured unit are left out; without any, None.
    """
    shown = {name: list(panels.get(name, ())) for name in exact if np.isfinite(_of(exact, name)).any()}
    shown = {name: each for name, each in shown.items() if each}
    if not shown:
        return None
    rows = {name: -(-len(each) // _COLUMNS) for name, each in shown.items()}
    said = ["Rank of each unit's score against the exact change of the loss, colour by layer. Spearman's correlation:"]
    said += [f"{name}: {', '.join(f'{e} {value}' for e, value in each)}." for name, each in shown.items()]

    def paint(figure: Any) -> None:
        heights = [_HEAD + _HIGH * rows[name] for name in shown]
        parts = figure.subfigures(len(shown) + 1, 1, height_ratios=[*heights, _LEGEND])
        depth = max(len(_of(exact, name)) for name in exact)
        for part, (name, each) in zip(parts, shown.items(), strict=False):
            _paint(part, name, each, rows[name], scores, _of(exact, name), depth)
        _legend(parts[-1], depth)

    height = sum(_HEAD + _HIGH * rows[name] for name in shown) + _LEGEND
    return Plot("fidelity", "Scores against exact changes", " ".join(said), paint, height)


def _of(values: Scores, structure: str) -> np.ndarray:
    return np.asarray(values[structure], np.float64)


def _paint(
    part: Any,
    name: str,
    panels: Sequence[tuple[str, str]],
    rows: int,
    scores: Mapping[str, Scores],
    exact: np.ndarray,
    depth: int,
) -> None:
    where = np.isfinite(exact)
    changes, layers = exact[where], np.nonzero(where)[0]
    axis = _axis(changes)
    part.suptitle(f"{name}, {len(changes)} units", x=0.01, ha="left", weight="bold")
    grid = part.subplots(rows, _COLUMNS, sharex=True, sharey=True, squeeze=False).ravel()
    colours = _colours()
    for panel, (estimator, value) in zip(grid, panels, strict=False):
        ranks = rankdata(np.asarray(scores[estimator][name])[where]) / (len(changes) + 1)
        heights = np.array([axis.share(change) for change in changes])
        buckets = np.minimum(layers / max(depth - 1, 1) * _BUCKETS, _BUCKETS - 1).astype(int)
        for bucket in np.unique(buckets).tolist():
            _dots(panel, ranks[buckets == bucket], heights[buckets == bucket], colours[bucket])
        panel.set_title(f"{short_name(estimator, _LETTERS)}\nρ {value}")
        panel.spines[["top", "right"]].set_visible(True)
        panel.set_xlim(0, 1)
        panel.set_ylim(0, 1)
        ticks = _ticks(axis)
        signs = ["0" if tick == 0 else f"{MINUS if tick < 0 else '+'}{abs(tick):g}" for tick in ticks]
        panel.set_yticks([axis.share(tick) for tick in ticks], signs)
        panel.set_xticks([])
        panel.grid(axis="y", alpha=0.15, linewidth=0.6)
        panel.axhline(axis.share(0.0), alpha=0.6, linewidth=0.6, color=panel.spines["left"].get_edgecolor())
    for panel in grid[len(panels) :]:
        panel.set_visible(False)


def _dots(panel: Any, across: np.ndarray, up: np.ndarray, colour: Any) -> None:
    """Draw units as round dots: one path a colour, which keeps thousands of them small."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    points = np.repeat(np.stack([across, up], axis=1), 2, axis=0)
    path = Path(points, [Path.MOVETO, Path.LINETO] * len(across))
    style = {"fill": False, "edgecolor": colour, "linewidth": 2.9, "capstyle": "round", "alpha": 0.9}
    panel.add_patch(PathPatch(path, clip_on=False, **style))


def _legend(part: Any, depth: int) -> None:
    """Say what the axes and the colours are, in lines short enough for a phone, which shows the left of the figure."""
    said = ("across: rank of the score, lowest to highest", "up: change of the loss without the unit, nats a token")
    for line, words in enumerate((*said, "ρ: Spearman's correlation and its interval")):
        part.text(0.01, 0.66 - 0.22 * line, words, va="center")
    axes = part.add_axes((0.07, 0.81, 0.15, 0.13))
    axes.imshow(np.arange(_BUCKETS)[None], cmap=_scale(), aspect="auto", interpolation="none")
    axes.set_axis_off()
    part.text(0.01, 0.88, "layer 0", va="center")
    part.text(0.23, 0.88, str(depth - 1), va="center")


def _scale() -> Any:
    """Return viridis without its ends, which vanish on dark or on white."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap([colormaps["viridis"](0.35 + 0.45 * bucket / (_BUCKETS - 1)) for bucket in range(_BUCKETS)])


def _colours() -> Sequence[Any]:
    return [_scale()(bucket) for bucket in range(_BUCKETS)]


def _axis(changes: np.ndarray) -> _Axis:
    """Choose an axis that holds 0 and all changes; linear below the power of ten that half of them exceed."""
    sizes = np.abs(changes[changes != 0])
    unit = 10.0 ** math.floor(math.log10(np.median(sizes))) if len(sizes) else 1.0
    low, high = min(float(np.min(changes)), 0.0), max(float(np.max(changes)), 0.0)
    margin = 0.05 * (math.asinh(high / unit) - math.asinh(low / unit)) or 0.1
    ends = (math.asinh(low / unit) - margin, math.asinh(high / unit) + margin)
    return _Axis(unit, *(unit * math.sinh(end) for end in ends))


def _ticks(axis: _Axis) -> list[float]:
    """Return 0 and powers of ten on both sides, from the unit on, thinned where they would crowd."""
    largest = max(-axis.low, axis.high, axis.unit)
    powers = range(round(math.log10(axis.unit)), math.floor(math.log10(largest)) + 1)
    sides = [sign * float(f"1e{power}") for power in powers for sign in (-1, 1)]
    ticks = [0.0]
    for tick in sorted((tick for tick in sides if axis.low <= tick <= axis.high), key=lambda tick: (-abs(tick), tick)):
        if all(abs(axis.share(tick) - axis.share(other)) >= 0.12 for other in ticks):
            ticks.append(tick)
    return sorted(ticks)
