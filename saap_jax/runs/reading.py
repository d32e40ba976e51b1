"""What is read back of a run: what we wrote, so JSON and arrays as they are; anything else is an error of one line."""

import io
import os
from pathlib import Path
from typing import cast

import numpy as np

from saap_jax.runs.records import Correlation, Row, RunRecord
from saap_jax.runtime.errors import reading
from saap_jax.runtime.files import decoded, read_json

SCHEMA = 1
"""Version of the record layout, stored as `schema`."""

DAMAGED = "the file was changed or damaged: remove it, and the same command makes it again"


def arrays_of(content: bytes, path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of an npz file from its content.

    Raises:
        ValueError: it is none, or damaged.
    """
    with reading(path, f"arrays; {DAMAGED}"), np.load(io.BytesIO(content), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def read_run(path: str | os.PathLike[str]) -> RunRecord:
    """Read `run.json` of a run directory.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no run record of this version, or damaged.
    """
    file = Path(path) / "run.json"
    if not file.is_file():
        raise FileNotFoundError(f"expected a run directory, found no run.json in {path}; check the name of the run")
    record = read_json(file)
    version = record.get("schema") if isinstance(record, dict) else None
    if version != SCHEMA:
        raise ValueError(
            f"{file}: expected a run of version {SCHEMA} (`schema`), got {version!s:.60}; make it again with "
            "--overwrite or another --name"
        )
    return cast(RunRecord, record)


def read_candidates(path: str | os.PathLike[str]) -> tuple[list[Row], int]:
    """Read `metrics.jsonl` of a run directory: the last line of each candidate, in order, and whether the end is torn.

    Raises:
        ValueError: another line than a torn last one cannot be read.
    """
    file, found = Path(path) / "metrics.jsonl", {}
    *lines, torn = file.read_bytes().split(b"\n") if file.exists() else [b""]
    for number, line in enumerate(lines, start=1):
        with reading(f"{file}, line {number}", "a candidate"):
            row = decoded(line)
            found[row["candidate"]] = row
    return list(found.values()), int(bool(torn))


def read_correlations(path: str | os.PathLike[str]) -> list[Correlation]:
    """Read `fidelity.json` of a run directory, nothing where the run has not come that far."""
    file = Path(path) / "fidelity.json"
    return read_json(file) if file.exists() else []
