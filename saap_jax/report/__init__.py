"""What is kept of a run and what people look at: records, tables, figures, the page. Reads run records, no model."""

from saap_jax.report.kinds.variants import csv_table, cut_rows, headline
from saap_jax.report.provenance import provenance
from saap_jax.report.records import RunDirectory, read_candidates, read_run
from saap_jax.report.rows import comparison_rows
from saap_jax.report.scalars import write_scalars
from saap_jax.report.write import render_report, write_report, write_reports

__all__ = [
    "RunDirectory",
    "comparison_rows",
    "csv_table",
    "cut_rows",
    "headline",
    "provenance",
    "read_candidates",
    "read_run",
    "render_report",
    "write_report",
    "write_reports",
    "write_scalars",
]
