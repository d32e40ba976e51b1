"""Colour, dash and marker of the lines of a figure, so that each can be told from every other.

No two of the first `DISTINCT` lines share colour and dash, whatever their markers; what has more lines draws them on
several figures, or says which it leaves out.
"""

from typing import NamedTuple

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's, for figures on white; a page has seven of its own, light and dark, as classes `k0` to `k6`."""

DASHES = ((), (7.0, 3.0), (2.0, 2.5), (8.0, 2.5, 2.0, 2.5), (14.0, 3.5), (7.0, 2.5, 2.0, 2.5, 2.0, 2.5))
"""Lengths of stroke and gap in turns; nothing for an unbroken line."""

MARKERS = 8
"""Markers that a kind of drawing has, in an order of its own."""

DISTINCT = len(COLOURS) * len(DASHES)
"""Lines that differ in colour or dash."""


class LineStyle(NamedTuple):
    """How a line is drawn."""

    colour: int
    """Place in `COLOURS`."""
    dash: tuple[float, ...]
    marker: int

    @property
    def paint(self) -> str:
        """The colour on white."""
        return COLOURS[self.colour]

    def lengths(self, width: float) -> tuple[float, tuple[float, ...]] | str:
        """Return the dash for matplotlib, which counts in widths of the line."""
        return (0.0, tuple(length / width / 2 for length in self.dash)) if self.dash else "solid"


def line_style(place: int) -> LineStyle:
    """Return how the line at a place is drawn.

    >>> line_style(0), line_style(8)
    (LineStyle(colour=0, dash=(), marker=0), LineStyle(colour=1, dash=(7.0, 3.0), marker=0))
    """
    row, colour = divmod(place, len(COLOURS))
    return LineStyle(colour, DASHES[row % len(DASHES)], place % MARKERS)
