"""What `saap report` runs."""

from collections.abc import Iterator
from pathlib import Path

from saap_jax.config.use import ReportConfig
from saap_jax.report.write import write_reports
from saap_jax.runtime.progress import Track, quiet


def report(config: ReportConfig, *, track: Track = quiet) -> list[Path]:
    """Write the page of some runs, its Markdown and CSV, and figures; return their paths."""
    return write_reports(config.runs, config.out, config.figures, overwrite=config.overwrite)


def shown(config: ReportConfig, written: list[Path]) -> Iterator[dict[str, str]]:
    """Show where all that lies."""
    drawn = [path for path in written if path.suffix in (".svg", ".png", ".pdf")]
    yield {"report": "   ".join(str(path) for path in written if path not in drawn)}
    if drawn:
        yield {"figures": f"{len(drawn)} files in {config.figures}"}
