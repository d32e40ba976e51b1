"""What people look at of runs: tables, figures, the page. Reads run records, no model."""
