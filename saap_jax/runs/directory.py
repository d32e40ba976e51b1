"""A run is a directory of tables and arrays, each written whole under a temporary name and renamed.

| file            | content                                                                                       |
|-----------------|-----------------------------------------------------------------------------------------------|
| `run.json`      | one object: configuration, versions, devices, seeds, stages, the dense model, the best cut    |
| `metrics.jsonl` | one object a finished candidate                                                               |
| `<name>.npz`    | arrays, for instance `scores.npz`; never pickled                                              |
| `<name>.json`   | further plain values, for instance `keep.json`                                                |
| `results.csv`   | what was measured of each candidate, a line each, without the losses of single windows        |
| `report.html`   | what people look at; `report.md` and `report.csv` beside it, where `saap report` was asked     |
| `tensorboard/`  | stages and candidates as TensorBoard scalars, with the extra `tensorboard`                    |
| `best/`         | a model directory, written by whoever cuts the model                                          |

What is read back is what we wrote, so JSON and arrays as they are; anything else is an error of one line.
"""

import contextlib
import datetime
import io
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from saap_jax.errors import reading
from saap_jax.extras import missing
from saap_jax.records import Row, RunRecord
from saap_jax.runs.stages import Stage, measuring, with_stage
from saap_jax.runtime.files import (
    append_line,
    arrays_file,
    decoded,
    encoded,
    is_left,
    plain,
    read_json,
    write_atomically,
)
from saap_jax.runtime.processes import broadcast, broadcast_bytes, is_primary
from saap_jax.runtime.words import some
from saap_jax.types import STRUCTURES

SCHEMA = 1
"""Version of the record layout, stored as `schema`."""

_FIXED = ("metrics.jsonl", "report.html", "report.md", "report.csv")
_STAGE = ("seconds", "compile_seconds", "compiles", "peak_host_gib", "peak_device_gib", "tokens", "tokens_per_second")
_TRAINING = ("loss", "held_out", "divergence", "distance", "norm", "learning_rate", "tokens_per_second")


class OtherRunError(ValueError):
    """A directory holds a run of another configuration."""


