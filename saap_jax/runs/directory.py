"""The records of a run: what a run directory holds, and how it is written so that a killed run stays readable.

| file            | content                                                                                       |
|-----------------|-----------------------------------------------------------------------------------------------|
| `run.json`      | one object: configuration, versions, devices, seeds, stages, the dense model, the best cut    |
| `metrics.jsonl` | one object a finished candidate                                                               |
| `<name>.npz`    | arrays, for instance `scores.npz`; never pickled                                              |
| `<name>.json`   | further plain values, for instance `keep.json`                                                |
| `report.html`   | what people look at; `report.md` and `report.csv` beside it, where `saap report` was asked     |
| `tensorboard/`  | stages and candidates as TensorBoard scalars, see `scalars`                                   |
| `best/`         | a model directory, written by whoever cuts the model                                          |

The fields of a record and their types are in `records`; all that is read back is checked by them.
"""

import contextlib
import datetime
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from saap_jax.runs.reading import DAMAGED, SCHEMA, arrays_of, read_candidates, read_run
from saap_jax.runs.records import Configuration, Row, RunRecord
from saap_jax.runs.score_arrays import structures_of
from saap_jax.runs.stages import Stage, measuring, with_stage
from saap_jax.runtime.files import (
    append_line,
    arrays_file,
    decoded,
    encoded,
    lines_of,
    plain,
    read_json,
    write_atomically,
)
from saap_jax.runtime.processes import broadcast, broadcast_bytes, is_primary

_FIXED_FILES = ("metrics.jsonl", "report.html", "report.md", "report.csv")

_FILES = re.compile(
    r"(metrics|ablation|race)\.jsonl|report\.(html|md|csv)|(scores|stability)(-[\w.-]+)?\.npz|(keeps|learning)\.npz"
    r"|(keep|fidelity)\.json|(couplings|fidelity|frontier|sensitivity|training)\.svg"
    r"|(comparison|fidelity|frontier|recovery|sensitivity)\.(md|csv)|curve\.csv"
)
_DIRECTORIES = re.compile(r"best|model|tensorboard|statistics|top_k_logits|checkpoints(-[\w.-]+)?")
"""What runs of all kinds write beside `run.json`, and so all that `overwrite` removes."""


