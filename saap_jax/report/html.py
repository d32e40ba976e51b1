"""The page: one HTML file, made of sections, that needs no network and no second file."""

import base64
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
import markupsafe

from saap_jax.report.blocks import Detail, Section, Table
from saap_jax.report.overview import overview_sections
from saap_jax.report.strips import LEVELS, breakable
from saap_jax.report.views import RunView, read_view
from saap_jax.runs.directory import write_atomically

HERE = Path(__file__).parent


class Page(NamedTuple):
    """What a page holds."""

    title: str
    overview: Sequence[Section]
    views: Sequence[RunView]
    folded: bool
    """Whether the runs are closed until somebody opens them."""

    @property
    def single(self) -> RunView | None:
        """The run, where the page is of one."""
        return self.views[0] if len(self.views) == 1 else None

    @property
    def contents(self) -> list[tuple[str, str]]:
        """Identifier and title of what the page leads to from its top."""
        found = [(one.id, one.title) for one in self.overview]
        for view in self.views:
            found += (
                [(view.anchor(one.id), one.title) for one in view.sections] if self.single else [(view.id, view.name)]
            )
        return found  # fmt: skip

    @property
    def sortable(self) -> bool:
        """True where the page needs its script."""
        sections = [*self.overview, *(one for view in self.views for one in view.sections)]
        return bool(self.overview) or any(isinstance(b, Table) and b.sortable for s in sections for b in s.blocks)


def write_report(run_dir: str | os.PathLike[str], *, status: str = "") -> Path:
    """Write `report.html` into a run directory of any kind, finished or not, and return its path; see `read_view`."""
    path = Path(run_dir) / "report.html"
    write_atomically(path, render_report(run_dir, status=status).encode())
    return path


def render_report(run_dir: str | os.PathLike[str], *, status: str = "") -> str:
    """Return the page of one run, made from its records alone; see `read_view`.

    Raises:
        FileNotFoundError, ValueError: the directory holds no readable run.
    """
    view = read_view(run_dir, Detail(), status=status)
    return render_page(Page(view.name, [], [view], folded=False))


def report_page(views: Sequence[RunView], *, folded: bool) -> Page:
    """Return the page of one run, or of several side by side."""
    title = views[0].name if len(views) == 1 else f"{len(views)} runs side by side"
    return Page(title, overview_sections(views), views, folded)


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
    from saap_jax.report.figures import colour_of

    steps = [f".h{level} {{ stroke: {colour_of(level / LEVELS)}; }}" for level in range(LEVELS + 1)]
    return (HERE / "style.css").read_text(encoding="utf-8").strip() + "\n" + "\n".join(steps)
