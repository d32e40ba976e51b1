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

JSON has no NaN and no infinities: they are stored as the strings "NaN", "Infinity" and "-Infinity" (which `float`
understands), and come back as floats.
"""

import contextlib
import importlib.metadata
import io
import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from saap_jax.processes import agreed, agreed_bytes, first
from saap_jax.report.monitor import Stage, measuring, with_stage

SCHEMA = 1
"""Version of the record layout, stored as `schema`."""

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_FIXED_FILES = ("metrics.jsonl", "report.html", "report.md", "report.csv")
_LIBRARIES = ("saap_jax", "jax", "jaxlib", "flax", "optax", "numpy", "transformers")


class RunDirectory:
    """A directory that one run writes into and that the next call of the same run picks up.

    Made by `RunDirectory.open`. One process writes at a time, of a job of many the first, which also tells the others
    what is there; anybody may read at any time.
    """

    def __init__(self, path: Path, record: dict[str, Any], *, begun: bool = True):
        self.path = path
        self._record = record
        self._begun = begun
        self.corrupt_lines = 0
        """Lines of `metrics.jsonl` that the last call of `candidates` could not read."""

    @classmethod
    def open(cls, path: str | os.PathLike[str], config: dict[str, Any], *, overwrite: bool = False) -> "RunDirectory":
        """Return a new run, or pick up the run of the same configuration that the directory holds.

        Nothing is written or removed before `begin` (or the first value that is kept), so bad input leaves no trace.
        With `overwrite` a run of whatever configuration starts afresh: what it wrote is removed, other files stay.

        Raises:
            ValueError: the directory holds a run of another configuration, or files but no run.
        """
        path, config = Path(path), plain(config)
        fresh = {"schema": SCHEMA, "name": path.name, "status": "running", "config": config, "stages": [], "files": []}
        found = agreed(lambda: _found(path))
        if found is None or overwrite:
            return cls(path, fresh, begun=False)
        _check_config(path, old=found.get("config"), new=config)
        return cls(path, found)

    def begin(self) -> "RunDirectory":
        """Create the directory (and remove what an overwritten run left there); from now on everything is written."""
        if self._begun:
            return self
        if first():
            if (self.path / "run.json").exists():
                RunDirectory(self.path, read_run(self.path))._remove_outputs()
            self.path.mkdir(parents=True, exist_ok=True)
        self._begun = True
        self._set()
        return self

    @property
    def record(self) -> dict[str, Any]:
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
        self._record = {**self._record, **_decode(plain(fields))}
        if self._begun:
            write_atomically(self.path / "run.json", _dumps(plain(self._record), indent=1))

    def append(self, candidate: dict[str, Any]) -> None:
        """Add one finished candidate (an object with a `candidate` name) to `metrics.jsonl`."""
        if not isinstance(candidate.get("candidate"), str):
            raise ValueError(f"expected a record with a string `candidate`, got the fields {sorted(candidate)}")
        line = _dumps(plain(candidate)) + b"\n"
        self.begin()
        if not first():
            return
        with open(self.path / "metrics.jsonl", "ab+") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a killed run left a torn line
                    line = b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def candidates(self) -> list[dict[str, Any]]:
        """Return the finished candidates, in order; a name that was recorded twice counts once, with its last values.

        Lines that cannot be read (torn by a kill) are skipped and counted in `corrupt_lines`.
        """
        candidates, self.corrupt_lines = agreed(lambda: read_candidates(self.path))
        return candidates

    def has(self, name: str) -> bool:
        """Say whether the directory holds a file or directory, such as `scores.npz`."""
        return agreed(lambda: (self.path / name).exists())

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

    def save_arrays(self, name: str, arrays: Mapping[str, Any]) -> Path:
        """Write arrays to `<name>.npz`; keys may hold slashes.

        Raises:
            ValueError: an array's type is unknown to the format (bfloat16, objects).
        """
        values = {key: np.asarray(value) for key, value in arrays.items()}
        for key, value in values.items():
            if value.dtype.kind not in "biufcSU":
                raise ValueError(
                    f"expected numbers or text at {key!r} of {name}.npz, got {value.dtype}; convert it first"
                )
        path = self.claim(f"{name}.npz")
        if first():
            with _replacing(path) as file:
                np.savez(file, allow_pickle=False, **values)
        return path

    def load_arrays(self, name: str) -> dict[str, np.ndarray]:
        """Read the arrays of `<name>.npz`."""
        path = self.path / f"{name}.npz"
        if not self.has(path.name):
            raise FileNotFoundError(f"expected arrays at {path}, found no file; the run has not come that far")
        content = agreed_bytes(path.read_bytes() if first() else b"")
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            return {key: file[key] for key in file.files}

    def save_json(self, name: str, value: Any) -> Path:
        """Write a plain value to `<name>.json`."""
        path = self.claim(f"{name}.json")
        write_atomically(path, _dumps(plain(value), indent=1))
        return path

    def save_text(self, filename: str, text: str) -> Path:
        """Write a text file."""
        path = self.claim(filename)
        write_atomically(path, text.encode())
        return path

    def load_json(self, name: str) -> Any:
        """Read the value of `<name>.json`."""
        return agreed(lambda: read_json(self.path / f"{name}.json"))

    def claim(self, filename: str) -> Path:
        """Note in `run.json` that this run writes a file or directory, so that `overwrite` knows what it may remove."""
        if Path(filename).name != filename or filename == "run.json":
            raise ValueError(f"expected a plain file name other than run.json, got {filename!r}")
        self.begin()
        files = self._record.get("files", [])
        if filename not in files:
            self.update(files=[*files, filename])
        return self.path / filename

    def _remove_outputs(self) -> None:
        self.update(status="running")  # killed half-way this is a partial run, not a finished one without candidates
        for name in (*_FIXED_FILES, *self._record.get("files", [])):
            path = self.path / Path(name).name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        for partial in filter(lambda entry: _is_partial(entry.name), list(self.path.iterdir())):
            partial.unlink() if partial.is_file() else shutil.rmtree(partial)


def _found(path: Path) -> dict[str, Any] | None:
    """Return the record of the run that a directory holds, None where there is none; see `RunDirectory.open`."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"expected a run directory, found a file at {path}; choose another --name")
    if (path / "run.json").exists():
        return read_run(path)
    if path.exists() and any(not _is_partial(entry.name) for entry in path.iterdir()):
        raise ValueError(f"expected a run (run.json) or an empty directory at {path}; choose another --name")
    return None


