"""The figures of docs/arena.md: perplexity against the share removed, against time, and the ranks."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from saap_jax.evaluation.differences import paired_difference
from saap_jax.report.figures import logarithmic

matplotlib.rcParams["svg.hashsalt"] = "arena"  # the same figure is the same file

OURS = "default"
FARTHEST = 8
"""How many times the lowest perplexity is drawn; what is farther away is named."""

ON_CURVES = 8
"""Methods whose curves are drawn, the lowest at the largest ratio; more than these cannot be told apart by eye."""


class Line(NamedTuple):
    """A method at a ratio: losses of a text, `[seeds, windows]`, what went and what it took, means over the seeds."""

    name: str
    losses: dict[str, np.ndarray]
    heads: float
    seconds: float
    gib: float
    actual: float
    """Share of the prunable parameters that went."""

    def perplexities(self, text: str) -> np.ndarray:
        """Return the perplexity of each seed."""
        return np.exp(self.losses[text].mean(axis=1))

    def perplexity(self, text: str) -> float:
        """Return the perplexity of all seeds together."""
        return math.exp(self.losses[text].mean())


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


def draw_ratios(found: Mapping[float, Sequence[Line]], dense: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draw perplexity against the share removed on each text, with 95 % intervals of what it is above the dense model.

    Args:
        found: the methods at each ratio.
        dense: losses of the dense model by text, `[windows]`.
        path: where the figure goes.
    """
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    ratios = sorted(found)
    for axis, text in zip(figure.subplots(1, len(dense)), dense, strict=True):
        curves = {line.name: [line] for line in found[ratios[0]]}
        for ratio in ratios[1:]:
            for line in found[ratio]:
                curves.get(line.name, []).append(line)
        whole = [lines for lines in curves.values() if len(lines) == len(ratios)]
        drawn = sorted(whole, key=lambda lines: lines[-1].perplexity(text))[:ON_CURVES]
        base = math.exp(np.mean(dense[text]))
        ends = []
        for place, lines in enumerate(drawn):
            first = np.array(dense[text])
            against = [
                paired_difference(line.losses[text], np.tile(first, (len(line.losses[text]), 1))) for line in lines
            ]
            values = np.exp([first.mean() + each.value for each in against])
            low, high = (np.exp([first.mean() + getattr(each, end) for each in against]) for end in ("low", "high"))
            ours = lines[0].name == OURS
            style = {"color": "tab:red" if ours else f"{0.25 + 0.04 * place:.2f}", "linewidth": 2.2 if ours else 1.0}
            across = [100 * ratio + 0.4 * (place - len(drawn) / 2) for ratio in ratios]
            axis.plot([0, *across], [base, *values], zorder=3 if ours else 2, **style)
            axis.errorbar(across, values, [values - low, high - values], fmt="none", zorder=2, **style)
            ends.append((math.log10(values[-1]), lines[0].name, style["color"], ours))
        axis.plot(0, base, "o", color="black", markersize=4, zorder=4)
        axis.annotate("dense", (0, base), xytext=(2, -11), textcoords="offset points", fontsize=8)
        logarithmic(axis)
        axis.set_xlim(-2, 100 * ratios[-1] + 24)
        bottom, top = np.log10(axis.get_ylim())
        ends.sort()
        places = spread([end[0] for end in ends], gap=0.042 * (top - bottom), low=bottom, high=top)
        for (_, name, color, ours), place in zip(ends, places, strict=True):
            weight = "bold" if ours else "normal"
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
            at = (100 * ratios[-1] + 3, 10**place)
            axis.text(*at, name, color=color, fontsize=8, va="center", weight=weight, bbox=box)
        axis.set(title=text, xlabel="% of the prunable parameters removed", xticks=[0, *(100 * r for r in ratios)])
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.axes[0].set_ylabel("perplexity, windows of 128 tokens")
    figure.savefig(path, metadata={"Date": None})


def draw_seconds(found: Mapping[float, Sequence[Line]], path: Path) -> None:
    """Draw perplexity on WikiText-2 against the processor time of each method that was timed."""
    figure = Figure(figsize=(9, 3.6 * 1.2), layout="constrained")
    for axis, (ratio, lines) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        timed = [(line, line.perplexity("WikiText-2")) for line in lines if line.seconds > 0]
        near = [(line, perplexity) for line, perplexity in timed if perplexity <= FARTHEST * timed[0][1]]
        for line, perplexity in near:
            colour = "tab:blue" if line.name != OURS else "tab:red"
            axis.plot(line.seconds / 60, perplexity, "o", color=colour, markersize=4)
        axis.set(xlabel="processor minutes, all ratios", title=f"{ratio:.0%} removed")
        axis.margins(x=0.4, y=0.12)
        logarithmic(axis)
        low, high = np.log(axis.get_ylim())
        near.sort(key=lambda each: each[1])
        wanted = [float((np.log(perplexity) - low) / (high - low)) for _, perplexity in near]
        for (line, perplexity), height in zip(near, spread(wanted, gap=0.032, low=0.02, high=0.9), strict=True):
            place = (line.seconds / 60 + 0.6, np.exp(low + height * (high - low)))  # names apart, beside their points
            axis.annotate(line.name, (line.seconds / 60, perplexity), place, va="center", fontsize=6)
        if far := [line.name for line, perplexity in timed if perplexity > FARTHEST * timed[0][1]]:
            said = "above: " + ",\n".join(far)
            axis.text(0.98, 0.98, said, transform=axis.transAxes, ha="right", va="top", fontsize=6, color="0.4")
    figure.axes[0].set_ylabel("WikiText-2 ppl@128")
    figure.savefig(path, metadata={"Date": None})


def draw_ranks(found: Mapping[float, Sequence[Line]], path: Path) -> None:
    """Draw the rank of each method at each ratio, on WikiText-2."""
    figure = Figure(figsize=(6, 5), layout="constrained")
    axis = figure.subplots()
    orders = [[line.name for line in lines] for lines in found.values()]
    for name in (each for each in orders[0] if all(each in order for order in orders)):
        ranks = [order.index(name) + 1 for order in orders]
        axis.plot(range(len(found)), ranks, "o-", color="tab:blue" if name != OURS else "tab:red", linewidth=1)
        axis.annotate(name, (len(found) - 1, ranks[-1]), xytext=(6, -2), textcoords="offset points", fontsize=8)
    axis.set(xticks=range(len(found)), xticklabels=[f"{ratio:.0%}" for ratio in found], ylabel="rank on WikiText-2")
    axis.set(xlabel="of the prunable parameters removed", yticks=range(1, 1 + max(map(len, orders))))
    axis.set_xlim(-0.1, len(found) + 0.1)
    axis.invert_yaxis()
    figure.savefig(path, metadata={"Date": None})
