"""The page: one HTML file, made of sections, that needs no network and no second file."""

import base64
import hashlib
from pathlib import Path

import jinja2
import markupsafe

from saap_jax.report.page.blocks import Page
from saap_jax.report.page.strips import LEVELS, breakable

HERE = Path(__file__).parent


def render_page(page: Page) -> str:
    """Return a page as HTML; all text that it holds is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = lambda text: markupsafe.Markup(breakable(text))
    style, script = f"\n{style_sheet()}\n", f"\n{(HERE / 'page.js').read_text(encoding='utf-8').strip()}\n"
    view = {"page": page, "style": style, "script": script, "policy": policy(style, script if page.sortable else "")}
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
    from saap_jax.report.figures.ratio import colour_of

    steps = [f".h{level} {{ stroke: {colour_of(level / LEVELS)}; }}" for level in range(LEVELS + 1)]
    return (HERE / "style.css").read_text(encoding="utf-8").strip() + "\n" + "\n".join(steps)
