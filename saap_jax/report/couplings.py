"""Coupled structures: parameters on the left, a box an axis; structures on the right; lines between them."""

from typing import Any

from saap_jax.records import Couplings, RunRecord
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
    boxes = 12 + max(map(len, shapes), default=0) * _LETTER + 8
    right = boxes + max(map(len, shapes.values()), default=1) * _BOX + _MIDDLE
    width = right + 18 + max((len(line) for each in structures for line in each["label"]), default=0) * _LETTER
    tall = max(len(shapes) * _ROW, len(structures) * 2 * _ROW)
    rows = {path: _TOP + tall * (place + 0.5) / max(len(shapes), 1) for place, path in enumerate(shapes)}
    means = {each["name"]: sum(rows[path] for path, _ in each["members"]) / max(len(each["members"]), 1)
             for each in structures}  # fmt: skip
    step = tall / max(len(structures), 1)  # each near the mean of its members, none closer to another than two rows
    places = {name: _TOP + step * (place + 0.5)
              for place, name in enumerate(sorted(means, key=lambda name: (means[name], name)))}  # fmt: skip
    colours = {each["name"]: GREY if each["pinned"] else COLOURS[place % len(COLOURS)]
               for place, each in enumerate(structures)}  # fmt: skip
    owners = {(path, axis): each["name"] for each in structures[::-1] for path, axis in each["members"]}

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
                bends = [(x, rows[path]), (x + (right - x) * 0.55, rows[path]), (right - 36, y), (right, y)]
                line = Path(bends, [Path.MOVETO, *[Path.CURVE4] * 3])
                opacity = 0.35 if colour == GREY else 0.75
                axes.add_patch(PathPatch(line, fill=False, edgecolor=colour, linewidth=1.1, alpha=opacity))
            axes.plot([right], [y], "o", color=colour, markersize=6)
            axes.text(right + 11, y - 5, first, weight="bold", **text)
            axes.text(right + 11, y + 6, second, alpha=0.75, **text)
        for path, shape in shapes.items():
            axes.text(12, rows[path], path, **text)
            for axis, size in enumerate(shape):
                owner = owners.get((path, axis))
                corner = (boxes + axis * _BOX, rows[path] - 6.5)
                edge = {
                    "edgecolor": colours[owner] if owner else GREY,
                    "linestyle": "solid" if owner else (0, (2.5, 1.5)),
                }
                axes.add_patch(Rectangle(corner, _BOX - 4, 13, facecolor="none", linewidth=1.1, **edge))
                axes.text(corner[0] + (_BOX - 4) / 2, rows[path], str(size), ha="center", **text)

    title = f"Coupled structures: {len(structures)} of {len(shapes)} parameters"
    return Figure("couplings", title, paint, (_TOP + tall + 12) / 72, max(width / 72, 5.1))
