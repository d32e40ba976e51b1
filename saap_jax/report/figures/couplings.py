"""A drawing of coupled structures: parameters on the left, a box an axis; structures on the right; lines between them.

A file of its own, to be looked at or put into a paper: colours are written out and serve light and dark paper alike.
"""

from collections.abc import Sequence
from html import escape

from saap_jax.discovery.trace import Traced, TracedStructure
from saap_jax.report.page.blocks import Number

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d00", "#7f5fb8")
"""Okabe and Ito's palette, told apart by the colour-blind, its yellow and black replaced; then again from the first."""

_PINNED = "#8c8c8c"
_ROW, _BOX, _TOP, _LETTER = 24.0, 46.0, 36.0, 7.2
_MIDDLE = 150.0


def couplings_drawing(traced: Traced, *, pinned: bool = True) -> str:
    """Return an SVG of the structures of a program; those that are pinned are grey, or left out with `pinned=False`.

    A box is an axis of a parameter with its size; an axis that is fused of several structures has a line to each.
    """
    structures = sorted(
        (each for each in traced.structures if pinned or each.prunable), key=lambda each: not each.prunable
    )
    paths = list(traced.shapes)
    widest = max((len(path) for path in paths), default=0) * _LETTER
    ranks = max((len(shape) for shape in traced.shapes.values()), default=1)
    boxes = 16 + widest + 10
    left = boxes + ranks * _BOX
    right = left + _MIDDLE
    labels = [_label(each) for each in structures]
    width = right + 24 + max((len(line) for pair in labels for line in pair), default=0) * _LETTER
    tall = max(len(paths) * _ROW, len(structures) * 2 * _ROW)
    rows = {path: _TOP + tall * (place + 0.5) / max(len(paths), 1) for place, path in enumerate(paths)}
    places = _ordered(structures, rows, tall)
    parts = [_text(16, 20, "parameter", weight=600), _text(boxes, 20, "axes", weight=600)]
    parts.append(_text(right + 14, 20, "coupled structure", weight=600))
    colours = {each.name: _colour(each, place) for place, each in enumerate(structures)}
    for structure in structures:
        for member in structure.members:
            x = boxes + member.axis * _BOX + _BOX / 2
            parts.append(_curve(x, rows[member.path], right, places[structure.name], colours[structure.name]))
    for path, shape in traced.shapes.items():
        parts.append(_text(16, rows[path] + 4, path))
        for axis, size in enumerate(shape):
            owners = [each for each in structures if any((m.path, m.axis) == (path, axis) for m in each.members)]
            colour = colours[owners[0].name] if owners else _PINNED
            parts.append(_box(boxes + axis * _BOX, rows[path], str(size), colour, whole=bool(owners)))
    for structure, (first, second) in zip(structures, labels, strict=True):
        y = places[structure.name]
        parts.append(f'<circle cx="{right:.1f}" cy="{y:.1f}" r="5" fill="{colours[structure.name]}"/>')
        parts += [_text(right + 14, y - 2, first, weight=600), _text(right + 14, y + 12, second, faint=True)]
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {_TOP + tall + 16:.0f}" '
        f'width="{width:.0f}" height="{_TOP + tall + 16:.0f}" font-family="ui-monospace, Menlo, Consolas, monospace" '
        f'font-size="12" role="img"><title>Coupled structures: {len(structures)} of {len(paths)} parameters</title>\n'
        f'<rect width="100%" height="100%" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


def _label(structure: TracedStructure) -> tuple[str, str]:
    times = f" × {structure.copies}" if structure.copies > 1 else ""
    first = f"{structure.units}{times} units, {structure.parameters_per_unit:,} parameters each"
    if structure.pinned:
        kinds = list(dict.fromkeys(str(reason).split(" (")[0].split(" at ")[0] for reason in structure.pinned))
        return first, f"pinned: {kinds[0]}" + (f", and {len(kinds) - 1} more" if len(kinds) > 1 else "")
    acts = f"{len(structure.gates)} gates" if len(structure.gates) != 1 else "one gate"
    return first, f"prunable, {acts}" + (", changes a norm's statistic" if structure.normalised else "")


def _ordered(structures: Sequence[TracedStructure], rows: dict[str, float], tall: float) -> dict[str, float]:
    """Return the height of each structure: near the mean of its members, none closer to another than two rows."""

    def mean(structure: TracedStructure) -> float:
        heights = [rows[member.path] for member in structure.members]
        return sum(heights) / len(heights)

    ordered = sorted(structures, key=lambda each: (mean(each), each.name))
    step = tall / max(len(ordered), 1)
    return {each.name: _TOP + step * (place + 0.5) for place, each in enumerate(ordered)}


def _colour(structure: TracedStructure, place: int) -> str:
    return _PINNED if structure.pinned else _COLOURS[place % len(_COLOURS)]


def _curve(x: Number, y: Number, right: Number, height: Number, colour: str) -> str:
    bend = x + (right - x) * 0.55
    path = f"M{x:.1f} {y:.1f}C{bend:.1f} {y:.1f} {right - 50:.1f} {height:.1f} {right:.1f} {height:.1f}"
    opacity = "0.35" if colour == _PINNED else "0.75"
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.5" stroke-opacity="{opacity}"/>'


def _box(x: Number, y: Number, text: str, colour: str, *, whole: bool) -> str:
    dash = "" if whole else ' stroke-dasharray="3 2"'
    rectangle = (
        f'<rect x="{x:.1f}" y="{y - 9:.1f}" width="{_BOX - 4:.1f}" height="18" rx="3" fill="#ffffff" '
        f'stroke="{colour}" stroke-width="1.5"{dash}/>'
    )
    return rectangle + _text(x + (_BOX - 4) / 2, y + 4, text, anchor="middle")


def _text(x: Number, y: Number, text: str, *, anchor: str = "start", weight: int = 400, faint: bool = False) -> str:
    fill = "#595959" if faint else "#1a1a1a"
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" fill="{fill}">'
        f"{escape(text)}</text>"
    )
