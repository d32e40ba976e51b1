"""Blocks as people see them: printed, as text, and figures as matplotlib holds them."""

import base64
import io
from pathlib import Path
from typing import Any

from saap_jax.cli import console as terminal
from saap_jax.cli.blocks import show_blocks
from saap_jax.report.kinds.views import read_view
from saap_jax.report.page.blocks import Block, Detail, Page, Table
from saap_jax.report.page.html import render_page
from saap_jax.report.page.markdown import markdown_report


def printed(*blocks: Block, width: int = 100) -> str:
    """Return what a terminal of a width shows."""
    console, own = terminal.Terminal(width=width, file=io.StringIO()), terminal.console
    terminal.console = console
    try:
        with console.capture() as caught:
            show_blocks(*blocks)
    finally:
        terminal.console = own
    return caught.get()


def cells(table: Table) -> list[list[str]]:
    """Return the texts of a table."""
    return [[cell.text for cell in line.cells] for line in table.lines]


def curves(axis: Any) -> dict[str, list[tuple[float, float]]]:
    """Return the points of the lines of an axis by label; lines without one are left out."""
    return {
        line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for line in axis.get_lines()
        if not line.get_label().startswith("_")
    }


def words(figure: Any) -> list[str]:
    """Return the texts of a figure."""
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_visible() and text.get_text()]


def missing_from_page(run: Path) -> list[str]:
    """Return the figures and tables that a command wrote into a run and that its page, made anew, does not show."""
    view = read_view(run, Detail())
    page = Page(view.name, [], [view], folded=False)
    html, markdown, missing = render_page(page), markdown_report(page), []
    for file in sorted(run.glob("*.*")):
        text = file.read_text() if file.suffix in (".svg", ".csv", ".md") and file.stem != "report" else ""
        if file.suffix == ".svg":
            missing += [] if text.partition("<title>")[2].strip() in html else [file.name]
        elif file.suffix == ".csv":
            missing += [] if base64.b64encode(text.encode()).decode() in html else [file.name]
        else:
            rows = [line for line in text.splitlines() if line.startswith("|")]
            missing += [file.name for row in rows if row not in markdown]
    return missing
