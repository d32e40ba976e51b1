"""Coupled structures: parameters on the left, a box an axis; structures on the right; lines between them."""

from collections.abc import Sequence
from typing import Any

from saap_jax.report.figures.draw import on_screen
from saap_jax.report.figures.palette import COLOURS, GREY, PAPER
from saap_jax.report.page.blocks import Plot
from saap_jax.runs.records import CoupledStructure, Couplings, RunRecord
from saap_jax.trace.listing import coupling_record
from saap_jax.trace.trace import Traced

_COLOURS, _PINNED = COLOURS, GREY
"""Told apart by the colour-blind; then again from the first."""

_ROW, _BOX, _TOP, _MIDDLE = 18.0, 34.0, 30.0, 115.0
"""Points that a row is high and a box is wide, above the first row, and between boxes and structures."""

_SIZE, _LETTER = 8.5, 5.2
"""Points of the letters, and their width."""


def couplings_svg(traced: Traced) -> str:
    """Return the figure of a program as a file of its own."""
    return on_screen(coupling_plot(coupling_record(traced)), alone=True)


def coupling_files(run: RunRecord) -> dict[str, str]:
    """Return the figure as a file of a run, nothing where it recorded no couplings."""
    return {"couplings.svg": on_screen(coupling_plot(run["couplings"]), alone=True)} if "couplings" in run else {}


def coupling_plot(record: Couplings) -> Plot:
    """Return the figure of a record of couplings.

    A box is an axis of a parameter with its size; an axis that is fused of several structures has a line to each, one
    of no structure is dashed.
    """
    shapes, structures = record["parameters"], record["structures"]
    boxes = 12 + max(map(len, shapes), default=0) * _LETTER + 8
    left = boxes + max(map(len, shapes.values()), default=1) * _BOX
    right = left + _MIDDLE
    width = right + 18 + max((len(line) for each in structures for line in each["label"]), default=0) * _LETTER
    tall = max(len(shapes) * _ROW, len(structures) * 2 * _ROW)
    rows = {path: _TOP + tall * (place + 0.5) / max(len(shapes), 1) for place, path in enumerate(shapes)}
    places = _ordered(structures, rows, tall)
    colours = {each["name"]: _PINNED if each["pinned"] else _COLOURS[place % len(_COLOURS)]
               for place, each in enumerate(structures)}  # fmt: skip
    owners: dict[tuple[str, int], str] = {}
    for structure in structures[::-1]:
        for path, axis in structure["members"]:
            owners[path, axis] = structure["name"]

    def paint(figure: Any) -> None:
        figure.set_layout_engine(None)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(0, width)
        axes.set_ylim(_TOP + tall + 12, 0)
        axes.set_axis_off()
        text = {"family": "monospace", "fontsize": _SIZE, "va": "center_baseline"}
        for x, head in ((12, "parameter"), (boxes, "axes"), (right + 11, "coupled structure")):
            axes.text(x, 15, head, weight="bold", **text)
        for structure in structures:
            for path, axis in structure["members"]:
                start = (boxes + axis * _BOX + _BOX / 2, rows[path])
                _line(axes, start, (right, places[structure["name"]]), colours[structure["name"]])
        for path, shape in shapes.items():
            axes.text(12, rows[path], path, **text)
            for axis, size in enumerate(shape):
                owner = owners.get((path, axis))
                _box(axes, boxes + axis * _BOX, rows[path], colours[owner] if owner else _PINNED, whole=bool(owner))
                axes.text(boxes + axis * _BOX + (_BOX - 4) / 2, rows[path], str(size), ha="center", **text)
        for structure in structures:
            y, (first, second) = places[structure["name"]], structure["label"]
            axes.plot([right], [y], "o", color=colours[structure["name"]], markersize=6)
            axes.text(right + 11, y - 5, first, weight="bold", **text)
            axes.text(right + 11, y + 6, second, alpha=0.75, **text)

    said = "; ".join(f"{each['name']}: {', '.join(each['label'])}" for each in structures)
    title = f"Coupled structures: {len(structures)} of {len(shapes)} parameters"
    return Plot("couplings", title, f"{said}.", paint, (_TOP + tall + 12) / 72, max(width / 72, 5.1))


def _ordered(structures: Sequence[CoupledStructure], rows: dict[str, float], tall: float) -> dict[str, float]:
    """Return the height of each structure: near the mean of its members, none closer to another than two rows."""

    def mean(structure: CoupledStructure) -> float:
        heights = [rows[path] for path, _ in structure["members"]]
        return sum(heights) / len(heights)

    ordered = sorted(structures, key=lambda each: (mean(each), each["name"]))
    step = tall / max(len(ordered), 1)
    return {each["name"]: _TOP + step * (place + 0.5) for place, each in enumerate(ordered)}


def _line(axes: Any, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    bends = [(start[0] + (end[0] - start[0]) * 0.55, start[1]), (end[0] - 36, end[1])]
    path = Path([start, *bends, end], [Path.MOVETO, *[Path.CURVE4] * 3])
    opacity = 0.35 if colour == _PINNED else 0.75
    axes.add_patch(PathPatch(path, fill=False, edgecolor=colour, linewidth=1.1, alpha=opacity))


def _box(axes: Any, x: float, y: float, colour: str, *, whole: bool) -> None:
    from matplotlib.patches import Rectangle

    style = "solid" if whole else (0, (2.5, 1.5))
    corner = (x, y - 6.5)
    axes.add_patch(Rectangle(corner, _BOX - 4, 13, facecolor=PAPER, edgecolor=colour, linewidth=1.1, linestyle=style))
