"""What a comparison on a traced model finds: the held-out losses of masked models."""

import math
from collections.abc import Sequence
from pathlib import Path

from saap_jax.report.kinds.common import cost_section, coupling_section, files_of, reproduce_section
from saap_jax.report.page.blocks import Block, Bullets, Data, Detail, Part, Section, Table, text_table
from saap_jax.report.page.csv_text import without_nan
from saap_jax.report.page.formats import plural
from saap_jax.runs.reading import read_rows
from saap_jax.runs.records import Row, RunRecord
from saap_jax.runs.standing import DENSE, cuts_of

HEADER = ("estimator", "asked", "removed", "parameters", "held-out loss", "change", "± standard error", "kept units")
"""Columns; the change is that of the loss, beside the dense model's, and its error is over held-out examples, if
there are eight of them or more."""


def traced_sections(path: Path, run: RunRecord, detail: Detail) -> list[Section]:
    """Return the sections of a run, finished or not."""
    candidates = read_rows(path, run, "traced")
    said = traced_sentences(run) if "structures" in run else []
    blocks: list[Block] = [traced_table(run, candidates)] if candidates else []
    blocks += [traced_data(candidates)] if candidates and detail.downloads else []
    return [
        Section("summary", "Summary", [Bullets(said or ["Nothing is measured yet."])]),
        *([Section("comparison", "Held-out loss of masked models", blocks)] if blocks else []),
        *coupling_section(run, detail),
        *cost_section(run),
        reproduce_section(run),
    ]


def traced_files(run: RunRecord, candidates: Sequence[Row]) -> dict[str, str]:
    """Return the files of a run: its table as Markdown, as CSV in full precision, and the couplings drawn."""
    said = Part("Held-out loss of masked models", [Bullets(traced_sentences(run)), traced_table(run, candidates)])
    couplings = [block for section in coupling_section(run, Detail()) for block in section.blocks[1:]]
    return files_of("comparison", [said, traced_data(candidates), *couplings])


def traced_cells(candidates: Sequence[Row]) -> list[tuple[str, ...]]:
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


def traced_table(run: RunRecord, candidates: Sequence[Row], *, kept: bool = True) -> Table:
    """Return the dense model and all candidates; what each structure keeps is left out without `kept`."""
    columns = len(HEADER) if kept else len(HEADER) - 1
    title = f"{run.get('model', {}).get('name', 'model')}: held-out loss of masked models"
    return text_table(title, HEADER[:columns], [line[:columns] for line in traced_cells(candidates)])


def traced_sentences(run: RunRecord) -> list[str]:
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
        for best in cuts_of(run)
    ]
    return lines


def traced_data(candidates: Sequence[Row]) -> Data:
    """Return the candidates in full precision; NaN is an empty cell."""
    fields = ("candidate", "estimator", "ratio_asked", "ratio", "parameters", "loss", "change", "change_error")
    rows = [without_nan([row.get(field) for field in fields]) for row in candidates]
    return Data("CSV of all candidates, full precision", "comparison.csv", fields, rows)
