"""The figures of docs/study.md; `study_defaults.py report` draws them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

OURS, PEER = "#d55e00", "#0072b2"
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7")
MARKERS = ("o", "s", "^", "D")


class Point(NamedTuple):
    """One arm of the screen."""

    name: str
    at_20: float
    at_50: float
    group: str


def draw_points(
    points: Sequence[Point], peers: Sequence[str], labels: tuple[str, str], title: str, path: Path, named: int = 5
) -> None:
    """Draw the arms within twice the best of 20 % and four times that of 50 %; number the best ones and the peers."""
    best = (min(point.at_20 for point in points), min(point.at_50 for point in points))
    near = [point for point in points if point.at_20 < 2 * best[0] and point.at_50 < 4 * best[1]]
    figure, axis = plt.subplots(figsize=(8, 6.6), layout="constrained")
    for index, group in enumerate(dict.fromkeys(point.group for point in points)):
        own = np.array([(point.at_20, point.at_50) for point in near if point.group == group]).reshape(-1, 2)
        style = {"marker": MARKERS[index], "color": COLOURS[index], "label": group}
        axis.scatter(*own.T, s=42, edgecolor="white", linewidth=0.5, **style)
    chosen = sorted(near, key=lambda point: point.at_20 * point.at_50)[:named]
    chosen += [point for point in near if point.name in peers]
    for number, point in enumerate(chosen, 1):
        place = {"xytext": (-9, -4) if number % 2 else (5, -4), "textcoords": "offset points", "fontsize": 9}
        axis.annotate(str(number), (point.at_20, point.at_50), weight="bold", **place)
    said = [f"{number}  {point.name}" for number, point in enumerate(chosen, 1)]
    said.append(f"{len(points) - len(near)} of {len(points)} arms lie outside")
    axis.set(xscale="log", yscale="log", xlabel=labels[0], ylabel=labels[1])
    axis.set_title(title, loc="left", fontsize=10)
    plain_ticks(axis.xaxis, (80, 90, 100, 110, 120, 140, 160))
    plain_ticks(axis.yaxis, (250, 300, 400, 500, 600, 800, 1000))
    axis.grid(alpha=0.2)
    axis.legend(frameon=False, loc="lower right")
    figure.supxlabel("\n".join(said), x=0.02, ha="left", fontsize=8)
    save(figure, path)


def draw_rows(
    panels: Mapping[str, Mapping[str, np.ndarray]], peers: set[str], title: str, path: Path, columns: int = 2
) -> None:
    """Draw the values of each arm and their mean, a row an arm; what is far off is written at the edge."""
    arms = list(next(iter(panels.values())))[::-1]
    rows = -(-len(panels) // columns)
    size = (9.5, 0.8 + rows * (0.7 + 0.36 * len(arms)))
    figure, axes = plt.subplots(rows, columns, figsize=size, sharey=True, layout="constrained", squeeze=False)
    for axis, (name, values) in zip(axes.flat, panels.items(), strict=False):
        edge = 4 * min(each.mean() for each in values.values())
        for row, arm in enumerate(arms):
            ppl, colour = values[arm], PEER if arm in peers else OURS
            if ppl.mean() > edge:
                said = f"{ppl.mean():,.0f} ± {ppl.std(ddof=1):,.0f} →"
                axis.text(0.98, row, said, transform=axis.get_yaxis_transform(), ha="right", va="center", fontsize=8)
                continue
            axis.plot(ppl, [row] * len(ppl), "s" if arm in peers else "o", color=colour, markersize=5, alpha=0.45)
            axis.plot(ppl.mean(), row, "|", color=colour, markersize=15, markeredgewidth=2)
            above = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center", "fontsize": 8}
            axis.annotate(f"{ppl.mean():.0f}", (ppl.mean(), row), **above)
        axis.set_title(name, loc="left", fontsize=9.5)
        axis.set_ylim(-0.6, len(arms) - 0.3)
        axis.set_yticks(range(len(arms)), arms, fontsize=8.5)
        axis.margins(x=0.12)
        axis.grid(axis="x", alpha=0.2)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    save(figure, path)


def plain_ticks(axis: Axis, ticks: tuple[int, ...]) -> None:
    """Label a logarithmic axis with these numbers, where they are in view."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(FixedLocator([tick for tick in ticks if low / 1.05 <= tick <= high * 1.05]))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def save(figure: Figure, path: Path) -> None:
    """Write an SVG that does not change unless the figures do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context({"svg.hashsalt": "saap_jax"}):
        figure.savefig(path, metadata={"Date": None})
    print(f"figure: {path.name}")
