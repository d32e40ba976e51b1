"""Coupled structures: parameters on the left, a box an axis; structures on the right; lines between them."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from saap_jax.records import CoupledStructure, Couplings, RunRecord
from saap_jax.report.blocks import Figure
from saap_jax.report.figures import COLOURS, GREY, saved, undrawn

_ROW = 18.0
_BOX = 34.0
_TOP = 30.0
_MIDDLE = 115.0
_LETTER = 5.2
"""Points that a row is high and a box is wide, above the first row, between boxes and structures, and of a letter."""


def coupling_files(run: RunRecord) -> dict[str, str]:
    """Draw the figure as a file of a run, nothing where it recorded no couplings or nothing can be drawn."""
    if "couplings" not in run or undrawn():
        return {}
    return {"couplings.svg": saved(coupling_figure(run["couplings"])).decode()}


def coupling_figure(record: Couplings) -> Figure:
    """Draw a record of couplings.

    A box is an axis of a parameter with its size; an axis that is fused of several structures has a line to each, one
    of no structure is dashed.
    """
    shapes = record["parameters"]
    structures = record["structures"]
    # across: paths of parameters, their boxes, the lines between, and the labels of structures
    boxes = 12 + max(map(len, shapes), default=0) * _LETTER + 8
    right = boxes + max(map(len, shapes.values()), default=1) * _BOX + _MIDDLE
    labels = itertools.chain.from_iterable(each["label"] for each in structures)
    width = right + 18 + max(map(len, labels), default=0) * _LETTER

    # down: a row a parameter, two rows a structure; the larger side spreads the other one
    tall = max(len(shapes) * _ROW, len(structures) * 2 * _ROW)
    rows = {path: _TOP + tall * (place + 0.5) / max(len(shapes), 1) for place, path in enumerate(shapes)}
    places = _structure_rows(structures, rows, tall)

    colours = {each["name"]: COLOURS[place % len(COLOURS)] for place, each in enumerate(structures)}
    colours |= {each["name"]: GREY for each in structures if each["pinned"]}
    # of several structures on an axis, the first one colours its box
    owners: dict[tuple[str, int], str] = {}
    for each in structures:
        for path, axis in each["members"]:
            owners.setdefault((path, axis), each["name"])

    def paint(figure: Any) -> None:
        from matplotlib.patches import PathPatch, Rectangle
        from matplotlib.path import Path

        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(_TOP + tall + 12, 0))
        axes.set_axis_off()
        text = {"family": "monospace", "fontsize": 8.5, "va": "center_baseline"}
        for x, head in ((12, "parameter"), (boxes, "axes"), (right + 11, "coupled structure")):
            axes.text(x, 15, head, weight="bold", **text)
        for structure in structures:
            y = places[structure["name"]]
            colour = colours[structure["name"]]
            (first, second) = structure["label"]
            for path, axis in structure["members"]:
                x = boxes + axis * _BOX + _BOX / 2
                # a cubic curve, which leaves the box and reaches the structure horizontally
                bends = [(x, rows[path]), (x + (right - x) * 0.55, rows[path]), (right - 36, y), (right, y)]
                line = Path(bends, [Path.MOVETO, *[Path.CURVE4] * 3])
                opacity = 0.75
                if colour == GREY:
                    opacity = 0.35
                axes.add_patch(PathPatch(line, fill=False, edgecolor=colour, linewidth=1.1, alpha=opacity))
            axes.plot([right], [y], "o", color=colour, markersize=6)
            axes.text(right + 11, y - 5, first, weight="bold", **text)
            axes.text(right + 11, y + 6, second, alpha=0.75, **text)
        for path, shape in shapes.items():
            axes.text(12, rows[path], path, **text)
            for axis, size in enumerate(shape):
                owner = owners.get((path, axis))
                corner = (boxes + axis * _BOX, rows[path] - 6.5)
                edge: dict[str, Any] = {"edgecolor": GREY, "linestyle": (0, (2.5, 1.5))}
                if owner:
                    edge = {"edgecolor": colours[owner], "linestyle": "solid"}
                axes.add_patch(Rectangle(corner, _BOX - 4, 13, facecolor="none", linewidth=1.1, **edge))
                axes.text(corner[0] + (_BOX - 4) / 2, rows[path], str(size), ha="center", **text)

    title = f"Coupled structures: {len(structures)} of {len(shapes)} parameters"
    return Figure("couplings", title, paint, (_TOP + tall + 12) / 72, max(width / 72, 5.1))


def _structure_rows(structures: Sequence[CoupledStructure], rows: Mapping[str, float], tall: float) -> dict[str, float]:
    """Place the structures at equal distances, in the order of the mean row of their members, so that few lines
    cross."""
    means = {}
    for each in structures:
        members = [rows[path] for path, _ in each["members"]]
        means[each["name"]] = sum(members) / max(len(members), 1)
    order = sorted(means, key=lambda name: (means[name], name))
    step = tall / max(len(structures), 1)
    return {name: _TOP + step * (place + 0.5) for place, name in enumerate(order)}
