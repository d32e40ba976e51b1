"""The report of one run or of several: the page, the same as Markdown and CSV, and figures for papers."""

import collections
import os
from collections.abc import Sequence
from pathlib import Path

from saap_jax.errors import reading
from saap_jax.extras import need
from saap_jax.records import RunRecord
from saap_jax.report.blocks import Figure, Findings, Page, Section, Table, View, leaves, said, section
from saap_jax.report.figures import saved, undrawn
from saap_jax.report.formats import slug
from saap_jax.report.pages.common import closing_sections, model_name, suggestions_section
from saap_jax.report.pages.compare import compare_sections
from saap_jax.report.pages.several import overview_sections, results_table
from saap_jax.report.render import MARK, markdown_report, markdown_text, render_page, table_csv
from saap_jax.runs.directory import RunDirectory, read_candidates, read_run
from saap_jax.runtime.files import write_atomically
from saap_jax.wings import imported

FINDINGS: dict[str, str] = {
    "fidelity": "report.pages.fidelity:fidelity_findings",
    "frontier": "contrib.frontier.page:frontier_findings",
    "recover": "recovery.page:recover_findings",
    "score": "report.pages.score:score_findings",
    "sensitivity": "contrib.sensitivity.page:sensitivity_findings",
}
"""Kind of a run, as `run.json` says -> what makes `Findings` of its directory; `compare` has rows too."""

_MARKS = (b'<meta name="generator" content="saap_jax">', MARK.encode(), b"run,kind,model,")
"""What a file of ours has near its beginning."""

_IMAGES = ("svg", "png", "pdf")
"""Formats of a figure."""


def write_report(run_dir: str | os.PathLike[str], *, status: str = "") -> Path:
    """Write `report.html` into a run directory of any kind, finished or not, and return its path; see `read_view`."""
    path = Path(run_dir) / "report.html"
    write_atomically(path, render_report(run_dir, status=status).encode())
    return path


def render_report(run_dir: str | os.PathLike[str], *, status: str = "") -> str:
    """Make the page of one run, of its records alone; see `read_view`.

    Raises:
        FileNotFoundError, ValueError: the directory holds no readable run.
    """
    return render_page(report_page([read_view(run_dir, status=status)]))


def finding_files(run: RunDirectory) -> dict[str, str]:
    """Write what a run found as the files that its command leaves: figures, tables of all digits, and the words."""
    sections = _sections(run.record, imported(FINDINGS[run.record["kind"]])(run))
    figures = {}
    if not undrawn():
        drawn = [each for each in leaves(sections) if isinstance(each, Figure)]
        figures = {f"{each.name}.svg": saved(each).decode() for each in drawn}
    tables = [each for each in leaves(sections) if isinstance(each, Table) and each.file]
    rows = {f"{each.file}.csv": table_csv(each) for each in tables}
    return figures | rows | {f"{tables[0].file}.md": markdown_text(sections)}


def _sections(run: RunRecord, found: Findings) -> list[Section]:
    return [
        *section("Summary", *said(*found.summary)),
        *suggestions_section(run),
        *section(found.title, *found.blocks, about=found.about),
        *found.more,
    ]


def report_page(views: Sequence[View]) -> Page:
    """Make the page of one run, or of several side by side."""
    title = f"{len(views)} runs side by side"
    if len(views) == 1:
        title = views[0].name
    return Page(title, overview_sections(views), views)


