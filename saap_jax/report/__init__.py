"""What people look at of runs: tables, figures, the page. Reads run records, no model."""

from saap_jax.report.kinds.variants import csv_table, cut_rows, headline
from saap_jax.report.write import render_report, write_report, write_reports

__all__ = [
    "csv_table",
    "cut_rows",
    "headline",
    "render_report",
    "write_report",
    "write_reports",
]