def read_run(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read `run.json` of a run directory.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no run record of this version.
    """
    path = Path(path)
    if not (path / "run.json").exists():
        raise FileNotFoundError(f"expected a run directory, found no run.json in {path}; check the name of the run")
    record = read_json(path / "run.json")
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        found = record.get("schema") if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"expected a run record of schema {SCHEMA}, got {found!r} in {path / 'run.json'}")
    return record


def read_candidates(path: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], int]:
    """Read `metrics.jsonl` of a run directory; return the candidates and the number of lines that are no candidate."""
    file = Path(path) / "metrics.jsonl"
    if not file.exists():
        return [], 0
    found: dict[str, dict[str, Any]] = {}
    corrupt = 0
    for line in filter(None, file.read_bytes().split(b"\n")):
        try:
            record = _decode(json.loads(line.decode()))
        except ValueError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("candidate"), str):
            found[record["candidate"]] = record
        else:
            corrupt += 1
    return list(found.values()), corrupt


def provenance() -> dict[str, Any]:
    """Return what a reader needs to repeat a run: `versions`, `devices` and `git_commit` (None outside a checkout).

    `devices` has `platform`, `kind` and `count` of jax's devices, and how many `cores` of this host the run may use.
    """
    import jax  # here, so that reading a report starts no accelerator

    versions: dict[str, str | None] = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = None
    devices = jax.devices()
    kinds: dict[str, Any] = {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)}
    kinds["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"versions": versions, "devices": kinds, "git_commit": git_commit(Path(__file__).parent)}


def git_commit(directory: Path) -> str | None:
    """Return the commit that a directory is checked out at, with "-dirty" if files differ, or None.

    None is for a directory that git does not track, such as a library installed below somebody else's checkout.
    """

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(("git", *arguments), cwd=directory, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if not git("ls-files", "."):
        return None
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def plain(value: Any) -> Any:
    """Return a value as JSON holds it: mappings, lists, strings, numbers, None; NaN and infinities as strings.

    >>> plain({"ratios": (0.2, float("inf"))})
    {'ratios': [0.2, 'Infinity']}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):  # numbers at once: a run may hold a million of them
        return [
            item if type(item) is int or (type(item) is float and math.isfinite(item)) else plain(item)
            for item in value
        ]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # arrays and scalars of numpy and jax
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError(f"expected a value that JSON can hold, got {type(value).__name__}: {value!r}")


def check_target(name: str, path: str) -> None:
    """Raise ValueError, before any work, where a file cannot be written; an empty path stands for none."""
    if path and (Path(path).is_dir() or not Path(path).parent.is_dir()):
        raise ValueError(f"{name}: expected a file in a directory that exists, got {path}; make the directory first")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that its name holds either the old content or the whole new one, whenever the process ends.

    Of several processes of a job, the first one writes it.
    """
    if first():
        with _replacing(path) as file:
            file.write(content)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Any]:
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _is_partial(name: str) -> bool:
    return name.startswith(".") and name.endswith(".partial")


def _dumps(value: Any, indent: int | None = None) -> bytes:
    return json.dumps(value, indent=indent, allow_nan=False).encode()


def read_json(path: Path) -> Any:
    """Read the plain value of a JSON file, non-finite numbers included.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return _decode(json.loads(path.read_bytes()))
    except ValueError as error:
        raise ValueError(f"expected JSON in {path}, got {error}; the file was changed or damaged") from error


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) if isinstance(item, dict | list | str) else item for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


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
