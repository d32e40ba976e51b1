"""`saap runs`: the runs of a directory, what they found beside each other, and an end to them."""

import contextlib
from pathlib import Path
from typing import Any

from saap_jax.config.use import RunsConfig
from saap_jax.evaluation.scales import format_figure
from saap_jax.report.blocks import View, Words, text_table
from saap_jax.report.formats import format_mebibytes
from saap_jax.report.pages.common import figure_of, seconds_of
from saap_jax.report.pages.several import overview_sections
from saap_jax.report.write import read_view, read_views
from saap_jax.runs.cache import FileCache
from saap_jax.runs.directory import delete_run, read_run
from saap_jax.runs.standing import DENSE, primary_domain
from saap_jax.runtime.files import held
from saap_jax.runtime.progress import Track, quiet

CACHE = ".cache"


def list_runs(config: RunsConfig, *, track: Track = quiet) -> list[Any]:
    """List runs, those that are named beside each other; or delete these.

    Raises:
        FileNotFoundError: no run of a name.
        ValueError: a run that another process writes.
    """
    root = Path(config.runs)
    paths = [Path(name) if (Path(name) / "run.json").is_file() else root / name for name in config.names]
    paths = [*dict.fromkeys(paths)]
    if config.delete:
        for path in paths:  # first of all, so that none goes where one is named wrongly
            if path.name != CACHE or not path.is_dir():
                with contextlib.suppress(ValueError):  # one that is damaged goes too
                    read_run(path)
        return [_deleted(path) for path in paths]
    paths = paths or sorted(each.parent for each in root.glob("*/run.json"))
    if not paths:
        return [f"no runs in {root}; saap compare quickstart makes one"]
    views = {}
    if config.names:
        views = dict(zip(paths, read_views(paths), strict=True))
    for path in [] if config.names else paths:  # one that is damaged does not hide the others
        with contextlib.suppress(ValueError, OSError):
            views[path] = read_view(path, name=path.name)
    damaged = ("", "unreadable", "", "", "")
    lines = [_line(path, views[path]) if path in views else (path.name, *damaged, _size(path)) for path in paths]
    if not config.names and (root / CACHE).is_dir():
        lines.append((CACHE, "what they share", "", "", "", "", _size(root / CACHE)))
    header = ("run", "kind", "status", "began", "lowest", "seconds", "MiB")
    table = text_table("", header, lines, words=5)
    if config.names:
        return [table, *overview_sections([*views.values()])]
    return [table]


def _line(path: Path, view: View) -> tuple[str, ...]:
    """Write a run in one line; what has the lowest figure of the text that judges is of its largest ratio."""
    rows = [row for row in view.rows if row["candidate"] != DENSE and row["best"]]
    best = max(rows, key=lambda row: row["ratio_asked"], default=None)
    seconds = seconds_of(view.run)
    lowest = ""
    if best is not None:
        value = format_figure(best[f"ppl_{primary_domain(view.run)}"], figure_of(view.run))
        lowest = f"{best['variant']} at {100 * best['ratio_asked']:g} %: {value}"
    began = view.run.get("started", "")[:16].replace("T", " ")
    return view.name, view.kind, view.status, began, lowest, "" if seconds is None else f"{seconds:,.0f}", _size(path)


def _size(path: Path) -> str:
    return format_mebibytes(sum(each.stat().st_size for each in path.rglob("*") if each.is_file()))


def _deleted(path: Path) -> Words:
    with held(path, f"the run {path}"):
        if path.name == CACHE:
            FileCache(path).clear()
        else:
            delete_run(path)
    return Words(f"deleted {path}" + (", but for what no command wrote" if path.exists() else ""))
