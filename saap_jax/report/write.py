"""The report of one run or of several: the page, the same as Markdown and CSV, and figures for papers."""

import os
from collections.abc import Sequence
from pathlib import Path

from saap_jax.report.figures.paper import paper_figures
from saap_jax.report.kinds.overview import CSV_HEADER, overview_sections, report_data
from saap_jax.report.kinds.views import read_view
from saap_jax.report.page.blocks import Detail, Page, RunView
from saap_jax.report.page.csv_text import data_text
from saap_jax.report.page.html import render_page
from saap_jax.report.page.markdown import MARK, markdown_report
from saap_jax.runs.directory import read_run, write_atomically
from saap_jax.runs.origin import FILE

OPEN = 3
"""Runs up to this number are shown open; more of them are closed until somebody opens them."""

_MANY_RUNS, _MANY_CANDIDATES = 4, 600
"""More runs, or more candidates in all, and each is shown in less detail."""

_MARKS = (
    b'<meta name="generator" content="saap_jax">',
    b"saap_jax</title>",
    MARK.encode(),
    ",".join(CSV_HEADER).encode(),
)
"""What a file of ours begins with; the second is of pages before the first was written into them."""  # fmt: skip


def write_report(run_dir: str | os.PathLike[str], *, status: str = "") -> Path:
    """Write `report.html` into a run directory of any kind, finished or not, and return its path; see `read_view`."""
    path = Path(run_dir) / "report.html"
    write_atomically(path, render_report(run_dir, status=status).encode())
    return path


def render_report(run_dir: str | os.PathLike[str], *, status: str = "") -> str:
    """Return the page of one run, made from its records alone; see `read_view`.

    Raises:
        FileNotFoundError, ValueError: the directory holds no readable run.
    """
    return render_page(report_page([read_view(run_dir, Detail(), status=status)], folded=False))


def report_page(views: Sequence[RunView], *, folded: bool) -> Page:
    """Return the page of one run, or of several side by side."""
    title = views[0].name if len(views) == 1 else f"{len(views)} runs side by side"
    return Page(title, overview_sections(views), views, folded)


def write_reports(
    runs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] = "",
    figures: str | os.PathLike[str] = "",
    *,
    overwrite: bool = False,
) -> list[Path]:
    """Write the report of run directories of any kind; return the paths of page, Markdown, CSV and figures.

    Markdown, and CSV of the comparisons, lie beside the page, under its name. A file that is no report of ours is never
    replaced unless `overwrite` says so; neither is a figure.

    Args:
        out: the page; empty: `report.html`, in the run's directory if there is one run, else in the working directory.
        figures: a directory for the figures as SVG, PNG and PDF; empty: none are drawn.

    Raises:
        FileNotFoundError, ValueError: no run given, a directory without a readable run, or a file in the way.
    """
    if not runs:
        raise ValueError("report: expected at least one run directory, got none; name one, such as runs/quickstart")
    page_path = Path(out) if out else (Path(runs[0]) if len(runs) == 1 else Path()) / "report.html"
    if page_path.suffix not in (".html", ".htm"):
        raise ValueError(f"--out: expected a file that ends in .html, got {page_path}")
    views = read_views(runs)
    page = report_page(views, folded=len(views) > OPEN)
    texts = {page_path: render_page(page), page_path.with_suffix(".md"): markdown_report(page)}
    if any(view.compared for view in views):
        texts[page_path.with_suffix(".csv")] = data_text(report_data(views))
    for path in texts:
        if not overwrite and not is_ours(path):
            raise ValueError(f"{path} is no report of saap; pass --overwrite to replace it, or another --out")
    drawn = {Path(figures) / name: content for name, content in paper_figures(page)} if figures else {}
    taken = [] if overwrite else [path for path in drawn if path.exists() and b"saap_jax" not in path.read_bytes()]
    if taken:
        raise ValueError(f"{taken[0]} is no figure of saap; pass --overwrite to replace it, or other --figures")
    for path, content in ({path: text.encode() for path, text in texts.items()} | drawn).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    return [*texts, *drawn]


def read_views(runs: Sequence[str | os.PathLike[str]]) -> list[RunView]:
    """Read the runs, in as much detail as their number allows, under names that differ."""
    for run in runs:
        if not any((Path(run) / name).exists() for name in ("run.json", FILE)):
            read_run(run)  # refuses it, before any work is done
    files = [Path(run) / "metrics.jsonl" for run in runs]
    candidates = sum(file.read_bytes().count(b"\n") for file in files if file.exists())
    many = len(runs) > _MANY_RUNS or (len(runs) > 1 and candidates > _MANY_CANDIDATES)
    detail = (
        Detail(8 if len(runs) <= 10 else 6, drawn=False, downloads=False)
        if many
        else Detail(20 if len(runs) == 1 else 12)
    )
    names = names_of([Path(run) for run in runs]) if len(runs) > 1 else [""]
    ids = [f"run-{number}" for number in range(1, len(runs) + 1)] if len(runs) > 1 else [""]
    return [read_view(run, detail, id=id, name=name) for run, id, name in zip(runs, ids, names, strict=True)]


def names_of(paths: Sequence[Path]) -> list[str]:
    """Return a name a run: that of its directory, with those above it where two would be the same.

    >>> names_of([Path("a/x"), Path("b/x"), Path("b/y"), Path("b/y")])
    ['a/x', 'b/x', 'b/y', 'b/y (2)']
    """
    parts = [path.resolve().parts for path in paths]
    length = next(
        (
            count
            for count in range(1, max(map(len, parts)) + 1)
            if len({part[-count:] for part in parts}) == len(set(parts))
        ),
        1,
    )
    names: list[str] = []
    for part in parts:
        name = "/".join(part[-length:])
        again = sum(before == name or before.startswith(f"{name} (") for before in names)
        names.append(f"{name} ({again + 1})" if again else name)
    return names


def is_ours(path: Path) -> bool:
    """Return whether a report may be written to a path: nothing is there, or an earlier report."""
    if not path.exists():
        return True
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        start = file.read(4096)
    return any(mark in start for mark in _MARKS)
