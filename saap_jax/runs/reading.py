"""What is read back of a run, held against what runs write: types (`records`), and what follows from each other."""

import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from saap_jax.evaluation.scales import scale_of
from saap_jax.runs.records import Correlation, Couplings, Fused, Measured, Row, RunRecord, Trial, fault_of
from saap_jax.runtime.files import lines_of, read_arrays, read_json

SCHEMA = 1
"""Version of the record layout, stored as `schema`."""

DAMAGED = "the file was changed or damaged: remove it, and the same command makes it again"
"""What to do about a file of arrays."""

_NEEDS: dict[str, dict[str, tuple[str, ...]]] = {
    "frontier": {
        "frontier": ("metrics", "seeds.calibration", "dense.ppl", "dense.losses", "dense.parameters"),
    },
    "sensitivity": {
        "dense": (
            *("metrics", "dense.ppl", "dense.losses", "model.layers"),
            *("config.judged", "config.ratio", "config.resamples", "config.estimator"),
        ),
    },
    "compare": {"structures": ("model.parameters", "model.prunable_parameters", "model.units")},
    "recover": {
        "dense": ("dense.ppl",),
        "before": ("before.ppl",),
        "after": ("after.ppl", "before.ppl"),
        "training": ("data", "model.parameters", "config.method.name", "config.data.length"),
    },
}
"""Kind of a run -> field -> the fields that are there where it is."""

_ROW_NEEDS: dict[str, dict[str, tuple[str, ...]]] = {
    "frontier": {"candidate": ("variant", "seed", "ratio_asked", "parameters", "ppl", "losses")},
    "sensitivity": {
        "candidate": ("ppl", "losses"),
        "layer": ("structure", "asked", "actual", "units", "removed"),
    },
}
"""The same of a line of `metrics.jsonl`."""

_MEASURES = {"spearman", "kendall", "spearman_in_layers", "kendall_in_layers"}


