"""Scores side by side: how far estimators agree on the order of the units, and what the plots of scores share."""

import hashlib
import io
import math
import re
import warnings
from collections.abc import Callable
from html import escape
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.table import Table
from rich.text import Text
from scipy.stats import rankdata

from saap_jax.types import Scores

INK = "#010203"
"""Colour of axes and text in a plot; becomes `currentColor`, so that it follows the page, light or dark."""

WIDTH = 1000
"""Pixels that a plot is wide."""

_DPI = 100
"""Pixels of the page an inch of a plot."""

_STYLE = {
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.linewidth": 0.6,
    "axes.titlesize": 9.5,
    "figure.facecolor": "none",
    "font.size": 9,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "saap_jax",  # equal plots give equal bytes
    "text.color": INK,
    "text.parse_math": False,  # names are no formulas
    "xtick.color": INK,
    "xtick.labelsize": 8.5,
    "xtick.major.width": 0.6,
    "ytick.color": INK,
    "ytick.labelsize": 8.5,
    "ytick.major.width": 0.6,
}


def rank_agreement(scores: dict[str, Scores], structure: str) -> Float[np.ndarray, "estimators estimators"]:
    """Return Spearman's rank correlation between every two estimators over all units.

    Units count that all estimators score with a finite number. NaN where there is no correlation: fewer than two units,
    or all scores of an estimator equal.
    """
    columns = [np.asarray(by_structure[structure], np.float64).ravel() for by_structure in scores.values()]
    exists = np.all(np.isfinite(columns), axis=0)
    ranks = [rankdata(column[exists]) for column in columns]
    varies = [len(rank) > 0 and np.ptp(rank) > 0 for rank in ranks]
    result = np.eye(len(columns))
    for i in range(len(columns)):
        for j in range(i):
            defined = varies[i] and varies[j]
            result[i, j] = result[j, i] = np.corrcoef(ranks[i], ranks[j])[0, 1] if defined else np.nan
    return result


def rank_cells(scores: dict[str, Scores]) -> list[list[float]]:
    """Return rank correlations row by row: attention units below the diagonal, MLP channels above, NaN on it."""
    both = [rank_agreement(scores, structure) for structure in ("attention", "mlp")]
    cells = np.tril(both[0], -1) + np.triu(both[1], 1)
    np.fill_diagonal(cells, np.nan)
    return cells.tolist()


def rank_table(scores: dict[str, Scores], scenario: str | None = None) -> Table:
    """Return a table of rank correlations, attention units below the diagonal and MLP channels above it.

    A `scenario` is named in the title.
    """
    of = "" if scenario is None else f" in scenario {scenario}"
    table = Table(
        title=Text(f"Spearman rank correlation of scores{of}: attention units below the diagonal, MLP channels above"),
        title_justify="left",
    )
    table.add_column("estimator", overflow="fold")
    for number in range(1, len(scores) + 1):
        table.add_column(str(number), justify="right")
    for i, (name, values) in enumerate(zip(scores, rank_cells(scores), strict=True)):
        cells = ["·" if i == j else format_correlation(value) for j, value in enumerate(values)]
        table.add_row(Text(f"{i + 1} {name}"), *cells)
    return table


def format_correlation(value: float) -> str:
    """Return a correlation with two decimals.

    >>> [format_correlation(value) for value in (0.456, -0.456, -0.001, float("nan"))]
    ['0.46', '−0.46', '0.00', 'n/a']
    """
    if math.isnan(value):
        return "n/a"
    text = f"{value:.2f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def inline_svg(paint: Callable[[Any], None], *, height: float, title: str, description: str) -> str:
    """Return what `paint` draws on an empty matplotlib figure as SVG for a page, `WIDTH` pixels by `height` inches.

    Axes and text take the page's colour. Identifiers begin with a digest of title and drawing, so that a page may hold
    several, and equal drawings give equal bytes whatever the user's matplotlib settings are. Global settings are
    changed while it draws, and put back. Letters that matplotlib's font lacks are drawn in the page's font.
    """
    import matplotlib.style  # here: pipeline reads this module, and plotting takes long to import
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        figure = Figure(figsize=(WIDTH / _DPI, height), layout="constrained")
        paint(figure)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    root, _, body = file.getvalue().decode().partition("<svg")[2].partition(">")
    body = body.rpartition("</svg>")[0]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    digest = "s" + hashlib.sha256(f"{title}\n{body}".encode()).hexdigest()[:8]
    used = set(re.findall(r'(?:url\(|xlink:href=")#([^")]+)', body))
    body = re.sub(r"<[^<>]+>", lambda match: _page_tag(match[0], digest, used), body)
    box = re.search(r'viewBox="[^"]*"', root)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {box[0] if box else ""} width="{WIDTH}" height="{_DPI * height:.0f}" '
        f'role="img" aria-label="{escape(title)}" fill="currentColor" '
        'style="stroke-linejoin: round; stroke-linecap: butt">'
    )
    return f"{head}\n<title>{escape(title)}</title>\n<desc>{escape(description)}</desc>\n{body.strip()}\n</svg>"


def heat_maps(
    axes: np.ndarray, panels: dict[str, np.ndarray], extent: tuple, scale: Any, most: float, label: str
) -> None:
    """Draw shares in [0, most] as heat maps, a panel an axis, row 0 on top, and one colour bar in percent below them.

    NaN is left blank; `extent` are the (rows, columns) that all panels stand for, however many cells they have.
    """
    rows, columns = extent
    images = []
    for axis, (name, values) in zip(axes, panels.items(), strict=True):
        axis.set_visible(True)
        axis.set_title(short_name(name))
        images.append(
            axis.imshow(
                100 * values,
                cmap=scale.with_extremes(bad=(0, 0, 0, 0)),
                vmin=0,
                vmax=100 * most,
                extent=(-0.5, columns - 0.5, rows - 0.5, -0.5),
                aspect="auto",
                interpolation="none",  # the cells themselves; the browser scales them
            )
        )
        axis.locator_params(integer=True, min_n_ticks=1, nbins=4, axis="x")
        axis.locator_params(integer=True, min_n_ticks=1, axis="y")
        axis.tick_params(labelleft=axis.get_subplotspec().is_first_col())
    across = len({axis.get_subplotspec().colspan.start for axis in axes})
    bar = axes[0].figure.colorbar(images[0], ax=list(axes), location="bottom", aspect=20 * across, pad=0.02)
    bar.set_label(label)
    bar.outline.set_visible(False)


def short_name(name: str, letters: int = 26) -> str:
    """Return a name of at most so many letters; both ends are shown, since hyper-parameters come last.

    >>> short_name("taylor_element(reduction='max')", 16)
    "taylor_…n='max')"
    """
    half = letters // 2
    return name if len(name) <= letters else f"{name[: half - 1]}…{name[-half:]}"


def _page_tag(tag: str, digest: str, used: set[str]) -> str:
    """Return a tag as a page wants it: the page's colour and font, and only identifiers that are used, made unique."""
    tag = tag.replace("xlink:href", "href").replace(INK, "currentColor")
    if tag.startswith("<path"):
        tag = re.sub(r"(\.\d\d)\d+", r"\1", tag)  # a hundredth of a point is fine enough
    tag = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", tag)
    tag = re.sub(r' id="([^"]*)"', lambda match: f' id="{digest}-{match[1]}"' if match[1] in used else "", tag)
    return re.sub(r'(url\(|href=")#', rf"\1#{digest}-", tag)
