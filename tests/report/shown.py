"""Blocks as people see them: printed, as text, and figures as matplotlib holds them."""

import io
from typing import Any

from saap_jax import terminal
from saap_jax.report.page.blocks import Block, Table
from saap_jax.report.page.terminal import show_blocks


def printed(*blocks: Block, width: int = 100) -> str:
    """Return what a terminal of a width shows."""
    console, own = terminal.Terminal(width=width, file=io.StringIO(), markup=False, highlight=False), terminal.console
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