def now() -> str:
    """Tell the time to the second, as ISO 8601 in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


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
    version = None
    if isinstance(record, dict):
        version = record.get("schema")
    if version != SCHEMA:
        raise ValueError(
            f"{file}: expected a run of version {SCHEMA} (`schema`), got {version!s:.60}; make it again with "
            "--overwrite or another --name"
        )
    return cast(RunRecord, record)


def read_candidates(path: str | os.PathLike[str]) -> list[Row]:
    """Read `metrics.jsonl` of a run directory: the last line of each candidate, in order.

    An unfinished last line, as a kill leaves it, is left out.

    Raises:
        ValueError: another line cannot be read.
    """
    file = Path(path) / "metrics.jsonl"
    found: dict[str, Row] = {}
    *lines, _ = file.read_bytes().split(b"\n") if file.exists() else [b""]
    for number, line in enumerate(lines, start=1):
        with reading(f"{file}, line {number}", "a candidate"):
            row = decoded(line)
            found[row["candidate"]] = row
    return list(found.values())


class RunDirectory:
    """A directory that one run writes into and that the next call of the same run picks up.

    Made by `RunDirectory.open`. One process writes at a time, of a job of many the first, which also tells the others
    what is there; anybody may read at any time.
    """

    def __init__(self, path: Path, record: RunRecord, *, begun: bool = True):
        self.path = path
        self._record = record
        self._begun = begun

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], config: dict[str, Any], *, overwrite: bool | None = False, command: str = ""
    ) -> "RunDirectory":
        """Make a new run, or pick up the run of the same configuration that the directory holds.

        Nothing is written or removed before `begin` (or the first value that is kept), so bad input leaves no trace.
        With `overwrite` the run starts afresh: what it wrote is removed, other files stay. True: one of whatever
        configuration; None: of this one.
        A new run records the command, if one is given, when it began and on which host.

        Raises:
            OtherRunError: the directory holds a run of another configuration.
            ValueError: it holds files but no run.
        """
        path = Path(path)
        config = plain(config)
        found = broadcast(lambda: _found(path, damaged=overwrite is not False))
        if found and not overwrite:
            said = "holds a run of another configuration"
            _check_same(path, said, flatten(plain(found.get("config"))), flatten(config), OtherRunError)
            if overwrite is False:
                return cls(path, found)
        fresh = {"schema": SCHEMA, "name": path.name, "status": "running", "stages": [], "files": [], "config": config}
        fresh |= {"started": now(), "host": platform.node()} | ({"command": command} if command else {})
        return cls(path, cast(RunRecord, fresh), begun=False)

    def begin(self, inputs: Mapping[str, str] | None = None) -> "RunDirectory":
        """Create the directory (and remove what an overwritten run left there); from now on everything is written.

        Args:
            inputs: digests of what the run is of, its model and texts, by what a refusal calls them. They are recorded,
                and a run that goes on has to be of the same. A finished run, which is only shown, is not asked.

        Raises:
            ValueError: what the run is of has changed since it was begun.
        """
        if not self._begun:
            new = is_primary() and not self.path.exists()
            if is_primary():
                _remove_outputs(self.path)
                self.path.mkdir(parents=True, exist_ok=True)
            self._begun = True
            try:
                self._set(**({} if inputs is None else {"inputs": dict(inputs)}))
            except OSError:
                self._begun = False
                if new:
                    self.path.rmdir()
                raise
        elif inputs is not None and "inputs" in self._record:
            said = "was begun on something else than is there now, by the digests of"
            before, after = ({name: value[:12] for name, value in each.items()}
                             for each in (self._record["inputs"], inputs))  # fmt: skip
            _check_same(self.path, said, before, after)
        elif inputs is not None:
            self._set(inputs=dict(inputs))
        return self

    @property
    def record(self) -> RunRecord:
        """The content of `run.json`; change it through `update`."""
        return self._record

    @property
    def finished(self) -> bool:
        """True once the run has set its status to "finished"."""
        return self._record.get("status") == "finished"

    @property
    def structures(self) -> tuple[str, ...]:
        """The names of the model's structures, of a traced model its own."""
        return tuple(each["name"] for each in self._record.get("structures", ())) or STRUCTURES

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
        line = encoded(candidate)
        self.begin()
        if is_primary():
            append_line(self.path / "metrics.jsonl", line)

    def candidates(self) -> list[Row]:
        """Read the finished candidates, in order; a name that was recorded twice counts once, with its last values."""
        return broadcast(lambda: read_candidates(self.path))

    def has(self, name: str) -> bool:
        """Say whether the directory holds a file or directory, such as `scores.npz`."""
        return broadcast(lambda: (self.path / name).exists())

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Measure a stage and record it in `stages`; code inside adds to its `tokens`.

        A stage that runs again, after a kill for instance, adds to what is on record.
        """
        stage = Stage(name)
        try:
            with measuring(stage):
                yield stage
        finally:
            self._set(stages=with_stage(self._record.get("stages", []), stage))

    def save_arrays(self, name: str, arrays: Mapping[str, Any]) -> Path:
        """Write arrays to `<name>.npz`; keys may hold slashes.

        Raises:
            ValueError: an array's type is unknown to the format (bfloat16, objects).
        """
        return self._save(f"{name}.npz", arrays_file(arrays, f"{name}.npz"))

    def load_arrays(self, name: str) -> dict[str, np.ndarray]:
        """Read the arrays of `<name>.npz`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged.
        """
        path = self.path / f"{name}.npz"
        if not self.has(path.name):
            raise FileNotFoundError(f"expected arrays at {path}, found no file; the run has not come that far")
        content = broadcast_bytes(path.read_bytes() if is_primary() else b"")
        said = "arrays; the file was changed or damaged: remove it, and the same command makes it again"
        with reading(path, said), np.load(io.BytesIO(content), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}

    def save_json(self, name: str, value: Any) -> Path:
        """Write a plain value to `<name>.json`."""
        return self._save(f"{name}.json", encoded(value, indent=1))

    def save_text(self, filename: str, text: str) -> Path:
        """Write a text file."""
        return self._save(filename, text.encode())

    def _save(self, filename: str, content: bytes) -> Path:
        path = self.claim(filename)
        write_atomically(path, content)
        return path

    def claim(self, filename: str) -> Path:
        """Note in `run.json` that this run writes a file or directory, so that `overwrite` knows what it may remove."""
        self.begin()
        files = self._record.get("files", [])
        if filename not in files:
            self._set(files=[*files, filename])
        return self.path / filename


def write_scalars(run: RunDirectory) -> Path:
    """Write a run, finished or not, as TensorBoard scalars in place of those that are there.

    `FIELD/STAGE` at step 0, `candidates/METRIC` at the candidate's number, `training/FIELD` at its step; what was not
    recorded has none. By `tensorboardX`, so no TensorFlow is needed; nothing is written where that is not installed
    (extra `tensorboard`), since `metrics.jsonl` and `run.json` have the same numbers.
    """
    if missing("tensorboard", "TensorBoard"):
        return run.path / "tensorboard"
    path = run.claim("tensorboard")
    candidates = run.candidates()
    if not is_primary():
        return path
    from tensorboardX import SummaryWriter  # here: it imports torch where there is one

    found = [(f"{field}/{stage['name']}", stage.get(field), 0)
             for stage in run.record.get("stages", []) for field in _STAGE]  # fmt: skip
    for number, row in enumerate(candidates, start=1):
        found += [(f"candidates/{metric}", value, number) for metric, value in row.get("ppl", {}).items()]
        found += [(f"training/{field}", row.get(field), row["step"]) for field in _TRAINING if "step" in row]
    shutil.rmtree(path, ignore_errors=True)
    with SummaryWriter(str(path)) as writer:
        for tag, value, step in found:
            if value is not None:
                writer.add_scalar(tag, value, step)
    return path


def _found(path: Path, damaged: bool) -> RunRecord | None:
    """Read the record of the run that a directory holds, None where there is none, or where it may be `damaged` and is;
    see `RunDirectory.open`."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"expected a run directory, found a file at {path}; choose another --name")
    if (path / "run.json").exists():
        with contextlib.suppress(ValueError) if damaged else contextlib.nullcontext():
            return read_run(path)
        return None
    if path.exists() and not all(map(is_left, path.iterdir())):
        raise ValueError(f"expected a run (run.json) or an empty directory at {path}; choose another --name")
    return None


