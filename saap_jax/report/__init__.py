"""What people look at of runs: tables, figures, the page. Reads run records, no model."""

from saap_jax.report.write import finding_files, render_report, write_report, write_reports

__all__ = ["finding_files", "render_report", "write_report", "write_reports"]