def now() -> str:
    """Return the time to the second, as ISO 8601 in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class RunDirectory:
    """A directory that one run writes into and that the next call of the same run picks up.

    Made by `RunDirectory.open`. One process writes at a time, of a job of many the first, which also tells the others
    what is there; anybody may read at any time.
    """

    def __init__(self, path: Path, record: RunRecord, *, begun: bool = True):
        self.path = path
        self._record = record
        self._begun = begun
        self.corrupt_lines = 0
        """Lines of `metrics.jsonl` that the last call of `candidates` could not read."""
        self.sent: Callable[[], None] = lambda: None
        """Sends what is there to where the run is kept, after each stage that ends without an error."""

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], config: dict[str, Any], *, overwrite: bool = False, command: str = ""
    ) -> "RunDirectory":
        """Return a new run, or pick up the run of the same configuration that the directory holds.

        Nothing is written or removed before `begin` (or the first value that is kept), so bad input leaves no trace.
        With `overwrite` a run of whatever configuration starts afresh: what it wrote is removed, other files stay.
        A new run records the command, if one is given, when it began and on which host.

        Raises:
            ValueError: the directory holds a run of another configuration, or files but no run; with `overwrite`, the
                run names files as its own that no run writes.
        """
        path, config = Path(path), plain(config)
        fresh: RunRecord = {"schema": SCHEMA, "name": path.name, "status": "running", "stages": [], "files": []}
        fresh["config"] = cast(Configuration, config)
        fresh["started"], fresh["host"] = now(), platform.node()
        if command:
            fresh["command"] = command
        found = broadcast(lambda: _found(path, overwrite))
        if found is None or overwrite:
            return cls(path, fresh, begun=False)
        _check_config(path, old=found.get("config"), new=config)
        return cls(path, found)

    def begin(self, inputs: Mapping[str, str] | None = None) -> "RunDirectory":
        """Create the directory (and remove what an overwritten run left there); from now on everything is written.

        Args:
            inputs: digests of what the run is of, its model and texts, by what a refusal calls them. They are recorded,
                and a run that goes on has to be of the same. A finished run, which is only shown, is not asked.

        Raises:
            ValueError: what the run is of has changed since it was begun.
        """
        if self._begun:
            if inputs is not None:
                self._check_inputs(dict(inputs))
            return self
        new = is_primary() and not self.path.exists()
        if is_primary():
            if (self.path / "run.json").exists():
                RunDirectory(self.path, read_run(self.path, outputs_alone=True))._remove_outputs()
            self.path.mkdir(parents=True, exist_ok=True)
        self._begun = True
        try:
            self._set(**({} if inputs is None else {"inputs": dict(inputs)}))
        except OSError:
            self._begun = False
            if new:
                self.path.rmdir()
            raise
        return self

    def _check_inputs(self, inputs: dict[str, str], at_most: int = 3) -> None:
        before = self._record.get("inputs")
        if before is None:
            names = ("metrics.jsonl", *self._record.get("files", []))
            if broadcast(lambda: any((self.path / name).exists() for name in names)):
                raise ValueError(
                    f"{self.path} holds results, but does not say of which weights and text, as runs of an older "
                    "version; pass --overwrite or another --name"
                )
            self._set(inputs=inputs)
            return
        changed = [
            f"{name} ({before.get(name, 'none')[:12]} -> {inputs.get(name, 'none')[:12]})"
            for name in dict.fromkeys((*before, *inputs))
            if before.get(name) != inputs.get(name)
        ]
        if changed:
            more = f" and {len(changed) - at_most} more" if len(changed) > at_most else ""
            raise ValueError(
                f"{self.path} was begun on something else than is there now, by the digests of "
                f"{', '.join(changed[:at_most])}{more}; bring back what it was begun on, or pass --overwrite or "
                "another --name"
            )

    @property
    def record(self) -> RunRecord:
        """The content of `run.json`; change it through `update`."""
        return self._record

    @property
    def finished(self) -> bool:
        """True once the run has set its status to "finished"."""
        return self._record.get("status") == "finished"

    def update(self, **fields: Any) -> None:
        """Set top-level fields of `run.json` and write the file."""
        self.begin()
        self._set(**fields)

    def _set(self, **fields: Any) -> None:
        record = cast(RunRecord, {**self._record, **decoded(encoded(fields))})
        if self._begun:
            write_atomically(self.path / "run.json", encoded(record, indent=1))
        self._record = record

    def append(self, candidate: Mapping[str, Any]) -> None:
        """Add one finished candidate (an object with a `candidate` name) to `metrics.jsonl`."""
        if not isinstance(candidate.get("candidate"), str):
            raise ValueError(f"expected a record with a string `candidate`, got the fields {sorted(candidate)}")
        line = encoded(candidate)
        self.begin()
        if is_primary():
            append_line(self.path / "metrics.jsonl", line)

    def candidates(self) -> list[Row]:
        """Return the finished candidates, in order; a name that was recorded twice counts once, with its last values.

        Lines that cannot be read (torn by a kill) are skipped and counted in `corrupt_lines`.
        """
        candidates, self.corrupt_lines = broadcast(lambda: read_candidates(self.path))
        return candidates

    @property
    def structures(self) -> tuple[str, ...]:
        """The names of the model's structures, as the record says."""
        return structures_of(self._record)

    def has(self, name: str) -> bool:
        """Say whether the directory holds a file or directory, such as `scores.npz`."""
        return broadcast(lambda: (self.path / name).exists())

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Measure a stage and record it in `stages`, see `monitor`; code inside adds to its `tokens`.

        A stage that runs again, after a kill for instance, adds to what is on record.
        """
        stage = Stage(name)
        try:
            with measuring(stage):
                yield stage
        finally:
            self._set(stages=with_stage(self._record.get("stages", []), stage.record()))
        if self._begun:
            self.sent()

    def save_arrays(self, name: str, arrays: Mapping[str, Any]) -> Path:
        """Write arrays to `<name>.npz`; keys may hold slashes.

        Raises:
            ValueError: an array's type is unknown to the format (bfloat16, objects).
        """
        content = arrays_file(arrays, f"{name}.npz")
        path = self.claim(f"{name}.npz")
        digests = self._record.get("digests", {})
        known = dict.fromkeys((*digests.get(path.name, [])[-1:], hashlib.sha256(content).hexdigest()))
        self._set(digests=digests | {path.name: [*known]})  # killed in between, the run holds what was there before
        write_atomically(path, content)
        return path

    def settle_rows(self) -> None:
        """Write `metrics.jsonl` anew with one line a candidate, its last; a file with damaged lines stays as it is."""
        file = self.path / "metrics.jsonl"
        rows = self.candidates()
        if is_primary() and file.exists() and not self.corrupt_lines and len(rows) < sum(1 for _ in lines_of(file)):
            write_atomically(file, b"".join(encoded(row) + b"\n" for row in rows))

    def settle_arrays(self) -> None:
        """Record one digest a file of arrays, that of what is there; which ones it had before depends on kills."""
        digests = self._record.get("digests", {})
        pending = [name for name, known in digests.items() if len(known) > 1 and self.has(name)]
        there = broadcast(lambda: {name: _digest_of(self.path / name) for name in pending})
        if there:
            self._set(digests=digests | {name: [one] for name, one in there.items() if one in digests[name]})

    def load_arrays(self, name: str) -> dict[str, np.ndarray]:
        """Read the arrays of `<name>.npz`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or not what the run wrote.
        """
        path = self.path / f"{name}.npz"
        if not self.has(path.name):
            raise FileNotFoundError(f"expected arrays at {path}, found no file; the run has not come that far")
        content = path.read_bytes() if is_primary() else b""
        broadcast(lambda: self._check_digest(path, content))
        return arrays_of(broadcast_bytes(content), path)

    def _check_digest(self, path: Path, content: bytes) -> None:
        known = self._record.get("digests", {}).get(path.name)
        if known is not None and hashlib.sha256(content).hexdigest() not in known:
            arrays_of(content, path)
            raise ValueError(f"expected in {path} what the run wrote, found something else; {DAMAGED}")

    def save_json(self, name: str, value: Any) -> Path:
        """Write a plain value to `<name>.json`."""
        path = self.claim(f"{name}.json")
        write_atomically(path, encoded(value, indent=1))
        return path

    def save_text(self, filename: str, text: str) -> Path:
        """Write a text file."""
        path = self.claim(filename)
        write_atomically(path, text.encode())
        return path

    def load_json(self, name: str) -> Any:
        """Read the value of `<name>.json`."""
        return broadcast(lambda: read_json(self.path / f"{name}.json"))

    def claim(self, filename: str) -> Path:
        """Note in `run.json` that this run writes a file or directory, so that `overwrite` knows what it may remove."""
        if not (_FILES.fullmatch(filename) or _DIRECTORIES.fullmatch(filename)):
            raise ValueError(f"expected one of the names that runs give to their files, got {filename!r}")
        self.begin()
        files = self._record.get("files", [])
        if filename not in files:
            self.update(files=[*files, filename])
        return self.path / filename

    def _remove_outputs(self) -> None:
        outputs = _outputs(self.path, self._record)
        self.update(status="running")  # killed half-way this is a partial run, not a finished one without candidates
        for path in outputs:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _found(path: Path, overwrite: bool) -> RunRecord | None:
    """Return the record of the run that a directory holds, None where there is none; see `RunDirectory.open`."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"expected a run directory, found a file at {path}; choose another --name")
    if (path / "run.json").exists():
        record = read_run(path, outputs_alone=overwrite)
        if overwrite:
            _outputs(path, record)
        return record
    if path.exists() and any(not _is_left(entry.name) for entry in path.iterdir()):
        raise ValueError(f"expected a run (run.json) or an empty directory at {path}; choose another --name")
    return None