def delete_run(path: Path) -> None:
    """Delete what the run of a directory wrote; other files stay, and the directory with them."""
    _remove_outputs(path)
    (path / "run.json").unlink()
    if not any(path.iterdir()):
        path.rmdir()


def _remove_outputs(path: Path) -> None:
    """Remove what the run of a directory wrote, by its record, and what killed processes left there."""
    if not (path / "run.json").exists():
        return
    try:
        record = read_json(path / "run.json")
    except ValueError:
        record = None
    record = record if isinstance(record, dict) else {}  # damaged, or none of ours
    named = [name for name in record.get("files", []) if Path(name).name == name and name not in ("", ".", "..")]
    # killed half-way, it is no finished run
    write_atomically(path / "run.json", encoded(record | {"status": "running"}))
    left = [each.name for each in path.iterdir() if is_left(each)]
    for file in (path / name for name in dict.fromkeys((*_FIXED, *named, *left))):
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        else:
            file.unlink(missing_ok=True)


def _check_same(
    path: Path, said: str, before: Mapping[str, str], after: Mapping[str, str], error: type[ValueError] = ValueError
) -> None:
    """Raise an error where something on record has changed, with the first three names and both values."""
    differing = [
        f"{key or 'config'} {before.get(key, '(absent)')} -> {after.get(key, '(absent)')}"
        for key in dict.fromkeys((*before, *after))
        if before.get(key) != after.get(key)
    ]
    if differing:
        raise error(f"{path} {said}: {some(differing)}; bring back what it was, or pass --overwrite or another --name")


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """List the leaves of a configuration by dotted path, as JSON text; a list of plain values is one leaf."""
    items = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        items = enumerate(value)
    leaves: dict[str, str] = {}
    for key, item in items:
        leaves |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return leaves or {prefix: json.dumps(value)}
