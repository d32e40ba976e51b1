"""What `saap ab` is given: models by reference.

| reference           | stands for                                                          |
|---------------------|---------------------------------------------------------------------|
| `RUN:CANDIDATE`     | one candidate of a run directory: a pruned model as masks           |
| `RUN:VARIANT@RATIO` | that variant at that ratio, all its seeds together                  |
| `RUN:dense`         | the unpruned model of a run                                         |
| anything else       | what `load_model` takes: `smollm2-135m`, a GGUF file, a directory   |
"""

import contextlib
import difflib
import os
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, cast

import numpy as np
from jaxtyping import Float

from saap_jax.checks import is_remote
from saap_jax.errors import reading
from saap_jax.records import Row, RunRecord
from saap_jax.runs.commands import prune_command
from saap_jax.runs.directory import read_candidates, read_run
from saap_jax.runs.standing import DENSE
from saap_jax.runtime.words import plural
from saap_jax.steps.chain import parse

# `_` binds to nothing: A may have seeds where B has none
Losses = dict[str, Float[np.ndarray, "_seeds _windows"]]
"""{metric: mean loss of each evaluation window in nats a token, a row for each seed}."""

_RECORDED = "metrics and losses as saap compare writes them to run.json and metrics.jsonl"


class Reference(NamedTuple):
    """A model that a command was given."""

    text: str
    """As it was given."""
    run: Path | None = None
    """The run directory, None for a model to load."""
    candidate: str = ""
    """What is named within the run."""
    record: RunRecord = cast(RunRecord, MappingProxyType({}))
    rows: tuple[Row, ...] = ()
    """The lines of `metrics.jsonl`, by seed; for the unpruned model, its record."""
    others: int = 1
    """How many others of its run it was compared with at its ratio."""

    @property
    def seeds(self) -> tuple[int, ...] | None:
        """The calibration seeds of a candidate; None for a model that has none, unpruned or loaded."""
        if self.run is None or self.candidate == DENSE:
            return None
        return tuple(row.get("seed", 0) for row in self.rows)

    @property
    def model(self) -> dict[str, str]:
        """Name and type of the model of the run."""
        with reading(self.text, "a run whose run.json has config.model with name and dtype"):
            return {name: self.record["config"]["model"][name] for name in ("name", "dtype")}

    @property
    def tokenizer(self) -> str:
        """Name of the model whose tokenizer it uses."""
        if self.run is None:
            return self.text
        return self.model["name"]


def find(text: str) -> Reference:
    """Find the model that a reference stands for, without loading any.

    Raises:
        ValueError: a run without a candidate, or one that the run does not have.
    """
    path = Path(text)  # of a long chain no name of a file: os.path says no then, where pathlib raises
    if os.path.isfile(path / "run.json") and not (path / "config.json").is_file():
        example = next((row["candidate"] for row in read_candidates(path)), DENSE)
        raise ValueError(f"{text} is a run: expected RUN:CANDIDATE or RUN:{DENSE}, such as {path}:{example}")
    if os.path.exists(path) or ":" not in text or is_remote(text):
        return Reference(text)
    for place in (place for place, letter in enumerate(text) if letter == ":"):
        if os.path.isfile(Path(text[:place]) / "run.json"):
            return _of_run(text, Path(text[:place]), text[place + 1 :])
    run = text.partition(":")[0]
    raise ValueError(f"{text}: expected a run directory before the colon, found no run.json in {run!r}; check the path")


