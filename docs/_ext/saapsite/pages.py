"""Directives that write pages: `api` (names of the reference), `estimator`, `steps`, `recipes` and `gallery`."""

import dataclasses
import inspect
from collections.abc import Iterable
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from saapsite.public import resolve
from saapsite.registry import estimator_rows, linked, recipe_rows, step_rows
from saapsite.reports import REPORTS


class Api(SphinxDirective):
    """The reference of names, one a line, each by the directive of autodoc that suits it."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """Build the entries."""
        lines = [line for name in self.content for line in _autodoc(name.strip())]
        return self.parse_text_to_nodes("\n".join(["```{eval-rst}", *lines, "```"]), allow_section_headings=True)


class EstimatorFacts(SphinxDirective):
    """What the registry says of an estimator, as a list of fields."""

    required_arguments = 1
    option_spec = {"source": directives.unchanged, "deviation": directives.unchanged}  # noqa: RUF012

    def run(self) -> list[nodes.Node]:
        """Build the list."""
        rows = estimator_rows(self.arguments[0], self.options.get("source", ""), self.options.get("deviation", ""))
        return self.parse_text_to_nodes(_bullets(rows))


class StepFacts(SphinxDirective):
    """Every step of chains with its options, a section each."""

    def run(self) -> list[nodes.Node]:
        """Build the sections."""
        lines: list[str] = []
        for name, kind, rows in step_rows():
            said = [(f"`{label}`", linked(text)) for label, text in rows if "=" in label]
            about = [linked(text) for label, text in rows if "=" not in label]
            lines += [f"(step-{name})=", f"### `{name}` ({kind.kind})", "", *about, "", _bullets(said), ""]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


class RecipeFacts(SphinxDirective):
    """Every recipe, a section each."""

    def run(self) -> list[nodes.Node]:
        """Build the sections."""
        lines: list[str] = []
        for name, recipe, rows in recipe_rows():
            lines += [f"(recipe-{name})=", f"### `{name}`", "", f"{recipe.title}.", "", _bullets(rows), ""]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


class Gallery(SphinxDirective):
    """The reports of runs that notebooks made, linked where they are executed; `saapsite.reports` writes the pages."""

    def run(self) -> list[nodes.Node]:
        """Build the list."""
        entries = nodes.bullet_list()
        for each in REPORTS:
            link: nodes.Node = nodes.Text(each.title)
            if self.config.nb_execution_mode != "off":
                link = nodes.reference("", each.title, refuri=f"reports/{each.run}.html", internal=False)
            text = nodes.paragraph("", "", link, nodes.Text(f": {each.about}"))
            entries += nodes.list_item("", text)
        return [entries]


def _bullets(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"- **{label}**: {text}" for label, text in rows)


def _autodoc(name: str) -> list[str]:
    value = resolve(name)
    if inspect.isclass(value):
        fields = ["   :undoc-members:", "   :show-inheritance:"] if dataclasses.is_dataclass(value) else []
        return [f".. autoclass:: {name}", "   :members:", *fields, ""]
    return [f".. auto{'function' if inspect.isroutine(value) else 'data'}:: {name}", ""]


def setup(app: Sphinx) -> dict[str, Any]:
    """Add the directives."""
    app.add_directive("api", Api)
    app.add_directive("estimator", EstimatorFacts)
    app.add_directive("steps", StepFacts)
    app.add_directive("recipes", RecipeFacts)
    app.add_directive("gallery", Gallery)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
