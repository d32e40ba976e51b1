"""What a comparison on a traced model shows and keeps: its table, for the terminal, as Markdown and as CSV."""

import math
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from saap_jax.report.page.blocks import plural
from saap_jax.report.page.csv_text import csv_text
from saap_jax.report.page.markdown import escaped
from saap_jax.report.rows import DENSE, Record

HEADER = ("estimator", "asked", "removed", "parameters", "held-out loss", "change", "± standard error", "kept units")
"""Columns; the change is that of the loss, beside the dense model's, and its error is over held-out examples, if
there are eight of them or more."""


def traced_cells(candidates: Sequence[Record]) -> list[tuple[str, ...]]:
    """Return the dense model and all candidates as text, at each ratio the lowest loss first."""
    dense = [row for row in candidates if row["candidate"] == DENSE]
    others = [row for row in candidates if row["candidate"] != DENSE]
    lines = [(DENSE, "", "", f"{row['parameters']:,}", f"{row['loss']:.4g}", "", "", "") for row in dense]
    for row in sorted(others, key=lambda row: (row["ratio_asked"], row["loss"])):
        kept = ", ".join(f"{name} {units}" for name, units in row["kept"].items())
        shares = (f"{row['ratio_asked']:.1%}", f"{row['ratio']:.1%}", f"{row['parameters']:,}")
        error = "n/a" if math.isnan(row["change_error"]) else f"{row['change_error']:.2g}"
        changes = (f"{row['loss']:.4g}", f"{row['change']:+.3g}", error)
        lines.append((row["estimator"], *shares, *changes, kept))
    return lines


def rich_traced(run: Record, candidates: Sequence[Record]) -> Table:
    """Return the table for the terminal, without what each structure keeps."""
    table = Table(title=f"{run['model']['name']}: held-out loss of masked models", title_justify="left")
    for column in HEADER[:-1]:
        table.add_column(column, justify="left" if column == "estimator" else "right")
    for cells in traced_cells(candidates):
        table.add_row(*cells[:-1])
    return table


def traced_sentences(run: Record) -> list[str]:
    """Return what was pruned, and how the best of each ratio fared when it was cut."""
    structures, model = run["structures"], run["model"]
    copied = [each for each in structures if each["copied"]]
    held = f"{model['prunable_parameters']:,} of {model['parameters']:,} parameters"
    lines = [f"{plural(len(structures), 'structure')} with {held} can be pruned."]
    if copied:
        names = ", ".join(each["name"] for each in copied)
        lines.append(f"Each copy (layer, expert) of a structure keeps as many units as the others: {names}.")
    lines += [
        f"{best['candidate']} was cut: held-out loss {best['cut']:.6g}, masked {best['masked']:.6g}."
        for best in run.get("best", [])
    ]
    return lines


def traced_files(run: Record, candidates: Sequence[Record]) -> dict[str, str]:
    """Return the files of a run: its table as Markdown, and as CSV in full precision."""
    rows = [tuple(map(escaped, row)) for row in (HEADER, *traced_cells(candidates))]
    rows.insert(1, (":--", *["--:"] * (len(HEADER) - 2), ":--"))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    fields = ("candidate", "estimator", "ratio_asked", "ratio", "parameters", "loss", "change", "change_error")
    table_csv = csv_text(fields, ([_plain(row.get(field)) for field in fields] for row in candidates))
    said = "\n".join(f"- {escaped(line)}" for line in traced_sentences(run))
    words = f"# Held-out loss of masked models\n\n{said}\n\n{table}\n"
    return {"comparison.md": words, "comparison.csv": table_csv}


def _plain(value: Any) -> Any:
    """Return a value for CSV; NaN is an empty cell."""
    return None if value != value else value
