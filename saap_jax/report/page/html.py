"""Blocks as a page: one HTML file that needs no network and no second file."""

import base64
import hashlib
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import jinja2
import markupsafe

from saap_jax.report.figures.draw import marker_path, on_screen
from saap_jax.report.figures.palette import line_style
from saap_jax.report.page.blocks import Page, Plot
from saap_jax.report.page.csv_text import data_address
from saap_jax.report.page.strips import LEVELS, breakable, chart_html, scale_html

HERE = Path(__file__).parent

_VIRIDIS = ("#440154", "#482475", "#414487", "#355f8d", "#2a788e", "#21918c",
            "#22a884", "#44bf70", "#7ad151", "#bddf26", "#fde725")  # fmt: skip
"""At 0, 0.1, ..., 1."""


def render_page(page: Page) -> str:
    """Return a page as HTML; all text that it holds is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    renderers = (breakable, chart_html, data_address, figure_html, legend_html, scale_html)
    environment.globals |= {each.__name__: _safe(each) for each in renderers}
    style, script = f"\n{style_sheet()}\n", f"\n{(HERE / 'page.js').read_text(encoding='utf-8').strip()}\n"
    view = {"page": page, "style": style, "script": script, "policy": policy(style, script if page.scripted else "")}
    return environment.get_template("report.html").render(view).lstrip() + "\n"


def policy(style: str, script: str) -> str:
    """Return what a page may do: show its own style sheet, run its own script if it has one, nothing that has got in.

    Attributes may have styles: colours of cells and drawings. `'unsafe-inline'` there lets no script run.
    """
    own = [f"'sha256-{base64.b64encode(hashlib.sha256(each.encode()).digest()).decode()}'" for each in (style, script)]
    scripts = own[1] if script else "'none'"
    rules = f"style-src-elem {own[0]}; style-src-attr 'unsafe-inline'; script-src {scripts}; img-src data:"
    return markupsafe.Markup(f"default-src 'none'; {rules}")


def style_sheet() -> str:
    """Return the style sheet, the colours of the cells of heat included."""
    steps = [f".h{level} {{ stroke: {colour_of(level / LEVELS)}; }}" for level in range(LEVELS + 1)]
    return (HERE / "style.css").read_text(encoding="utf-8").strip() + "\n" + "\n".join(steps)


def figure_html(plot: Plot) -> str:
    """Return a figure; a wide one is scrolled where the page is narrower."""
    drawing = on_screen(plot)
    if 'class="plot"' in drawing[:300]:
        return drawing
    return f'<div class="scroll wide" role="region" aria-label="{escape(plot.title)}" tabindex="0">{drawing}</div>'


def legend_html(names: Sequence[str]) -> str:
    """Return the names of lines as a list, each with its number, line and marker."""
    lines = []
    for place, name in enumerate(names):
        style = line_style(place, name)
        dash = " ".join(f"{length:g}" for length in style.dash)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        line = f'<path d="M-27 0H27" class="curve"{dashed}/>'
        mark = f'<path class="mark" d="{marker_path(style.marker)}"/>'
        key = f'<svg class="k{style.colour}" width="54" height="14" viewBox="-27 -7 54 14" aria-hidden="true">'
        lines.append(f"<li>{key}{line}{mark}</svg> {breakable(name)}</li>")
    return f'<ol class="legend">{"".join(lines)}</ol>'


def colour_of(share: float) -> str:
    """Return the colour of a share in [0, 1] on the viridis scale, dark = 0.

    >>> colour_of(0.0), colour_of(1.0)
    ('#440154', '#fde725')
    """
    position = min(max(share, 0.0), 1.0) * (len(_VIRIDIS) - 1)
    index = min(int(position), len(_VIRIDIS) - 2)
    below, above = (tuple(bytes.fromhex(colour[1:])) for colour in _VIRIDIS[index : index + 2])
    mixed = (round(a + (b - a) * (position - index)) for a, b in zip(below, above, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _safe(render: Callable[..., str]) -> Callable[..., markupsafe.Markup]:
    return lambda *each: markupsafe.Markup(render(*each))
