"""What numbers are of and depend on: digests of weights, text and code; versions, devices and the commit.

Equal digests stand for the same weights and the same text, to the last bit.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import inspect
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from saap_jax.runtime.gather import fetched
from saap_jax.runtime.mesh import mesh_of
from saap_jax.runtime.programs import cores
from saap_jax.runtime.sources import HOME, source_digest

_LIBRARIES = ("saap_jax", "jax", "jaxlib", "flax", "optax", "numpy", "transformers")


def digest_of(tree: Any) -> str:
    """Compute the SHA-256 of all arrays of a tree with their paths, shapes and types; one layer at a time is fetched.

    It does not depend on how the arrays are spread over devices. Of several processes, all have to call this.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        digest.update(f"{name} {leaf.shape} {leaf.dtype.name};".encode())
        if leaf.ndim > 2 and mesh_of(leaf):
            layers = range(leaf.shape[0])
        else:
            layers = (None,)
        for array in (fetched(leaf, index) for index in layers if leaf.size):
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def model_digest(model: Any) -> str:
    """Digest a model's `spec`, with constants such as those of rotary embeddings, and its weights."""
    return hashlib.sha256(f"{model.spec!r};{digest_of(model)}".encode()).hexdigest()


def inputs_of(
    model: Mapping[str, str],
    calibration: Mapping[int, Mapping[str, Any]] | None = None,
    texts: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Digest what a run is of: its model, calibration text by seed and scenario, evaluation text by metric.

    The keys are what a refusal calls them, see `RunDirectory.begin`; `model` are the digests of the model.
    """
    read = {
        f"calibration text {scenario!r} of seed {seed}": windows
        for seed, scenarios in (calibration or {}).items()
        for scenario, windows in scenarios.items()
    }
    read |= {f"evaluation text of {metric!r}": windows for metric, windows in (texts or {}).items()}
    return dict(model) | {name: digest_of(windows) for name, windows in read.items()}


def code_digest(made: Any, source: str = "", digest: str = "") -> str:
    """Digest the file of a function or class with the modules that it imports from beside it, as it was when the code
    was met first: what runs is what was loaded then. Empty for the package's own, which `computed_by` digests together.

    Args:
        source: the file, where it is known; else Python is asked.
        digest: what it was when the code was loaded, where that is known.
    """
    made = inspect.unwrap(getattr(made, "func", made))
    code = getattr(made, "__code__", made)
    key = id(code), source
    if digest:
        _met[key] = code, digest
    elif key not in _met:
        file = Path(source or _file_of(made)).expanduser()
        own = HOME in file.resolve().parents or not file.is_file()
        _met[key] = code, "" if own else source_digest(file)
    return _met[key][1]


_met: dict[tuple[int, str], tuple[Any, str]] = {}
"""Digest by the identity of code, which is held so that nothing else gets it, and by the file that it was named by."""


def _file_of(made: Any) -> str:
    """Ask Python for the file of a function or class, empty where there is none, as of what the interpreter holds."""
    with contextlib.suppress(TypeError, OSError):
        return inspect.getsourcefile(made) or ""
    for each in vars(made).values() if isinstance(made, type) else ():  # of a file that is run, and no module
        if inspect.isfunction(each) and Path(each.__code__.co_filename).is_file():
            return each.__code__.co_filename
    return ""


@functools.cache
def _digest_of_files(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def provenance() -> dict[str, Any]:
    """Note what a reader needs to repeat a run: `versions`, `devices` and `git_commit` (None outside a checkout).

    `devices` has `platform`, `kind` and `count` of jax's devices, and how many `cores` of this host the run may use.
    """
    devices = jax.devices()
    kinds: dict[str, Any] = {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)}
    kinds["cores"] = cores()
    return {"versions": versions(), "devices": kinds, "git_commit": git_commit(HOME)}


def computed_by() -> list[Any]:
    """Note what numbers, and what is kept of them, depend on beside inputs: versions, all sources here, devices."""
    return [versions(), _digest_of_files(HOME), jax.devices()[0].device_kind]


def versions() -> dict[str, str | None]:
    """List the versions of Python and of the libraries behind results, None of one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = None
    return found


def git_commit(directory: Path) -> str | None:
    """Ask git for the commit of a directory, with "-dirty" if files differ, or None.

    None is for a directory that git does not track, such as a library installed below somebody else's checkout.
    """

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(("git", *arguments), cwd=directory, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode == 0:
            return done.stdout.strip()
        return None

    if git("ls-files", "."):
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return None
