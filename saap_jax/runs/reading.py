"""What is read back of a run, held against what runs write: types, and numbers that follow from each other."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saap_jax.runs.schema import MODELS, ROW, RUN, fault_of
from saap_jax.runtime.files import lines_of, read_arrays, read_json

SCHEMA = 1
"""Version of the record layout, stored as `schema`."""

DAMAGED = "the file was changed or damaged: remove it, and the same command makes it again"
"""What to do about a file of arrays."""


def arrays_of(content: bytes, path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an npz file from its content.

    Raises:
        ValueError: it is none, or damaged.
    """
    try:
        return read_arrays(content)
    except ValueError as error:
        raise ValueError(f"expected arrays in {path}, got {error}; {DAMAGED}") from None


def read_run(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read `run.json` of a run directory.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no run record of this version, or damaged.
    """
    path = Path(path)
    if not (path / "run.json").is_file():
        raise FileNotFoundError(f"expected a run directory, found no run.json in {path}; check the name of the run")
    record = read_json(path / "run.json")
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        found = record.get("schema") if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"expected a run record of schema {SCHEMA}, got {found!r:.60} in {path / 'run.json'}")
    fault = fault_of(record, RUN)
    fault = fault or next((contradiction(record[name], f"{name}.") for name in MODELS if name in record), "")
    fault = fault or _unmeasured(record) or _uncoupled(record.get("couplings") or {})
    if fault:
        raise ValueError(f"{path / 'run.json'}: {fault}; the file was changed or damaged")
    return record


def _unmeasured(record: Mapping[str, Any]) -> str:
    """Return which metric of a run the unpruned model was not measured by; "" if none."""
    measured = (record.get("dense") or {}).get("ppl") or {}
    names = [str(metric["name"]) for metric in record.get("metrics", [])]
    missing = [name for name in names if name not in measured]
    if not measured or not missing:
        return ""
    return f"metrics: expected those that dense was measured by, {', '.join(measured)}, got {missing[0]!r:.60}"


def _uncoupled(couplings: Mapping[str, Any]) -> str:
    """Return which structure of `couplings` a figure could not draw: each has members, axes of parameters; "" if none.

    >>> structure = {"name": "mlp", "members": [["up", 2]], "label": ["4 units", "prunable"], "pinned": False}
    >>> _uncoupled({"parameters": {"up": [8, 4]}, "structures": [structure]})
    "couplings.structures[0].members[0]: expected a parameter and one of its axes, got ['up', 2]"
    """
    shapes, names = couplings.get("parameters", {}), set()
    for place, structure in enumerate(couplings.get("structures", [])):
        where = f"couplings.structures[{place}]"
        if structure["name"] in names:
            return f"{where}.name: expected another name than those before it, got {structure['name']!r:.60}"
        names.add(structure["name"])
        if len(structure["label"]) != 2:
            return f"{where}.label: expected two lines, got {len(structure['label'])}"
        if not structure["members"]:
            return f"{where}.members: expected one or more, got none"
        for number, member in enumerate(structure["members"]):
            if not _is_axis(member, shapes):
                return f"{where}.members[{number}]: expected a parameter and one of its axes, got {member!r:.60}"
    return ""


def _is_axis(member: Sequence[Any], shapes: Mapping[str, Sequence[int]]) -> bool:
    if [type(each) for each in member] != [str, int] or member[0] not in shapes:
        return False
    return 0 <= member[1] < len(shapes[member[0]])


def read_candidates(path: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], int]:
    """Read `metrics.jsonl` of a run directory; return the candidates and the number of lines that are no candidate.

    Those are torn lines, lines with a field of another type, and perplexities that their losses contradict.
    """
    file = Path(path) / "metrics.jsonl"
    found: dict[str, dict[str, Any]] = {}
    corrupt = 0
    for record in lines_of(file) if file.exists() else ():
        if isinstance(record, ValueError) or fault_of(record, ROW) or contradiction(record):
            corrupt += 1
        else:
            found[record["candidate"]] = record
    return list(found.values()), corrupt


def contradiction(measured: Mapping[str, Any], place: str = "") -> str:
    """Return which perplexity is not exp of the mean loss of the windows beside it, all of one length; "" if none.

    Where there are losses, they are of the same texts as the perplexities.
    """
    of_text, ppls = measured.get("losses") or {}, measured.get("ppl") or {}
    if of_text and of_text.keys() != ppls.keys():
        alone = min(of_text.keys() ^ ppls.keys())
        return f"{place}losses and ppl: expected those of the same texts, found {alone!r:.60} in one of them alone"
    for metric, losses in of_text.items():
        ppl = ppls[metric]
        if ppl is None or not losses:
            continue
        with np.errstate(all="ignore"):
            expected = float(np.exp(np.mean(np.asarray(losses, np.float64))))
        if not (math.isclose(ppl, expected, rel_tol=1e-6) or (math.isnan(ppl) and math.isnan(expected))):
            return f"{place}ppl of {metric!r}: expected {expected:.6g} by the losses beside it, got {ppl:.6g}"
    return ""