def _of_run(text: str, run: Path, candidate: str) -> Reference:
    record = read_run(run)
    known = read_candidates(run)
    if candidate == DENSE:
        if DENSE not in record:
            raise ValueError(f"{text}: the run holds no unpruned model; it has not come that far, or is no comparison")
        with reading(text, _RECORDED):
            return Reference(text, run, candidate, record, ({**record[DENSE], "candidate": DENSE},))
    rows = [row for row in known if row["candidate"] == candidate]
    rows = rows or [row for row in known if together(row) == candidate]
    if not rows and (typed := _named(candidate)) != candidate:
        return _of_run(text, run, typed)
    if not rows:
        names = [DENSE, *dict.fromkeys(name for row in known for name in (row["candidate"], together(row)))]
        near = difflib.get_close_matches(candidate, names, 1)
        if near:
            hint = f"did you mean {near[0]!r}?"
        else:
            hint = f"such as {names[-1]!r}"
        raise ValueError(f"{text}: expected one of the {len(names)} models of {run}, {hint}")
    ratio = rows[0].get("ratio_asked")
    beside = {row.get("variant", row["candidate"]) for row in known if row.get("ratio_asked") == ratio}
    ordered = tuple(sorted(rows, key=lambda row: row.get("seed", 0)))
    return Reference(text, run, candidate, record, ordered, max(len(beside) - 1, 1))


def _named(candidate: str) -> str:
    """Write a candidate as tables do, with > in the place of commas between steps."""
    chain, at, ratio = candidate.rpartition("@")
    with contextlib.suppress(ValueError):
        return f"{parse(chain).name}{at}{ratio}"
    return candidate


def together(row: Row) -> str:
    """Name a candidate with all its seeds.

    >>> together({"candidate": "wanda, seed 1@0.2", "variant": "wanda", "seed": 1, "ratio_asked": 0.2})
    'wanda@0.2'
    """
    variant = row.get("variant")
    ratio = row.get("ratio_asked")
    if variant is None or ratio is None:
        return row["candidate"]
    return f"{variant}@{ratio:g}"


def recorded_losses(reference: Reference) -> Losses:
    """Read the losses that a run holds of one of its models.

    Raises:
        ValueError: losses that are not there, or of other windows for each seed.
    """
    losses: Losses = {}
    with reading(reference.text, _RECORDED):
        for metric in (metric["name"] for metric in reference.record.get("metrics", ())):
            rows = [row.get("losses", {}).get(metric, []) for row in reference.rows]
            if gone := [row["windows"] for row in reference.rows if row.get("windows") and "losses" not in row]:
                raise ValueError(
                    f"{reference.text}: left the race after {plural(min(gone), 'window')}, so that it has no loss of "
                    f"each window of {metric}; run the comparison with --no-race"
                )
            if not all(rows) or len({len(row) for row in rows}) > 1:
                raise ValueError(
                    f"{reference.text}: the run holds no loss of each window of {metric}; run it again with --overwrite"
                )
            losses[metric] = np.asarray(rows, np.float64)
    if not losses:
        raise ValueError(f"{reference.text}: expected a run of saap compare, found no metrics in its run.json")
    return losses


def text_digests(reference: Reference) -> dict[str, str]:
    """Read `{metric: digest of its windows}` as far as a run has them on record; none of a model to load."""
    with reading(reference.text, _RECORDED):
        inputs = reference.record.get("inputs", {})
        names = [metric["name"] for metric in reference.record.get("metrics", ())]
        return {name: inputs[key] for name in names if (key := f"evaluation text of {name!r}") in inputs}


def loadable(reference: Reference, why: str) -> str:
    """Name what can be loaded for a model: of a run, the unpruned one and the best, which was cut.

    Raises:
        ValueError: a candidate that there is as masks only; `why` says what needs more.
    """
    if reference.run is None:
        return reference.text
    if reference.candidate == DENSE:
        return reference.model["name"]
    row = reference.rows[0]
    record = reference.record
    best = reference.run / "best"
    is_best = len(reference.rows) == 1 and record.get("best", {}).get("candidate") == row["candidate"]
    if is_best and (best / "config.json").is_file():
        return str(best)
    said = "name a model that was cut, as saap prune writes it"
    if {"chain", "ratio_asked"} <= row.keys():  # not of a place alone
        command = prune_command(record, row)
        said = f"cut it ({command} --out DIRECTORY) and name that directory"
    raise ValueError(f"{reference.text}: {why}, but a candidate of a run is masks over the unpruned model; {said}")
