"""Where `finish` looks for the page until it imports `write` itself."""

from saap_jax.report.write import write_report

__all__ = ["write_report"]
