"""How a job holds its run, and how the run ends: with everything that its command names, before it says "finished".

What is missing of a finished run is made again by the same command: from the records where they suffice; else the run
goes on, as if it had been killed before that was written.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from saap_jax.report.html import write_report
from saap_jax.runs.directory import RunDirectory
from saap_jax.runs.tensorboard import write_scalars
from saap_jax.runtime.locks import held
from saap_jax.runtime.processes import agreed, first

_TEXTS = (".csv", ".md", ".svg")


class Ending(NamedTuple):
    """What a finished run of a kind has, beside `tensorboard/`."""

    texts: Callable[[RunDirectory], dict[str, str]] = lambda run: {}
    """Makes tables and figures, by file name, of what the run holds alone."""
    page: bool = False
    """Whether it has `report.html`."""
    further: tuple[str, ...] = ()
    """What takes the model to make, of the files and directories that the run says it wrote."""
    rows: bool = True
    """Whether a line of `metrics.jsonl` that is missing can be measured again."""


@contextlib.contextmanager
def job(config: Any, ending: Ending, *, overwrite: bool = False) -> Iterator[RunDirectory]:
    """Open the run directory of a configuration (its `runs` and `name`), and hold it for the length of the job.

    A finished run is yielded as it is, at once: neither its model nor its text is looked at. Where something of its
    ending is missing, that is made again, or the run is not finished any more.

    Raises:
        ValueError: see `RunDirectory.open`; or another process holds the run.
    """
    path, fields = Path(config.runs) / config.name, dataclasses.asdict(config)
    run = RunDirectory.open(path, fields, overwrite=overwrite)
    if run.finished and not _lost(run, ending):
        yield run
        return
    with held(path, f"the run {path}"):
        run = RunDirectory.open(path, fields, overwrite=overwrite)  # another process may have gone on meanwhile
        if run.finished and (lost := _lost(run, ending)):
            if lost <= _texts(run, ending):
                finish(run, ending)
            else:
                run.update(status="running")
        yield run


def finish(run: RunDirectory, ending: Ending) -> None:
    """Write what follows from what the run holds, and then say that it is finished."""
    run.settle_rows()
    run.settle_arrays()
    write_scalars(run)
    for name, text in ending.texts(run).items():
        run.save_text(name, text)
    run.update(rows=len(run.candidates()))
    if ending.page and first():
        write_report(run.path, status="finished")
    run.update(status="finished")


def _lost(run: RunDirectory, ending: Ending) -> set[str]:
    """Return what a finished run does not have any more: names of files, `metrics.jsonl` where a line is missing."""
    written = run.record.get("files", [])
    names = _texts(run, ending) | {name for name in ending.further if name in written}
    lost = {name for name in names if not run.has(name)}
    if ending.rows and len(run.candidates()) < run.record.get("rows", 0):
        lost.add("metrics.jsonl")
    if "out" in run.record and not agreed(Path(run.record["out"]).exists):
        lost.add(run.record["out"])
    return lost


def _texts(run: RunDirectory, ending: Ending) -> set[str]:
    """Return the names of what `finish` writes, tables and figures as far as the run says that it wrote them."""
    written = {name for name in run.record.get("files", []) if name.endswith(_TEXTS)}
    return written - set(ending.further) | ({"report.html"} if ending.page else set())