def arrays_of(content: bytes, path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an npz file from its content.

    Raises:
        ValueError: it is none, or damaged.
    """
    try:
        return read_arrays(content)
    except ValueError as error:
        raise ValueError(f"expected arrays in {path}, got {error}; {DAMAGED}") from None


def read_run(path: str | os.PathLike[str], *, outputs_alone: bool = False) -> RunRecord:
    """Read `run.json` of a run directory.

    Args:
        outputs_alone: only what the run wrote is asked for, which a record of another version says as well.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no run record of this version, or damaged.
    """
    path = Path(path)
    if not (path / "run.json").is_file():
        raise FileNotFoundError(f"expected a run directory, found no run.json in {path}; check the name of the run")
    record = read_json(path / "run.json")
    version = record.get("schema") if isinstance(record, dict) else None
    if type(version) is not int:
        got = "no version" if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"expected a run record with its version, `schema`, in {path / 'run.json'}, got {got}")
    if version != SCHEMA and outputs_alone:
        record = {"schema": version, "files": record.get("files", [])}
    elif version != SCHEMA:
        raise ValueError(
            f"{path / 'run.json'}: a run of version {version:.60g}, where this program reads version {SCHEMA}; make it "
            "again with --overwrite or another --name, or report it with the version that wrote it"
        )
    run = cast(RunRecord, record)
    if fault := fault_of(record, RunRecord) or contradiction_of(run):
        raise ValueError(f"{path / 'run.json'}: {fault}; the file was changed or damaged")
    return run


def read_candidates(path: str | os.PathLike[str]) -> tuple[list[Row], int]:
    """Read `metrics.jsonl` of a run directory; return the candidates and the number of lines that are no candidate.

    Those are torn lines, lines with a field of another type, and perplexities that their losses contradict.
    """
    file = Path(path) / "metrics.jsonl"
    found: dict[str, Row] = {}
    corrupt = 0
    for record in lines_of(file) if file.exists() else ():
        if isinstance(record, ValueError) or fault_of(record, Row) or contradiction(record):
            corrupt += 1
        else:
            found[record["candidate"]] = record
    return list(found.values()), corrupt


def read_rows(path: str | os.PathLike[str], run: RunRecord, kind: str) -> list[Row]:
    """Read the candidates of a run of which a report shows every one; `run` is its record.

    Raises:
        ValueError: one lacks what candidates of the kind have, or one that the record names is missing.
    """
    rows, corrupt = read_candidates(path)
    damaged = f"; {corrupt} damaged" if corrupt else ""
    for fault in itertools.chain((_row_fault(row, run, kind) for row in rows), _missing_rows(run, rows)):
        if fault:
            raise ValueError(f"{Path(path) / 'metrics.jsonl'}: {fault}{damaged}; the file was changed or damaged")
    return rows


def read_correlations(path: str | os.PathLike[str]) -> list[Correlation]:
    """Read `fidelity.json` of a run directory, nothing where the run has not come that far.

    Raises:
        ValueError: it is damaged, or an estimator lacks a measure.
    """
    file = Path(path) / "fidelity.json"
    rows: list[Correlation] = read_json(file) if file.exists() else []
    fault, measures = fault_of(rows, list[Correlation]), {}
    for row in () if fault else rows:
        measures.setdefault((row["scope"], row["estimator"]), set()).add(row["measure"])
    for (scope, estimator), known in measures.items():
        expected = _MEASURES - {m for m in _MEASURES if scope == "pooled" and m.endswith("in_layers")}
        if absent := sorted(expected - known):
            fault = f"expected {absent[0]} of {estimator!r:.60}, {scope}, got {', '.join(sorted(known))}"
    if fault:
        raise ValueError(f"{file}: {fault}; the file was changed or damaged")
    return rows


# --- what follows from each other -----------------------------------------------------------------


def contradiction_of(run: RunRecord) -> str:
    """Return what in a record whose fields are of their types contradicts another part of it; "" if nothing."""
    return next(filter(None, _contradictions(run)), "")


def _contradictions(run: RunRecord) -> Iterator[str]:
    for name in ("dense", "before", "after"):
        yield contradiction(run.get(name, {}), f"{name}.")
    yield _unmeasured(run)
    yield _absent(run, _NEEDS.get(run.get("kind", ""), {}))
    yield _uncoupled(run["couplings"]) if "couplings" in run else ""
    for scenario, by_name in run.get("fusions", {}).items():
        for name, fused in by_name.items():
            yield _unfused(fused, f"fusions.{scenario}.{name}")
    for number, trial in enumerate(run.get("trials", [])):
        yield _untimed(trial, run, f"trials[{number}]")
    if run.get("kind") == "frontier" and "frontier" in run:
        metric, measured = run["frontier"]["metric"], run["dense"]["losses"]
        known = ", ".join(measured)
        yield "" if metric in measured else f"frontier.metric: expected one of {known}, got {metric!r:.60}"
        yield "" if run["frontier"]["lines"] else "frontier.lines: expected one or more, got none"
    if run.get("kind") == "sensitivity" and "dense" in run:
        domain = run["config"]["judged"]
        judged = any(metric["domain"] == domain for metric in run["metrics"])
        yield "" if judged else f"metrics: expected one of domain {domain}, which config.judged names"
        yield "" if 0 < run["model"]["layers"] < 2**20 else "model.layers: expected a number of layers"


def contradiction(measured: Measured, place: str = "") -> str:
    """Return which figure is not that of the mean loss of the windows beside it, all of one length; "" if none.

    Where there are losses, they are of the same texts as the perplexities.
    """
    of_text, ppls = measured.get("losses", {}), measured.get("ppl", {})
    if of_text and of_text.keys() != ppls.keys():
        alone = min(of_text.keys() ^ ppls.keys())
        return f"{place}losses and ppl: expected those of the same texts, found {alone!r:.60} in one of them alone"
    for metric, losses in of_text.items():
        if not losses:
            continue
        ppl = ppls[metric]
        with np.errstate(all="ignore"):
            expected = scale_of(metric).value(float(np.mean(np.asarray(losses, np.float64))))
        if not (math.isclose(ppl, expected, rel_tol=1e-6) or (math.isnan(ppl) and math.isnan(expected))):
            return f"{place}ppl of {metric!r}: expected {expected:.6g} by the losses beside it, got {ppl:.6g}"
    return ""


def _absent(record: Mapping[str, Any], needs: Mapping[str, Sequence[str]]) -> str:
    """Return which field is absent although one is there that needs it; "" if none.

    >>> _absent({"frontier": {}, "dense": {"ppl": {}}}, {"frontier": ("dense.ppl", "dense.losses")})
    'expected a field dense.losses beside frontier, got none'
    """
    for field, paths in needs.items():
        for path in paths if field in record else ():
            value: Any = record
            for name in path.split("."):
                value = value.get(name) if isinstance(value, dict) else None
            if value is None:
                return f"expected a field {path} beside {field}, got none"
    return ""


def _unmeasured(run: RunRecord) -> str:
    """Return which metric of a run the unpruned model was not measured by; "" if none."""
    measured = run.get("dense", {}).get("ppl", {})
    missing = [metric["name"] for metric in run.get("metrics", []) if metric["name"] not in measured]
    if not measured or not missing:
        return ""
    return f"metrics: expected those that dense was measured by, {', '.join(measured)}, got {missing[0]!r:.60}"


def _uncoupled(couplings: Couplings) -> str:
    """Return which structure a figure could not draw: each has a name and axes of parameters; "" if none.

    >>> structure = {"name": "mlp", "members": [["up", 2]], "label": ["4 units", "prunable"], "pinned": False}
    >>> _uncoupled({"parameters": {"up": [8, 4]}, "structures": [structure]})
    "couplings.structures[0].members[0]: expected a parameter and one of its axes, got ['up', 2]"
    """
    shapes, names = couplings["parameters"], set()
    for place, structure in enumerate(couplings["structures"]):
        where = f"couplings.structures[{place}]"
        if structure["name"] in names:
            return f"{where}.name: expected another name than those before it, got {structure['name']!r:.60}"
        names.add(structure["name"])
        if not structure["members"]:
            return f"{where}.members: expected one or more, got none"
        for number, (path, axis) in enumerate(structure["members"]):
            if not 0 <= axis < len(shapes.get(path, ())):
                member = structure["members"][number]
                return f"{where}.members[{number}]: expected a parameter and one of its axes, got {member!r:.60}"
    return ""


def _unfused(fused: Fused, place: str) -> str:
    """Return which part of a fusion has other members or scopes than its sigmas; "" if none."""
    sigmas, steps = fused["sigmas"], fused.get("trajectory") or {}
    scopes = list(next(iter(sigmas.values()), {}))
    if not scopes or not all(re.fullmatch(r"([^/]+|.+\[\d+\])(/\d{1,6})?", scope) for scope in scopes):
        return f"{place}.sigmas: expected members, and scopes such as mlp or mlp/3, got {scopes!r:.60}"
    for name, by_member in (("sigmas", sigmas), ("weights", fused["weights"]), ("shares", fused.get("shares", sigmas))):
        if by_member.keys() != sigmas.keys() or any([*by] != scopes for by in by_member.values()):
            return f"{place}.{name}: expected every member and scope of the sigmas, {', '.join(scopes)}"
    if steps and (steps.keys() != sigmas.keys() or len({len(each) for each in steps.values()}) > 1):
        return f"{place}.trajectory: expected every member, {', '.join(sigmas)}, over as many steps"
    if any(len(step) != len(scopes) for each in steps.values() for step in each):
        return f"{place}.trajectory: expected {len(scopes)} numbers a step"
    return ""


def _untimed(trial: Trial, run: RunRecord, place: str) -> str:
    """Return what a trial of aligned widths lacks: times of both models in as many rounds; "" if nothing."""
    if trial["kind"] != "aligned":
        return ""
    if fault := _absent(trial, {"kind": ("seconds", "segments")}) or _absent(run, {"trials": ("config.align",)}):
        return f"{place}: {fault}"
    before, after = trial["seconds"]
    if not before or len(before) != len(after) or min(*before, *after) <= 0:
        return f"{place}.seconds: expected times of both models, as many of each, got {len(before)} and {len(after)}"
    return ""


def _row_fault(row: Row, run: RunRecord, kind: str) -> str:
    """Return what a candidate of a kind of run lacks, or what of it is not of this run; "" if nothing."""
    needs = _ROW_NEEDS.get("dense" if row["candidate"] == "dense" else kind, {})
    if fault := _absent(row, needs):
        return f"{row['candidate']}: {fault}"
    if "losses" in needs.get("candidate", ()):
        for metric, losses in run.get("dense", {}).get("losses", {}).items():
            if len(row["losses"].get(metric, ())) != len(losses):
                return f"{row['candidate']}: expected {len(losses)} losses of {metric!r:.60}, as of the unpruned model"
    if "layer" in row and "layer" in needs and not 0 <= row["layer"] < run["model"]["layers"]:
        return f"{row['candidate']}: expected one of {run['model']['layers']} layers, got {row['layer']:.60g}"
    return ""


def _missing_rows(run: RunRecord, rows: Sequence[Row]) -> Iterator[str]:
    """Yield which candidates a record names and the lines do not have."""
    known = {row["candidate"] for row in rows}
    curves = {(row.get("variant"), row.get("seed")) for row in rows}
    for line in run["frontier"]["lines"] if "frontier" in run else ():
        if line["candidate"] not in {*known, "dense"} or (line["variant"], line["seed"]) not in curves:
            yield f"expected a line of {line['candidate']!r:.60}, which the frontier names"
    for name in (trial[end] for trial in run.get("trials", []) for end in ("candidate", "instead_of")):
        if name not in known:
            yield f"expected a line of {name!r:.60}, which a trial names"
