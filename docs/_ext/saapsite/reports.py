"""Reports of the runs that notebooks make, as static pages, and notebooks as files."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import nbformat
from docutils import nodes
from myst_nb.core.read import read_myst_markdown_notebook
from myst_parser.config.main import MdParserConfig
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

from saap_jax.report.write import render_report


@dataclasses.dataclass(frozen=True)
class Report:
    """The report of a run that the notebook leaves below `runs`."""

    run: str
    title: str
    about: str


NOTEBOOKS = ("notebook",)
"""Pages that are notebooks."""

REPORTS = (
    Report("compare", "Comparison", "three estimators at one ratio, the best one cut and measured"),
    Report("score", "Scores", "activation patterns of a calibration text, and how estimators agree"),
    Report("recover", "Recovery", "a pruned model before and after a few steps of training"),
)
INSTALLS = re.compile(r'^REPOSITORY = ""', re.M)
"""The line of a notebook's first cell that says where the package is installed from."""


def executes(app: Sphinx) -> bool:
    """Say whether notebooks are executed in this build."""
    return app.config.nb_execution_mode != "off"


def write_run_reports(app: Sphinx, exception: Exception | None) -> None:
    """Write the reports of the notebooks' runs to `reports` of the site.

    Raises:
        ExtensionError: a notebook has left none.
    """
    if exception or app.builder.name != "html" or not executes(app):
        return
    out = Path(app.outdir) / "reports"
    out.mkdir(exist_ok=True)
    for each in REPORTS:
        folder = Path(app.config.saapsite_runs) / "runs" / each.run
        if not (folder / "run.json").is_file():
            raise ExtensionError(
                f"gallery: expected the run {each.run!r} at {folder}, found none; remove "
                f"{app.config.nb_execution_cache_path}, so that notebooks run again"
            )
        (out / f"{each.run}.html").write_text(render_report(folder), "utf-8")


def write_notebooks(app: Sphinx, exception: Exception | None) -> None:
    """Write each notebook beside its page as a file that Jupyter opens, without outputs."""
    if exception or app.builder.name != "html":
        return
    for name in NOTEBOOKS:
        text = installing(app, Path(app.env.doc2path(name)).read_text("utf-8"))
        config = MdParserConfig()
        notebook = read_myst_markdown_notebook(text, config, add_source_map=False)
        nbformat.write(notebook, Path(app.outdir) / f"{name}.ipynb")


def installing(app: Sphinx, text: str) -> str:
    """Return the text of a notebook whose first cell knows where the package is installed from."""
    return INSTALLS.sub(f'REPOSITORY = "{app.config.saapsite_repository}"', text)


def read_notebook(app: Sphinx, name: str, source: list[str]) -> None:
    """Say in a notebook's source where the package comes from."""
    source[0] = installing(app, source[0])


def add_links(app: Sphinx, doctree: nodes.document, name: str) -> None:
    """Put a link to the notebook's file below its title, and to Colab where the repository is known."""
    if name not in NOTEBOOKS:
        return
    file = name.rpartition("/")[2]
    links: list[nodes.Node] = [nodes.reference("", "Download as .ipynb", refuri=f"{file}.ipynb", internal=False)]
    repository = app.config.saapsite_repository
    if repository:
        owner = repository.removesuffix("/").removesuffix(".git").partition("github.com/")[2]
        address = app.config.saapsite_colab.format(repository=owner, notebook=f"{name}.ipynb")
        links += [nodes.Text(" · "), nodes.reference("", "Open in Colab", refuri=address)]
    for section in doctree.findall(nodes.section):
        section.insert(1, nodes.paragraph("", "", *links, classes=["notebook-links"]))
        break


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect, and add the options."""
    app.add_config_value("saapsite_runs", "", "env", str)
    app.add_config_value("saapsite_repository", "", "env", str)
    app.add_config_value("saapsite_colab", "", "env", str)
    app.connect("source-read", read_notebook)
    app.connect("doctree-resolved", add_links)
    app.connect("build-finished", write_notebooks)
    app.connect("build-finished", write_run_reports)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
