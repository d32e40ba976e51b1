"""How figures are drawn: one style, SVG as matplotlib writes it, equal bytes for equal figures.

Axes and text have the colour `INK`, for which the page's style sheet puts the colour of its text, light or dark; lines
have colours that are seen on both. Matplotlib is imported when the first figure is drawn, since that takes long.
"""

import io
import math
import warnings
from typing import Any, NamedTuple

from saap_jax.evaluation.scales import format_ppl
from saap_jax.report.blocks import Figure

INK = "#010203"

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#c98a00", "#56b4e9", "#8c6bb1")
"""Told apart by the colour-blind, on white and on black: Okabe and Ito's with a darker orange, and violet for black."""

GREY = "#808080"
"""Baselines, in which nobody is interested but to see that the others are better."""

BASELINES = ("random", "magnitude")
"""Estimators that others are held against."""

_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
_MARKERS = "osD^vP*X"

STYLE = {
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "font.size": 8.5,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.handlelength": 3.2,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "pdf.fonttype": 42,  # text stays text, as in SVG
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.04,
    "savefig.dpi": 200,
    "svg.fonttype": "none",
    "svg.hashsalt": "saap_jax",
    "text.color": INK,
    "text.parse_math": False,  # names are no formulas
    "xtick.color": INK,
    "ytick.color": INK,
}


def inline(figure: Figure) -> str:
    """Return a figure as SVG within a page, on the page's own background."""
    svg = saved(figure, "svg", "none").decode()
    return svg[svg.index("<svg") :]


def saved(figure: Figure, ending: str = "svg", background: str = "white") -> bytes:
    """Return a figure as a file: svg, png or pdf."""
    import matplotlib.style

    about = {"svg": {"Creator": "saap_jax", "Date": None, "Title": figure.title}, "png": {"Software": "saap_jax"}}
    about["pdf"] = {"Creator": "saap_jax", "CreationDate": None, "Title": figure.title}
    file = io.BytesIO()
    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a letter that the font lacks is drawn in the page's
        painted(figure).savefig(file, format=ending, metadata=about[ending], facecolor=background)
    return file.getvalue()


def painted(figure: Figure) -> Any:
    """Return a matplotlib figure, not yet rendered."""
    import matplotlib.style
    from matplotlib.figure import Figure as Drawing

    with matplotlib.style.context(["default", STYLE]):
        drawing = Drawing(figsize=(figure.width, figure.height))
        figure.paint(drawing)
    return drawing


class LineStyle(NamedTuple):
    """How a line is drawn."""

    colour: str
    dash: Any
    marker: str

    @property
    def options(self) -> dict[str, Any]:
        """What matplotlib draws it by."""
        return {"color": self.colour, "linestyle": self.dash, "marker": self.marker}


def line_style(place: int, name: str = "") -> LineStyle:
    """Return how the line at a place is drawn, that of a baseline grey.

    >>> line_style(8), line_style(8, "random > uniform").colour == GREY
    (LineStyle(colour='#d55e00', dash=(0, (5, 2)), marker='o'), True)
    """
    row, colour = divmod(place, len(COLOURS))
    baseline = is_baseline(name)
    dash = _DASHES[(place if baseline else row) % len(_DASHES)]
    return LineStyle(GREY if baseline else COLOURS[colour], dash, _MARKERS[place % len(_MARKERS)])


def is_baseline(name: str) -> bool:
    """Return whether a variant is one of a baseline alone, whatever follows its scores.

    >>> [is_baseline(name) for name in ("random", "magnitude,global", "magnitude(order=1) > uniform", "random+wanda")]
    [True, True, True, False]
    """
    return name.partition(",")[0].partition(" > ")[0].partition("(")[0] in BASELINES


def log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers within [low, high], the coarsest set that has at least four, thinned to nine at most.

    >>> log_ticks(9.0, 20_000.0)
    [10.0, 100.0, 1000.0, 10000.0]
    >>> log_ticks(11.0, 90.0)
    [15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 80.0]
    """
    ticks: list[float] = []
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for steps in ((10,), (10, 20, 50), (10, 15, 20, 30, 40, 50, 60, 80), tuple(range(10, 100, 2)), range(100, 1000, 5)):
        unit = 10 if steps[0] == 10 else 100
        ticks = [float(f"{step}e{decade}") / unit for decade in decades for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 4:
            break
    return ticks[:: math.ceil(len(ticks) / 9)] if ticks else [low]


def logarithmic(axis: Any) -> None:
    """Give the vertical axis a logarithmic scale with few round numbers, written out, and lines across."""
    from matplotlib.ticker import NullLocator

    axis.set_yscale("log")
    ticks = log_ticks(*axis.get_ylim())
    axis.set_yticks(ticks, [f"{tick:g}" if tick < 1e5 else format_ppl(tick) for tick in ticks])
    axis.yaxis.set_minor_locator(NullLocator())
    axis.grid(axis="y", color=INK, alpha=0.15, linewidth=0.6)
