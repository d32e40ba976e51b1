"""A page as one HTML file: no network, no script, colours and widths by style sheet."""

from pathlib import Path

import jinja2
import markupsafe

from saap_jax.report.blocks import Figure, Page
from saap_jax.report.figures.draw import inline
from saap_jax.report.formats import slug

HERE = Path(__file__).parent

OPEN = 3
"""Runs up to this number are shown open and with their figures; of more of them the figures are of all together."""


def render_page(page: Page) -> str:
    """Return a page as HTML; all text that it holds is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.globals |= {"slug": slug, "svg": _svg, "kind": lambda block: type(block).__name__}
    view = {"page": page, "style": (HERE / "style.css").read_text("utf-8"), "opened": len(page.views) <= OPEN}
    return environment.get_template("page.html").render(view).lstrip() + "\n"


def _svg(figure: Figure) -> markupsafe.Markup:
    return markupsafe.Markup(inline(figure))