def _is_left(name: str) -> bool:
    """Say whether a name is of what a killed process left: a file half written, or a lock that nobody holds."""
    return name.startswith(".") and name.endswith((".partial", ".lock"))


def _outputs(path: Path, record: RunRecord) -> list[Path]:
    """Return what a run wrote beside `run.json`, as far as it is there: regular files, and directories of its own.

    Raises:
        ValueError: the record names something else, or something else is there under a name of ours.
    """
    found, written = [], record.get("files", [])
    for name in dict.fromkeys((*_FIXED_FILES, *written)):
        is_file, place = bool(_FILES.fullmatch(name)), path / name
        if not (is_file or _DIRECTORIES.fullmatch(name)):
            raise ValueError(
                f"--overwrite: {path / 'run.json'} names {name!r} among its files, which no run writes; nothing was "
                "removed: take the name out there, or choose another --name"
            )
        if place.is_symlink() or (place.exists() and not (place.is_file() if is_file else place.is_dir())):
            kind = "file" if is_file else "directory"
            raise ValueError(
                f"--overwrite: expected a {kind} of the run at {place}, found something else; nothing was removed: "
                "move it away, or choose another --name"
            )
        found += [place] if place.exists() else []
    left = re.compile(rf"\.(run\.json|{_FILES.pattern}|{_DIRECTORIES.pattern})(\.\w+)?\.(partial|lock)")
    return found + [each for each in path.iterdir() if left.fullmatch(each.name) and not each.is_symlink()]


def _check_config(path: Path, *, old: Any, new: Any, at_most: int = 3) -> None:
    before, after = flatten(plain(old)), flatten(new)
    absent = "(absent)"
    differing = [
        f"{key or 'config'} {before.get(key, absent)} -> {after.get(key, absent)}"
        for key in dict.fromkeys((*before, *after))
        if before.get(key, absent) != after.get(key, absent)
    ]
    if differing:
        more = f" and {len(differing) - at_most} more" if len(differing) > at_most else ""
        raise ValueError(
            f"{path} holds a run of another configuration: {', '.join(differing[:at_most])}{more}; "
            "pass --overwrite or another --name"
        )


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Return the leaves of a configuration by dotted path, as JSON text; a list of plain values is one leaf."""
    items = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        items = enumerate(value)
    leaves: dict[str, str] = {}
    for key, item in items:
        leaves |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return leaves or {prefix: json.dumps(value)}