def write_reports(
    runs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] = "",
    figures: str | os.PathLike[str] = "",
    *,
    overwrite: bool = False,
) -> list[Path]:
    """Write the report of run directories of any kind; return the paths of page, Markdown, CSV and figures.

    Markdown, and the rows of the comparisons as CSV, lie beside the page, under its name. A file that is no report of
    ours is never replaced unless `overwrite` says so; neither is a figure.

    Args:
        out: the page; empty: `report.html`, in the run's directory if there is one run, else in the working directory.
        figures: a directory for the figures as SVG, PNG and PDF; empty: none are drawn.

    Raises:
        FileNotFoundError, ValueError: no run given, a directory without a readable run, or a file in the way.
    """
    if not runs:
        raise ValueError("report: expected at least one run directory, got none; name one, such as runs/quickstart")
    if figures:
        need("figures", f"--figures {figures}")
    path = Path(out or "report.html")
    if not out and len(runs) == 1:
        path = Path(runs[0]) / "report.html"
    if path.suffix not in (".html", ".htm"):
        raise ValueError(f"--out: expected a file that ends in .html, got {path}")
    page = report_page(read_views(runs))
    files = {path: render_page(page).encode(), path.with_suffix(".md"): markdown_report(page).encode()}
    if any(view.rows for view in page.views):
        files[path.with_suffix(".csv")] = table_csv(results_table(page.views)).encode()
    if figures:
        files |= _figure_files(page, Path(figures))
    # all places are looked at before the first file is written
    for each in files:
        if each.parent.is_file():
            raise ValueError(f"{each.parent}: expected a directory, found a file; name another place")
        if each.exists() and not overwrite and not _is_ours(each):
            raise ValueError(f"{each} is no report of saap; pass --overwrite to replace it, or name another place")
    for each, content in files.items():
        each.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(each, content)
    return [*files]


def _figure_files(page: Page, directory: Path) -> dict[Path, bytes]:
    """Draw the figures of a page as files, those of a run under its name."""
    files: dict[Path, bytes] = {}
    groups = [("", page.overview), *((f"{slug(view.name)}-", view.sections) for view in page.views)]
    for prefix, sections in groups:
        for each in leaves(sections):
            if isinstance(each, Figure):
                for ending in _IMAGES:
                    files[directory / f"{prefix}{each.name}.{ending}"] = saved(each, ending)
    return files


def _is_ours(path: Path) -> bool:
    """Tell whether a file is a report of ours, or a figure, in which every format names its maker."""
    marks: Sequence[bytes] = _MARKS
    if path.suffix.removeprefix(".") in _IMAGES:
        marks = (b"saap_jax",)
    return path.is_file() and any(mark in path.read_bytes() for mark in marks)


def read_views(runs: Sequence[str | os.PathLike[str]]) -> list[View]:
    """Read the runs, under names that differ."""
    if len(runs) == 1:
        return [read_view(runs[0])]
    named = enumerate(zip(runs, names_of([Path(run) for run in runs]), strict=True), 1)
    return [read_view(run, id=f"run-{number}", name=name) for number, (run, name) in named]


def read_view(run_dir: str | os.PathLike[str], *, id: str = "", name: str = "", status: str = "") -> View:
    """Read a run of any kind.

    `name` is what the page calls it, by default as its record does. So is `status`: a page is written before the record
    says that the run is finished.

    Raises:
        FileNotFoundError, ValueError: the directory holds no readable run.
    """
    path = Path(run_dir)
    rows = []
    run = read_run(run_dir)
    # a run that has just begun has not recorded its kind; the second word of its command says it too
    command = run.get("command", "").split()
    kind = run.get("kind") or next(iter(command[1:]), "compare")
    with reading(path, f"a run of kind {kind}"):
        if kind == "compare":
            sections, rows = compare_sections(run, read_candidates(path))
        elif kind in FINDINGS:
            found = imported(FINDINGS[kind])(RunDirectory(path, run))
            sections = [*_sections(run, found), *closing_sections(run, found.known)]
        else:
            other = said(f"A run of kind {kind}, of which a report says no more than what follows.")
            sections = [Section("Summary", other), *suggestions_section(run), *closing_sections(run)]
        status = status or run.get("status", "unknown")
        name = name or run.get("name", path.name)
        return View(name, kind, status, model_name(run), sections, run, rows, id)


def names_of(paths: Sequence[Path]) -> list[str]:
    """Name each run: by its directory, with those above it where two would be the same.

    >>> names_of([Path("a/x"), Path("b/x"), Path("b/y"), Path("b/y")])
    ['a/x', 'b/x', 'b/y', 'b/y (2)']
    """
    parts = [path.resolve().parts for path in paths]
    different = len(set(parts))
    # the fewest directories from the end by which all that differ are told apart
    length = 1
    while len({part[-length:] for part in parts}) < different:
        length += 1
    names = ["/".join(part[-length:]) for part in parts]
    # names that are still alike are of one directory that was given several times
    times: collections.Counter[str] = collections.Counter()
    found = []
    for name in names:
        times[name] += 1
        if times[name] > 1:
            name = f"{name} ({times[name]})"
        found.append(name)
    return found
