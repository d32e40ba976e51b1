"""A figure is drawn once, and rendered in one of two styles: for the screen, inline in a page, and for papers.

On the screen axes and text take the page's colour and lines its palette, light or dark; text stays text. On paper
letters are drawn as they are set, on white. Equal figures give equal bytes whatever the user's matplotlib settings are.
Matplotlib is imported when the first figure is drawn, since that takes long.
"""

import hashlib
import io
import re
import warnings
from contextlib import AbstractContextManager, ExitStack
from html import escape
from typing import Any

import numpy as np

from saap_jax.report.figures.palette import COLOURS, GREY, INK, PAPER
from saap_jax.report.page.blocks import Plot

DPI = 100
"""Pixels of the page an inch of a figure."""

WIDTH = 6.75
"""Inches of a figure on paper: the width of a page's text, or of two columns."""

COLUMN = 3.25
"""Inches of a narrow figure on paper: the width of a column."""

_WIDE = 5.0
"""Inches from which on a figure is no narrow one."""

_BOTH = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "grid.color": INK,
    "legend.frameon": False,
    "legend.handlelength": 3.0,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.5,
    "lines.solid_capstyle": "butt",
    "path.simplify": False,  # dots are lines of no length
    "svg.hashsalt": "saap_jax",
    "text.color": INK,
    "text.parse_math": False,  # names are no formulas
    "xtick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.color": INK,
    "ytick.major.width": 0.6,
}

SCREEN = _BOTH | {
    "axes.facecolor": "none",
    "axes.labelsize": 9,
    "axes.titlesize": 9.5,
    "figure.facecolor": "none",
    "font.size": 9,
    "legend.fontsize": 8.5,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
}

ON_PAPER = _BOTH | {
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "font.size": 8,
    "legend.fontsize": 7.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "pdf.fonttype": 42,  # text stays text
    "savefig.dpi": 300,
    "svg.fonttype": "path",  # looks alike wherever it is placed
}

_ABOUT = {
    "svg": {"Creator": "saap_jax", "Date": None},
    "png": {"Software": "saap_jax"},
    "pdf": {"Creator": "saap_jax", "CreationDate": None},
}
"""Metadata of each kind of file."""


def painted(plot: Plot, style: dict[str, Any] = SCREEN) -> Any:
    """Return a plot as a matplotlib figure in a style, laid out."""
    width, height = plot.width, plot.height
    if style is ON_PAPER:
        width = WIDTH if plot.width > _WIDE else COLUMN
        height = plot.paper or plot.height * width / plot.width
    with _styled(style):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, height), layout="constrained")
        plot.paint(figure)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once
    return figure


def on_paper(plot: Plot) -> dict[str, bytes]:
    """Return a plot as files, by the ending of their name."""
    figure = painted(plot, ON_PAPER)
    return {ending: saved(figure, ending) for ending in _ABOUT}


def saved(figure: Any, ending: str, style: dict[str, Any] = ON_PAPER) -> bytes:
    """Return a figure as a file."""
    file = io.BytesIO()
    with _styled(style):
        figure.savefig(file, format=ending, metadata=_ABOUT[ending])
    return file.getvalue()


def on_screen(plot: Plot, *, alone: bool = False) -> str:
    """Return a plot as SVG for a page; `alone`, for a file of its own: dark on white.

    Identifiers begin with a digest of title and drawing, so that a page may hold several; matplotlib's own, which
    follow the last digit of a layout, never the same twice, are counted. A narrow figure is as wide as its place on the
    page, others have a width in pixels. Letters that matplotlib's font lacks are drawn in the page's.
    """
    root, _, body = saved(painted(plot), "svg", SCREEN).decode().partition("<svg")[2].partition(">")
    body = body.rpartition("</svg>")[0]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    used = dict.fromkeys(re.findall(r'(?:url\(|xlink:href=")#([^")]+)', body))
    drawn = re.sub(r' id="[^"]*"|(?:url\(|xlink:href=")#[^")]+', "", body)
    digest = "s" + hashlib.sha256(f"{plot.title}\n{drawn}".encode()).hexdigest()[:8]
    names = {name: f"{digest}-{place}" for place, name in enumerate(used)}
    body = re.sub(r"<[^<>]+>", lambda match: _page_tag(match[0], names), body)
    body = re.sub(r"(<defs>\s*<path [^>]*?) style=\"[^\"]*\"", r"\1", body)  # where it is used, it has the same
    body = _CIRCLE.sub(r'<circle\1r="\2"/>', body)
    body = _without_groups(re.sub(r'<path d="[^"]*" style="fill:none"/>|<defs>\s*</defs>', "", body))
    box = re.search(r'viewBox="[^"]*"', root)
    size = f'width="{DPI * plot.width:.0f}" height="{DPI * plot.height:.0f}"' if plot.width > _WIDE else 'class="plot"'
    paper = "background: white; color: black; font-family: system-ui, sans-serif; " if alone else ""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {box[0] if box else ""} {size} role="img" '
        f'aria-label="{escape(plot.title)}" fill="currentColor" font-size="8.5" '
        f'style="{paper}stroke-linejoin: round; stroke-linecap: butt">'
    )
    said = f"<title>{escape(plot.title)}</title>\n<desc>{escape(plot.description)}</desc>"
    return f"{head}\n{said}\n{body.strip()}\n</svg>" + ("\n" if alone else "")


