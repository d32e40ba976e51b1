"""A run directory of any kind as what a report shows of it."""

import os
from collections.abc import Callable
from pathlib import Path

from saap_jax.report.kinds.common import cost_section, model_name, reproduce_section, suggestions_section
from saap_jax.report.kinds.compare import compare_sections, read_compared
from saap_jax.report.kinds.fidelity import fidelity_sections
from saap_jax.report.kinds.frontier import frontier_sections
from saap_jax.report.kinds.origin import origin_view
from saap_jax.report.kinds.recover import recover_sections
from saap_jax.report.kinds.score import score_sections
from saap_jax.report.kinds.sensitivity import sensitivity_sections
from saap_jax.report.page.blocks import Bullets, Detail, RunView, Section
from saap_jax.runs.directory import read_run
from saap_jax.runs.origin import read_origin
from saap_jax.runs.records import RunRecord
from saap_jax.runtime.words import plural

KINDS: dict[str, Callable[[Path, RunRecord, Detail], list[Section]]] = {
    "fidelity": fidelity_sections,
    "frontier": frontier_sections,
    "recover": recover_sections,
    "score": score_sections,
    "sensitivity": sensitivity_sections,
}
"""Kind of a run, as `run.json` says: its sections, made of its directory and its record. `read_view` has `compare`."""

_BY_CONFIG = {"channels_per_layer": "fidelity", "keep_statistics": "score", "best_ratio": "compare"}
"""A field of the configuration that tells the kind of a run that has not come far enough to record it."""


def read_view(
    run_dir: str | os.PathLike[str], detail: Detail, *, id: str = "", name: str = "", status: str = ""
) -> RunView:
    """Read a run of any kind, or the directory of a model that a command made.

    `name` is what the page calls it, by default as its record does. So is `status`: a page is written before the record
    says that the run is finished.

    Raises:
        FileNotFoundError, ValueError: the directory holds no readable run or model.
    """
    path = Path(run_dir)
    if not (path / "run.json").exists() and (origin := read_origin(path)) is not None:
        return origin_view(path, origin, id=id, name=name)
    run = read_run(path)
    kind, compared, notes = kind_of(run), None, []
    if kind == "compare":
        compared = read_compared(path, run)
        if compared.corrupt:
            notes = [f"{plural(compared.corrupt, 'unreadable line')} of metrics.jsonl left out."]

    def sections(detail: Detail) -> list[Section]:
        return compare_sections(compared, detail) if compared else KINDS.get(kind, _sections)(path, run, detail)

    status = status or run.get("status", "unknown")
    name = name or run.get("name", path.name)
    return RunView(id, name, kind, status, model_name(run), notes, sections(detail), run, compared, sections)


def kind_of(run: RunRecord) -> str:
    """Return the kind of a run; of one that has only begun, what its configuration says.

    >>> kind_of({"kind": "score"}), kind_of({"config": {"channels_per_layer": 4}}), kind_of({"config": {}})
    ('score', 'fidelity', 'compare')
    """
    if kind := run.get("kind"):
        return kind
    config = run.get("config", {})
    return next((kind for field, kind in _BY_CONFIG.items() if field in config), "compare")


def _sections(path: Path, run: RunRecord, detail: Detail) -> list[Section]:
    """Return what every run has, of a kind that has no sections of its own."""
    said = f"A run of kind {kind_of(run)}, of which a report says no more than what follows."
    summary = Section("summary", "Summary", [Bullets([said])])
    return [summary, *suggestions_section(run), *cost_section(run), reproduce_section(run)]
