"""A run in a Python session."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from saap_jax.runs.directory import RunDirectory, read_candidates, read_run
from saap_jax.runs.records import Row, RunRecord
from saap_jax.runs.scores import read_scores
from saap_jax.steps.score.calibrate import Calibrated


class Run(NamedTuple):
    """A run directory of any kind, read."""

    path: Path
    record: RunRecord
    """The content of `run.json`."""
    candidates: list[Row]
    """What was measured of each candidate, in order; empty of a run that measures none."""

    @property
    def finished(self) -> bool:
        """Say whether the run has ended."""
        return self.record.get("status") == "finished"

    def scores(self) -> Calibrated:
        """Read the scores that the run keeps.

        Raises:
            FileNotFoundError: it keeps none.
        """
        return read_scores(RunDirectory(self.path, self.record))

    def rows(self) -> Iterator[Mapping[str, Any]]:
        """Yield what was measured of each candidate, the unpruned model first; nested fields under `NAME/KEY`.

        Values of single windows are left out.
        """
        dense = [{"candidate": "dense", **self.record["dense"]}] if "dense" in self.record else []
        flat = [_flat(row) for row in (*dense, *self.candidates)]
        names = dict.fromkeys(name for row in flat for name in row)
        for row in flat:
            yield {name: row.get(name) for name in names}

    def __repr__(self) -> str:
        kind, status = self.record.get("kind", "run"), self.record.get("status")
        return f"Run({str(self.path)!r}, {kind}, {status}, {len(self.candidates)} candidates)"


def load_run(path: str | os.PathLike[str]) -> Run:
    """Read a run directory.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: its record is damaged, or of another version.
    """
    record = read_run(path)
    return Run(Path(path), record, read_candidates(path)[0])


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{key}": each for key, each in value.items() if not isinstance(each, list | Mapping)}
        elif not isinstance(value, list):
            found[name] = value
    return found