def marker_path(marker: str, size: float = 9.0) -> str:
    """Return a marker of matplotlib as the path of an SVG about the origin, for keys outside of figures."""
    from matplotlib.markers import MarkerStyle

    style = MarkerStyle(marker)
    path = style.get_path().transformed(style.get_transform()).transformed(_flipped(size))
    codes = [] if path.codes is None else np.asarray(path.codes).tolist()
    if codes[1:-1] == [path.CURVE4] * 24:  # a circle
        radius = f"{size / 2:g}"
        return f"M-{radius} 0a{radius} {radius} 0 1 0 {size:g} 0a{radius} {radius} 0 1 0-{size:g} 0z"
    letters = {1: "M", 2: "L", 3: "Q", 4: "C"}
    parts = []
    for points, code in path.iter_segments(simplify=False):
        numbers = " ".join(f"{number:.2f}".rstrip("0").rstrip(".") for number in points)
        parts.append(f"{letters[int(code)]}{numbers}" if int(code) in letters else "Z")
    return "".join(parts)


def _flipped(size: float) -> Any:
    from matplotlib.transforms import Affine2D

    return Affine2D().scale(size, -size)


def _styled(style: dict[str, Any]) -> AbstractContextManager:
    """Return matplotlib's settings while a figure is drawn: its defaults and a style; no warning of letters."""
    import matplotlib.style

    stack = ExitStack()
    stack.enter_context(matplotlib.style.context(["default", style]))
    stack.enter_context(warnings.catch_warnings())
    warnings.filterwarnings("ignore", "Glyph")
    return stack


def _page_tag(tag: str, names: dict[str, str]) -> str:
    """Return a tag as a page wants it: its colours and font, no spaces, and only identifiers that are used, renamed."""
    tag = re.sub(r"([:;]) ", r"\1", " ".join(tag.split()).replace("xlink:href", "href"))
    tag = re.sub(r"#[0-9a-f]{6}\b", lambda match: _PAINTS.get(match[0], match[0]), tag)
    if tag.startswith(("<path", "<use", "<text")):
        tag = re.sub(r' (d|x|y)="[^"]*"', lambda match: re.sub(r"(\.\d)\d+", r"\1", match[0]), tag)  # to 0.1 points
        tag = re.sub(r" ?([MLCQz]) ?", r"\1", tag) if tag.startswith("<path") else tag
        tag = re.sub(r' transform="rotate\(-0 [^"]*"|;stroke-linejoin:miter|;stroke-dashoffset:0', "", tag)
    if tag.startswith(("<text", "<use")):
        tag = re.sub(r"font-family:'DejaVu Sans'[^;\"]*;|fill:currentColor;?|font-size:8.5px;", "", tag)
    tag = re.sub(r' id="([^"]*)"', lambda match: f' id="{names[match[1]]}"' if match[1] in names else "", tag)
    return re.sub(r'(url\(|href=")#([^")]+)', lambda match: f"{match[1]}#{names[match[2]]}", tag)


def _without_groups(body: str) -> str:
    """Return a drawing without the groups that say nothing, one element a line."""
    kept, groups = [], []
    for part in re.split(r"(<g\b[^>]*>|</g>)", body):
        if part.startswith("<g") and part.endswith("/>"):
            continue
        if part.startswith("<g"):
            groups.append(part != "<g>")
        if part != "<g>" and (part != "</g>" or groups.pop()):
            kept.append(part)
    return re.sub(r"\s*\n\s*", "\n", "".join(kept))


_CIRCLE = re.compile(r'<path( id="[^"]*" )d="M0 ([\d.]+)(?:C[^CZz"]*){8}z ?"/>')
"""A round marker, as matplotlib draws it."""

_PAINTS = {colour: f"var(--c{place},{colour})" for place, colour in enumerate((*COLOURS, GREY))}
_PAINTS |= {INK: "currentColor", PAPER: f"var(--page,{PAPER})"}
"""Colours of a plot -> what they are on a page; in a file of its own, what they are."""
