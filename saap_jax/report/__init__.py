"""What is kept of a run and what people look at: records, tables, figures, the page. Reads run records, no model."""

from saap_jax.report.html import render_report, write_report
from saap_jax.report.reports import write_reports
from saap_jax.report.tables import csv_table, cut_rows, headline, markdown_table, rich_cut_table, rich_table

__all__ = [
    "csv_table",
    "cut_rows",
    "headline",
    "markdown_table",
    "render_report",
    "rich_cut_table",
    "rich_table",
    "write_report",
    "write_reports",
]
