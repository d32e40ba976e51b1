"""Blocks as people see them: printed, as text, and figures as matplotlib holds them."""

import io
from typing import Any

from saap_jax.cli import console as terminal
from saap_jax.cli.console import show_blocks
from saap_jax.report.blocks import Block, Figure, Table, View, leaves
from saap_jax.report.figures import painted


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
    return [table.cells(row) for row in table.rows]


def blocks_of(view: View, kind: type, section: str = "") -> list[Any]:
    """Return the blocks of a kind, of all sections or of the one of a title."""
    shown = [one for one in view.sections if section in ("", one.title)]
    return [block for block in leaves(shown) if isinstance(block, kind)]


def curves(figure: Figure) -> dict[str, list[tuple[float, float]]]:
    """Return the points of the lines of a figure by label; lines without one are left out."""
    return {
        line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for axis in painted(figure).axes
        for line in axis.get_lines()
        if not line.get_label().startswith("_")
    }
