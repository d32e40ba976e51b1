"""Colour, dash and marker of the lines of a figure, so that each can be told from every other.

No two of the first `DISTINCT` lines share colour and dash, whatever their markers; what has more lines draws them on
several figures, or says which it leaves out.
"""

import re
from typing import Any, NamedTuple

INK = "#010203"
"""Colour of axes and text; that of the page's text on a page."""

PAPER = "#fefefe"
"""Colour of what shows the background; that of the page on a page."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's, for figures on white; a page has seven of its own, light and dark, as `--c0` to `--c6`."""

GREY = "#777777"
"""Baselines, in which nobody is interested but to see that the others are better; `--c7` of a page."""

BASELINES = ("random", "magnitude")
"""Estimators that others are held against."""

DASHES = ((), (7.0, 3.0), (2.0, 2.5), (8.0, 2.5, 2.0, 2.5), (14.0, 3.5), (7.0, 2.5, 2.0, 2.5, 2.0, 2.5))
"""Lengths of stroke and gap in turns; nothing for an unbroken line."""

MARKERS = "osD^vP*X"
"""As matplotlib names them."""

DISTINCT = len(COLOURS) * len(DASHES)
"""Lines that differ in colour or dash."""


class LineStyle(NamedTuple):
    """How a line is drawn."""

    colour: int
    """Place in `COLOURS`; one further, grey."""
    dash: tuple[float, ...]
    marker: str

    def options(self, width: float = 1.3) -> dict[str, Any]:
        """Return how matplotlib draws the line; it counts dashes in widths of the line."""
        dash = (0.0, tuple(length / width / 2 for length in self.dash)) if self.dash else "solid"
        return {"color": (*COLOURS, GREY)[self.colour], "linestyle": dash, "linewidth": width, "marker": self.marker}


def is_baseline(name: str) -> bool:
    """Return whether a variant is one of a baseline alone, however it is searched.

    >>> [is_baseline(name) for name in ("random", "magnitude,global", "magnitude(order=1)", "random+wanda", "randomly")]
    [True, True, True, False, False]
    """
    return re.fullmatch(rf"({'|'.join(BASELINES)})(\([^)]*\))?(,.*)?", name) is not None


def line_style(place: int, name: str = "") -> LineStyle:
    """Return how the line at a place is drawn, that of a baseline grey.

    >>> line_style(0), line_style(8), line_style(8, "random").colour
    (LineStyle(colour=0, dash=(), marker='o'), LineStyle(colour=1, dash=(7.0, 3.0), marker='o'), 7)
    """
    row, colour = divmod(place, len(COLOURS))
    if is_baseline(name):
        row, colour = place, len(COLOURS)
    return LineStyle(colour, DASHES[row % len(DASHES)], MARKERS[place % len(MARKERS)])
